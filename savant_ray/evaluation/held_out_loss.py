"""Loss of a model on held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from savant_ray.model.transformer import UniversalTransformer
from savant_ray.training.step import MicroBatch, loss_and_tokens


@torch.no_grad()
def loss_sums(
    model: UniversalTransformer,
    micro_batches: Iterable[MicroBatch],
    n_loops: int | None = None,
    memory_limit_gb: float = 10.0,
    training_graph: bool = False,
) -> Tensor:
    """Return [sum of token losses in nats, number of target tokens] in fp64.

    The losses of the micro-batches are fp32. fp64 has 29 more bits in the mantissa, so their sum is exact (unless they
    differ by many orders of magnitude) and does not depend on their order. The tensors of `micro_batches` are on the model's
    device. `memory_limit_gb` and `training_graph` are those of `loss_and_tokens`.
    """
    sums = torch.zeros(2, dtype=torch.float64)
    for micro_batch in micro_batches:
        loss, tokens = loss_and_tokens(model, micro_batch, memory_limit_gb, n_loops, training_graph)
        sums += torch.tensor([loss.item(), tokens.item()], dtype=torch.float64)
    return sums


def bits_per_byte(nats_per_token: float, target_tokens: int, trained_bytes: int) -> float:
    """Convert a loss per token to bits per UTF-8 byte, which can be compared across tokenizers.

    `target_tokens` and `trained_bytes` count the complete text except for its masked parts; without bytes, return NaN.
    """
    return nats_per_token / math.log(2) * target_tokens / trained_bytes if trained_bytes else math.nan
