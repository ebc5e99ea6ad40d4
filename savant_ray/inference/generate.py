"""Goes on with prompts, token by token, over a key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from savant_ray.data.tokenizer import Tokenizer
from savant_ray.model.transformer import UniversalTransformer

# Per head and row: a longer prompt goes through in parts, since its scores grow with the square of its length.
PROMPT_SCORES = 1 << 22


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Ids from `vocab_size` on and `never_sampled` have probability 0."""

    vocab_size: int  # of the tokenizer; the model's may be larger
    end_of_document: int
    never_sampled: frozenset[int]
    max_new_tokens: int = 300
    temperature: float = 0.6  # 0 = the likeliest token
    seed: int = 0

    @classmethod
    def of(cls, tokenizer: Tokenizer, max_new_tokens: int, temperature: float, seed: int = 0) -> Self:
        """Of text in this tokenizer."""
        vocab_size, end, never = tokenizer.vocab_size, tokenizer.end_of_document, tokenizer.never_sampled
        return cls(vocab_size, end, never, max_new_tokens, temperature, seed)


def generate(
    model: UniversalTransformer, prompt: Sequence[int], sampling: Sampling, n_loops: int | None = None
) -> Iterator[int]:
    """Yields new token ids until the end of the document (not yielded) or `max_new_tokens`.

    The choice is a function of (weights, prompt, sampling) alone. Memory grows with the tokens in global loops only.

    A model whose numbers are none any more (NaN) says nothing.

    Raises:
        ValueError: the prompt has no tokens.
    """
    for tokens in _rounds(model, [prompt], sampling, n_loops):
        yield from (token for token in tokens if token is not None)


def generate_many(
    model: UniversalTransformer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    n_loops: int | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> list[list[int]]:
    """What `generate` yields for each prompt, all of them at once: equal but for the rounding of larger products.

    Ends where it is when `stop_requested`.

    Raises:
        ValueError: a prompt has no tokens.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    for tokens in _rounds(model, prompts, sampling, n_loops):
        if stop_requested():
            break
        for answer, token in zip(answers, tokens, strict=True):
            answer.extend([] if token is None else [token])
    return answers


@torch.no_grad()
def _rounds(
    model: UniversalTransformer, prompts: Sequence[Sequence[int]], sampling: Sampling, n_loops: int | None
) -> Iterator[list[int | None]]:
    """Yields the next token of each row, None for rows that have ended, until all have."""
    if not all(prompts):
        raise ValueError("the prompt has no tokens")
    if not prompts:
        return
    device = model.head.weight.device
    forbidden_V = _forbidden(sampling, model.config.vocab_size).to(device)
    generators = [torch.Generator().manual_seed(sampling.seed) for _ in prompts]
    tokens_BT, padding_B = _left_padded(prompts)
    cache = model.new_cache(n_loops, padding_B.to(device) if padding_B.any() else None)
    ended = [False] * len(prompts)
    rows = max(1, PROMPT_SCORES // tokens_BT.shape[1])
    for _ in range(sampling.max_new_tokens):
        *parts, last_BT = tokens_BT.to(device).split(rows, dim=1)
        for part_BT in parts:
            model.decode(part_BT, cache, n_loops)
        logits_BV = model.decode(last_BT, cache, n_loops).float()
        is_sane = logits_BV.isfinite().all(dim=-1).tolist()  # else the model has diverged and has nothing to say
        logits_BV = logits_BV.masked_fill(forbidden_V, float("-inf"))
        chosen = choose(logits_BV, sampling.temperature, generators, is_sane)
        ended = [was or token in (None, sampling.end_of_document) for was, token in zip(ended, chosen, strict=True)]
        if all(ended):
            return
        yield [None if done else token for done, token in zip(ended, chosen, strict=True)]
        tokens_BT = torch.tensor([[token or 0] for token in chosen])


def choose(
    logits_BV: Tensor, temperature: float, generators: Sequence[torch.Generator], is_sane: Sequence[bool]
) -> list[int | None]:
    """A token id for each sane row; drawn on the CPU, so that every device draws alike.

    Logits are divided as fp64 and below their maximum, so that no temperature above 0 overflows: towards 0 the draw becomes
    the likeliest token, towards infinity any of those that are allowed.
    """
    if temperature == 0:
        return [token if sane else None for token, sane in zip(logits_BV.argmax(dim=-1).tolist(), is_sane, strict=True)]
    scaled_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)).cpu().double() / temperature
    return [
        int(torch.multinomial(torch.softmax(row_V.float(), dim=-1), 1, generator=generator)) if sane else None
        for row_V, generator, sane in zip(scaled_BV, generators, is_sane, strict=True)
    ]


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """[B, T] tokens that end together, and [B] how many of padding each row begins with."""
    longest = max(map(len, prompts))
    rows = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    return torch.tensor(rows), torch.tensor([longest - len(prompt) for prompt in prompts])


def _forbidden(sampling: Sampling, vocab_size: int) -> Tensor:
    forbidden_V = torch.arange(vocab_size) >= sampling.vocab_size
    forbidden_V[[token for token in sampling.never_sampled if token < vocab_size]] = True
    return forbidden_V
