"""Goes on with a prompt, token by token, over a key-value cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from savant_ray.model.transformer import UniversalTransformer


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Ids from `vocab_size` on and `never_sampled` have probability 0."""

    vocab_size: int  # of the tokenizer; the model's may be larger
    end_of_document: int
    never_sampled: frozenset[int]
    max_new_tokens: int = 300
    temperature: float = 0.6  # 0 = the likeliest token
    seed: int = 0


@torch.no_grad()
def generate(
    model: UniversalTransformer, prompt: Sequence[int], sampling: Sampling, n_loops: int | None = None
) -> Iterator[int]:
    """Yields new token ids until the end of the document (not yielded) or `max_new_tokens`.

    The choice is a function of (weights, prompt, sampling) alone. Memory grows with the tokens in global loops only.

    A model whose numbers are none any more (NaN) says nothing.

    Raises:
        ValueError: the prompt has no tokens.
    """
    if not prompt:
        raise ValueError("the prompt has no tokens")
    device = model.head.weight.device
    forbidden_V = _forbidden(sampling, model.config.vocab_size).to(device)
    generator = torch.Generator().manual_seed(sampling.seed)
    cache = model.new_cache(n_loops)
    new_tokens = list(prompt)
    for _ in range(sampling.max_new_tokens):
        logits_V = model.decode(torch.tensor([new_tokens], device=device), cache, n_loops)[0].float()
        if not logits_V.isfinite().all():  # the model has diverged and has nothing to say
            return
        token = choose(logits_V.masked_fill(forbidden_V, float("-inf")), sampling.temperature, generator)
        if token == sampling.end_of_document:
            return
        yield token
        new_tokens = [token]


def choose(logits_V: Tensor, temperature: float, generator: torch.Generator) -> int:
    """One token id from the logits; drawn on the CPU, so that every device draws alike."""
    if temperature == 0:
        return int(logits_V.argmax())
    probabilities = torch.softmax(logits_V.cpu() / temperature, dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _forbidden(sampling: Sampling, vocab_size: int) -> Tensor:
    forbidden_V = torch.arange(vocab_size) >= sampling.vocab_size
    forbidden_V[[token for token in sampling.never_sampled if token < vocab_size]] = True
    return forbidden_V
