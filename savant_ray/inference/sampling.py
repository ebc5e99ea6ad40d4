"""The choice of the next token, on the device and without waiting for it.

Random numbers are a function of the seed and of the index of the new token, computed in integers. The same seed therefore
draws the same tokens on every device and in a batch of any size, as long as the logits agree.

Shapes: B prompts, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from savant_ray.data.tokenizer import Tokenizer

UINT64_MAX = 2**64 - 1


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


def forbidden_ids(sampling: Sampling, vocab_size: int) -> Tensor:
    """Return a mask `[V]` of the ids that are never sampled."""
    forbidden_V = torch.arange(vocab_size) >= sampling.vocab_size
    forbidden_V[[token for token in sampling.never_sampled if token < vocab_size]] = True
    return forbidden_V


def most_likely(logits_BV: Tensor, forbidden_V: Tensor) -> Tensor:
    """Return the most likely allowed token of each row, `[B]`."""
    return logits_BV.masked_fill(forbidden_V, float("-inf")).argmax(dim=-1)


def drawn(logits_BV: Tensor, forbidden_V: Tensor, temperature: Tensor, uniform: Tensor) -> Tensor:
    """Return a random allowed token of each row, `[B]`: the first whose cumulative probability exceeds `uniform`.

    Computed in fp64 after subtracting the maximum, so that no temperature above 0 overflows.

    Args:
        logits_BV: finite logits.
        forbidden_V: True for tokens with probability 0.
        temperature: an fp64 tensor without dimensions on the same device. A GPU replaces division by a Python number by
            multiplication with its reciprocal, which is infinite for the smallest temperatures.
        uniform: fp64 tensor in [0, 1) of one element, on the same device.
    """
    allowed_BV = logits_BV.double().masked_fill(forbidden_V, float("-inf"))
    mass_BV = ((allowed_BV - allowed_BV.amax(dim=-1, keepdim=True)) / temperature).exp()
    cumulative_BV = mass_BV.cumsum(dim=-1)
    # A parallel sum may grow by a rounding error at a token of mass 0.
    exceeds_BV = (cumulative_BV > uniform * cumulative_BV[:, -1:]) & (mass_BV > 0)
    return exceeds_BV.byte().argmax(dim=-1)


def are_finite(logits_BV: Tensor) -> Tensor:
    """Return whether all logits of a row are finite, `[B]`; reads them once."""
    low_B, high_B = logits_BV.aminmax(dim=-1)
    return low_B * 0 == high_B * 0  # infinity * 0 is NaN, and so is NaN * 0


def uniform_number(seed: int, index: int) -> float:
    """Return random number `index` of a seed, in [0, 1): SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), upper 53 bits."""
    return (_splitmix64(_splitmix64(seed, 0), index) >> 11) * 2.0**-53


def _splitmix64(seed: int, index: int) -> int:
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & UINT64_MAX
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & UINT64_MAX
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & UINT64_MAX
    return z ^ (z >> 31)
