"""Loss of a model on held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from savant_ray.model.loss import IGNORED, cross_entropy_sum
from savant_ray.model.transformer import UniversalTransformer
from savant_ray.training.step import MicroBatch


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
    device. `memory_limit_gb` is that of `cross_entropy_sum`, GiB; `training_graph` is that of
    `UniversalTransformer.loop_states`.
    """
    sums = torch.zeros(2, dtype=torch.float64)
    for micro_batch in micro_batches:
        targets_BT = micro_batch.targets()
        hidden_BTD = model.hidden_states(micro_batch.tokens_BT, micro_batch.document_ids_BT, n_loops, training_graph)
        loss = cross_entropy_sum(hidden_BTD, model.head.weight, targets_BT, memory_limit_gb)
        sums += torch.tensor([loss.item(), (targets_BT != IGNORED).sum().item()], dtype=torch.float64)
    return sums


def bits_per_byte(nats_per_token: float, target_tokens: int, trained_bytes: int) -> float:
    """Convert a loss per token to bits per UTF-8 byte, which can be compared across tokenizers.

    `target_tokens` and `trained_bytes` count the complete text except for its masked parts; without bytes, return NaN.
    """
    return nats_per_token / math.log(2) * target_tokens / trained_bytes if trained_bytes else math.nan
