"""One optimizer step from this rank's share of the effective batch.

Losses are SUMMED over tokens, gradients and sums travel in one all-reduce, and the division by the global number of
tokens comes last. So the result does not depend on how the sequences were split over ranks and micro-batches, and a
micro-batch that is left out needs no correction anywhere.

Shapes: B sequences of a micro-batch, T time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from savant_ray.model.loss import IGNORED, cross_entropy_sum, next_token_targets
from savant_ray.optim.gradients import clip_to_mean
from savant_ray.training.precision import autocast
from savant_ray.training.ranks import add_up
from savant_ray.training.state import TrainingState

LOSS, TOKENS, SKIPPED, STOP, ABANDONED = range(5)  # the sums behind the gradients

GraceLeft = Callable[[], float | None]  # None while nobody wishes to stop, then the seconds that are left for it


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
    abandoned: bool  # and the step would have outlasted the grace period: nothing has changed
    skipped_here: tuple[Skipped, ...]


def take_step(
    state: TrainingState, share: Sequence[MicroBatch], learning_rate: float, gradient_clip: float, grace_left: GraceLeft
) -> StepResult:
    """Accumulates, reduces, updates: collective, so every rank calls it once per step, whatever its share.

    A stop does not cut the step short, unless the rest of its accumulation would outlast the grace period on some rank.
    """
    state.gradients.zero()
    skipped, abandoned = accumulate(state, share, grace_left)
    sums = state.gradients.sums
    sums[SKIPPED], sums[STOP], sums[ABANDONED] = len(skipped), float(grace_left() is not None), float(abandoned)
    add_up(state.gradients.flat)
    loss, tokens, n_skipped, stops, gave_up = sums.tolist()
    norm = clip_to_mean(state.gradients.gradients, tokens, gradient_clip).item() if tokens and not gave_up else math.nan
    updated = math.isfinite(norm)
    if updated:
        update(state, learning_rate)
    return StepResult(
        loss=loss / tokens if tokens else math.nan,
        tokens=int(tokens),
        grad_norm=norm,
        skipped=int(n_skipped),
        updated=updated,
        stop=stops > 0,
        abandoned=gave_up > 0,
        skipped_here=tuple(skipped),
    )


def accumulate(
    state: TrainingState, share: Sequence[MicroBatch], grace_left: GraceLeft
) -> tuple[list[Skipped], bool]:
    """Adds the share's gradients, loss and tokens to the buffer; returns what was left out, and whether it gave up."""
    skipped: list[Skipped] = []
    started = time.perf_counter()
    for done, micro_batch in enumerate(share):
        if outlasts(grace_left(), time.perf_counter() - started, done, len(share)):
            return skipped, True
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
    return skipped, False


def outlasts(grace_left: float | None, elapsed: float, done: int, total: int) -> bool:
    """Whether `total` micro-batches, `done` of which took `elapsed` seconds, take longer than what is left, if limited."""
    if grace_left is None:
        return False
    remaining = elapsed / done * (total - done) if done else 0.0
    return remaining > grace_left


def update(state: TrainingState, learning_rate: float) -> None:
    """One optimizer update from the buffer's gradients."""
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    state.optimizer.step()
