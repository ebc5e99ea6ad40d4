"""One optimizer step from this rank's share of the effective batch.

Losses are SUMMED over tokens, gradients and sums travel in one all-reduce, and the division by the global number of
tokens comes last. So the result does not depend on how the sequences were split over ranks and micro-batches, and a
micro-batch that is left out needs no correction anywhere. What does not fit under the memory cap on one rank is undone on
all: nothing of a step is applied before its end, so it can begin anew with less at once (`training/fitting.py`).

Shapes: B sequences of a micro-batch, T time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from savant_ray.model.loss import IGNORED, cross_entropy_sum, next_token_targets
from savant_ray.optim.gradients import clip_to_mean
from savant_ray.training.efficiency import synchronize
from savant_ray.training.fitting import none_on_oom, raise_memory_cap_error_on_oom
from savant_ray.training.micro_batch import MicroBatch
from savant_ray.training.precision import autocast
from savant_ray.training.ranks import add_up
from savant_ray.training.state import LOSS, SKIPPED, TOKENS, TrainingState

GraceLeft = Callable[[], float | None]  # None while nobody wishes to stop, then the seconds that are left for it


@dataclass(frozen=True)
class Skipped:
    """A micro-batch whose loss was not finite."""

    positions: tuple[int, ...]
    loss: float


@dataclass(frozen=True)
class StepSeconds:
    """Where the time of a step went."""

    compute: float  # forward and backward passes
    reduce: float  # waiting for the other ranks, too
    update: float


@dataclass(frozen=True)
class Accumulated:
    """What a rank's share came to."""

    skipped: tuple[Skipped, ...] = ()
    abandoned: bool = False
    no_room: bool = False


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
    no_room: bool  # some rank ran out of device memory: nothing has changed
    skipped_here: tuple[Skipped, ...]
    seconds: StepSeconds


def take_step(
    state: TrainingState, share: Sequence[MicroBatch], learning_rate: float, gradient_clip: float, grace_left: GraceLeft
) -> StepResult:
    """Accumulates, reduces, updates: collective, so every rank calls it once per step, whatever its share.

    A stop does not cut the step short, unless the rest of its accumulation would outlast the grace period on some rank.

    Raises:
        MemoryCapError: the device has no memory for reducing the gradients or updating the weights.
    """
    started = time.perf_counter()
    state.gradients.zero()
    here = accumulate(state, share, grace_left)
    sums = state.gradients.sums
    flags = [len(here.skipped), grace_left() is not None, here.abandoned, here.no_room]
    sums[SKIPPED:] = torch.tensor(flags, dtype=sums.dtype)
    synchronize(state.device)
    accumulated = time.perf_counter()
    with raise_memory_cap_error_on_oom(state.fit.limit_gb):
        add_up(state.gradients.flat)
        loss, tokens, n_skipped, stops, gave_up, no_room = sums.tolist()
        reduced = time.perf_counter()
        is_whole = tokens and not gave_up and not no_room
        norm = clip_to_mean(state.gradients.gradients, tokens, gradient_clip).item() if is_whole else math.nan
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
        no_room=no_room > 0,
        skipped_here=here.skipped,
        seconds=StepSeconds(accumulated - started, reduced - accumulated, time.perf_counter() - reduced),
    )


def accumulate(state: TrainingState, share: Sequence[MicroBatch], grace_left: GraceLeft) -> Accumulated:
    """Adds the share's gradients, loss and tokens to the buffer, as much at once as `state.fit` says."""
    micro_batches = [part for micro_batch in share for part in micro_batch.parts(state.fit.rows)]
    skipped: list[Skipped] = []
    started = time.perf_counter()
    for done, micro_batch in enumerate(micro_batches):
        if outlasts(grace_left(), time.perf_counter() - started, done, len(micro_batches)):
            return Accumulated(tuple(skipped), abandoned=True)
        loss = none_on_oom(partial(add_gradients, state, micro_batch), state.device)
        if loss is None:
            return Accumulated(tuple(skipped), no_room=True)
        if not math.isfinite(loss):
            skipped.append(Skipped(micro_batch.positions, loss))
    return Accumulated(tuple(skipped))


def add_gradients(state: TrainingState, micro_batch: MicroBatch) -> float:
    """One forward and backward pass into the buffer; a loss that is not finite adds nothing. Returns the loss sum.

    The micro-batch is moved to the device here, and not earlier, so that running out of memory is handled in one place.
    """
    micro_batch = micro_batch.to(state.device)
    targets_BT = next_token_targets(micro_batch.tokens_BT, micro_batch.document_ids_BT)
    with state.gradients.detached(), autocast(state.precision, state.device):
        x_BTD = state.model.hidden(micro_batch.tokens_BT, micro_batch.document_ids_BT)
        loss = cross_entropy_sum(x_BTD, state.model.head.weight, targets_BT)
    value = loss.item()
    if math.isfinite(value):
        loss.backward()
        state.gradients.sums[LOSS] += value
        state.gradients.sums[TOKENS] += (targets_BT != IGNORED).sum()
    return value


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
