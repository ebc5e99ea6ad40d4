"""The choice of the next token, computed on the device without synchronization.

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


def logit_bias(sampling: Sampling, vocab_size: int) -> Tensor:
    """Return `[V]`: minus infinity for ids that are never sampled, 0 for others; to be added to logits."""
    bias_V = torch.zeros(vocab_size)
    bias_V[sampling.vocab_size :] = float("-inf")
    bias_V[[token for token in sampling.never_sampled if token < vocab_size]] = float("-inf")
    return bias_V


def sample_tokens(logits_BV: Tensor, temperature_B1: Tensor, uniform_B1: Tensor) -> Tensor:
    """Return a random token of each row, `[B]`: the first whose cumulative probability exceeds `uniform_B1`.

    Computed in fp64 after subtracting the maximum, so that no temperature above 0 overflows.

    Args:
        logits_BV: a logit of minus infinity is a probability of 0.
        temperature_B1: fp64; for 0 the token is arbitrary. A tensor of any shape that broadcasts, not a Python number: a GPU
            multiplies by the reciprocal of a number, which is infinite for the smallest temperatures.
        uniform_B1: in [0, 1), fp64.
    """
    logits_BV = logits_BV.double()
    mass_BV = ((logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / temperature_B1).exp()
    cumulative_BV = mass_BV.cumsum(dim=-1)
    # A parallel sum may grow by a rounding error where the mass is 0.
    exceeds_BV = (cumulative_BV > uniform_B1 * cumulative_BV[:, -1:]) & (mass_BV > 0)
    return exceeds_BV.byte().argmax(dim=-1)


def are_finite(logits_BV: Tensor) -> Tensor:
    """Return whether all logits of a row are finite, `[B]`."""
    # Infinity times 0 is NaN. `aminmax` and `isfinite` are 20 times slower on a CPU.
    return logits_BV.amax(dim=-1) * 0 == logits_BV.amin(dim=-1) * 0


def uniform_number(seed: int, index: int) -> float:
    """Return random number `index` of a seed, in [0, 1): SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), upper 53 bits."""
    return (_splitmix64(_splitmix64(seed, 0), index) >> 11) * 2.0**-53


def _splitmix64(seed: int, index: int) -> int:
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & UINT64_MAX
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & UINT64_MAX
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & UINT64_MAX
    return z ^ (z >> 31)
