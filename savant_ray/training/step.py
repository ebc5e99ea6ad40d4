"""One optimizer step from this rank's share of the effective batch.

Losses are SUMMED over tokens, gradients and sums travel in one all-reduce, and the division by the global number of
tokens comes last. So the result does not depend on how the sequences were split over ranks and micro-batches, and a
micro-batch that is left out needs no correction anywhere.

Shapes: B sequences of a micro-batch, T time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from savant_ray.model.loss import IGNORED, cross_entropy_sum, next_token_targets
from savant_ray.optim.gradients import clip_to_mean
from savant_ray.training.precision import autocast
from savant_ray.training.state import TrainingState

LOSS, TOKENS, SKIPPED, STOP = range(4)  # the sums behind the gradients


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that go through one forward and backward pass."""

    tokens_BT: Tensor
    document_ids_BT: Tensor
    positions: tuple[int, ...]  # in the global order


@dataclass(frozen=True)
class Skipped:
    """A micro-batch whose loss was not finite."""

    positions: tuple[int, ...]
    loss: float


@dataclass(frozen=True)
class StepResult:
    """The same on every rank, but for `skipped_here`."""

    loss: float  # nats per target token
    tokens: int
    grad_norm: float
    skipped: int  # micro-batches, all ranks
    updated: bool
    stop: bool  # some rank was asked to stop
    skipped_here: tuple[Skipped, ...]


def take_step(
    state: TrainingState, share: Sequence[MicroBatch], learning_rate: float, gradient_clip: float, stop: bool
) -> StepResult:
    """Accumulates, reduces, updates: collective, so every rank calls it once per step, whatever its share."""
    state.gradients.zero()
    skipped = accumulate(state, share)
    sums = state.gradients.sums
    sums[SKIPPED], sums[STOP] = len(skipped), float(stop)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(state.gradients.flat)
    loss, tokens, n_skipped, stops = sums.tolist()
    norm = clip_to_mean(state.gradients.gradients, tokens, gradient_clip).item() if tokens else math.nan
    updated = math.isfinite(norm)
    if updated:
        update(state, learning_rate)
    mean_loss = loss / tokens if tokens else math.nan
    return StepResult(mean_loss, int(tokens), norm, int(n_skipped), updated, stops > 0, tuple(skipped))


def accumulate(state: TrainingState, share: Sequence[MicroBatch]) -> list[Skipped]:
    """Adds the share's gradients, loss and tokens to the buffer; returns what was left out."""
    skipped = []
    for micro_batch in share:
        targets_BT = next_token_targets(micro_batch.tokens_BT, micro_batch.document_ids_BT)
        with autocast(state.precision, state.device):
            x_BTD = state.model.hidden(micro_batch.tokens_BT, micro_batch.document_ids_BT)
            loss = cross_entropy_sum(x_BTD, state.model.head.weight, targets_BT)
        value = loss.item()
        if not math.isfinite(value):
            skipped.append(Skipped(micro_batch.positions, value))
            continue
        loss.backward()
        state.gradients.sums[LOSS] += value
        state.gradients.sums[TOKENS] += (targets_BT != IGNORED).sum()
    return skipped


def update(state: TrainingState, learning_rate: float) -> None:
    """One optimizer update from the buffer's gradients."""
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    state.optimizer.step()
