"""Autoregressive generation with a key-value cache.

Shapes: B prompts, T time, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from savant_ray.data.tokenizer import Tokenizer
from savant_ray.model.transformer import UniversalTransformer

# Attention scores per head and prompt. Longer prompts are processed in parts, because scores grow with the square of the
# length.
MAX_PROMPT_SCORES = 1 << 22


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. Ids from `vocab_size` on and those in `never_sampled` have probability 0."""

    vocab_size: int  # of the tokenizer; that of the model may be larger
    end_of_document: int
    never_sampled: frozenset[int]
    max_new_tokens: int = 300
    temperature: float = 0.6  # 0: always the most likely token
    seed: int = 0

    @classmethod
    def for_tokenizer(cls, tokenizer: Tokenizer, max_new_tokens: int, temperature: float, seed: int = 0) -> Self:
        """Return the parameters for generating text of this tokenizer."""
        vocab_size, end, never = tokenizer.vocab_size, tokenizer.end_of_document, tokenizer.never_sampled
        return cls(vocab_size, end, never, max_new_tokens, temperature, seed)


def generate(
    model: UniversalTransformer, prompt: Sequence[int], sampling: Sampling, n_loops: int | None = None
) -> Iterator[int]:
    """Yield new token ids until the end of the document (not yielded) or `max_new_tokens`.

    The ids depend on weights, prompt and sampling parameters only. Memory grows with the number of tokens in global loops
    only. Generation also ends when the logits are not finite.

    Raises:
        ValueError: the prompt has no tokens.
    """
    for tokens in _next_tokens(model, [prompt], sampling, n_loops):
        yield from (token for token in tokens if token is not None)


def generate_many(
    model: UniversalTransformer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    n_loops: int | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> list[list[int]]:
    """Return what `generate` yields for each prompt, computed as one batch; equal except for rounding.

    The answers end early when `stop_requested` returns True.

    Raises:
        ValueError: a prompt has no tokens.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    for tokens in _next_tokens(model, prompts, sampling, n_loops):
        if stop_requested():
            break
        for answer, token in zip(answers, tokens, strict=True):
            answer.extend([] if token is None else [token])
    return answers


@torch.no_grad()
def _next_tokens(
    model: UniversalTransformer, prompts: Sequence[Sequence[int]], sampling: Sampling, n_loops: int | None
) -> Iterator[list[int | None]]:
    """Yield the next token of each prompt, None for those that have ended, until all have ended."""
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
    rows = max(1, MAX_PROMPT_SCORES // tokens_BT.shape[1])
    for _ in range(sampling.max_new_tokens):
        *parts, last_BT = tokens_BT.to(device).split(rows, dim=1)
        for part_BT in parts:
            model.decode(part_BT, cache, n_loops)
        logits_BV = model.decode(last_BT, cache, n_loops).float()
        is_finite = logits_BV.isfinite().all(dim=-1).tolist()  # not after the model has diverged
        logits_BV = logits_BV.masked_fill(forbidden_V, float("-inf"))
        chosen = choose(logits_BV, sampling.temperature, generators, is_finite)
        ended = [done or token in (None, sampling.end_of_document) for done, token in zip(ended, chosen, strict=True)]
        if all(ended):
            return
        yield [None if done else token for done, token in zip(ended, chosen, strict=True)]
        tokens_BT = torch.tensor([[token or 0] for token in chosen])


def choose(
    logits_BV: Tensor, temperature: float, generators: Sequence[torch.Generator], is_finite: Sequence[bool]
) -> list[int | None]:
    """Return a token id for each row with finite logits, else None; drawn on the CPU, so the same on every device.

    The maximum is subtracted and the division is done in fp64, so that no temperature above 0 overflows.
    """
    if temperature == 0:
        likeliest = logits_BV.argmax(dim=-1).tolist()
        return [token if finite else None for token, finite in zip(likeliest, is_finite, strict=True)]
    scaled_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)).cpu().double() / temperature
    return [
        int(torch.multinomial(torch.softmax(row_V.float(), dim=-1), 1, generator=generator)) if finite else None
        for row_V, generator, finite in zip(scaled_BV, generators, is_finite, strict=True)
    ]


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return tokens `[B, T]`, padded on the left, and the number of padding tokens of each row `[B]`."""
    longest = max(map(len, prompts))
    rows = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    return torch.tensor(rows), torch.tensor([longest - len(prompt) for prompt in prompts])


def _forbidden(sampling: Sampling, vocab_size: int) -> Tensor:
    """Return a mask `[V]` of the ids that are never sampled."""
    forbidden_V = torch.arange(vocab_size) >= sampling.vocab_size
    forbidden_V[[token for token in sampling.never_sampled if token < vocab_size]] = True
    return forbidden_V
