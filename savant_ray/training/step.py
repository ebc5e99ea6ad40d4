"""One optimizer step from this rank's local batch: its micro-batches of the global (effective) batch.

Losses are SUMMED over tokens, gradients and sums are reduced over all ranks in one all-reduce, and the division by the
global number of tokens comes last. The result therefore does not depend on how the sequences were divided into ranks and
micro-batches, and a skipped micro-batch needs no correction. Nothing of a step is applied before its end, so when one rank
runs out of device memory, all ranks can discard the step and repeat it with smaller micro-batches.

Nothing between the micro-batches waits for a GPU's results: their losses are read once, after the last one. If the loss of
a micro-batch is not finite, its rank discards the sums and accumulates the other micro-batches again. To mask its gradients
instead, each micro-batch would need a buffer of its own (4 bytes a weight) and another pass over memory, since gradients
that have been added to the sums cannot be removed.

Shapes: B sequences of a micro-batch, T time, N sequences of a local batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from savant_ray.config import Config
from savant_ray.data.token_cache import Sequences
from savant_ray.model.loss import IGNORED, cross_entropy_sum, next_token_targets
from savant_ray.optim.gradients import clip_to_mean
from savant_ray.training.device import (
    LaunchQueue,
    autocast,
    none_on_oom,
    raise_memory_cap_error_on_oom,
    synchronize,
)
from savant_ray.training.efficiency import document_lengths, useful_flops
from savant_ray.training.profiling import region
from savant_ray.training.progress import PROGRESS
from savant_ray.training.state import LOSS, SKIPPED, TOKENS, TrainingState

GraceLeft = Callable[[], float | None]  # None until a stop is requested, then the seconds left of the grace period


@dataclass(frozen=True)
class MicroBatch:
    """Sequences of one forward and backward pass."""

    tokens_BT: Tensor
    document_ids_BT: Tensor
    is_trained_BT: Tensor  # bool: the loss includes the prediction of this token
    positions: tuple[int, ...]  # in the global order
    useful_flops: float = 0.0  # of the forward and backward pass

    def parts(self, rows: int) -> Iterator[MicroBatch]:
        """Yield the same sequences in micro-batches of at most `rows`, whose `useful_flops` are not set."""
        for start in range(0, len(self.tokens_BT), rows):
            part = slice(start, start + rows)
            yield MicroBatch(
                self.tokens_BT[part], self.document_ids_BT[part], self.is_trained_BT[part], self.positions[part]
            )

    def to(self, device: torch.device) -> MicroBatch:
        """Return the micro-batch on `device`."""
        return replace(
            self,
            tokens_BT=self.tokens_BT.to(device),
            document_ids_BT=self.document_ids_BT.to(device),
            is_trained_BT=self.is_trained_BT.to(device),
        )

    def targets(self) -> Tensor:
        """Return the targets of the loss `[B, T]`, as `next_token_targets` does."""
        return next_token_targets(self.tokens_BT, self.document_ids_BT, self.is_trained_BT)


def micro_batches(sequences: Sequences, positions: np.ndarray, config: Config) -> list[MicroBatch]:
    """Copy sequences `[N, T]` into micro-batches of at most `training.batch_size` in host memory."""
    size = config.training.batch_size
    parts = [slice(start, start + size) for start in range(0, len(positions), size)]
    return [
        MicroBatch(
            tokens_BT=torch.from_numpy(sequences.tokens[part].copy()),
            document_ids_BT=torch.from_numpy(sequences.document_ids[part].copy()),
            is_trained_BT=torch.from_numpy(sequences.is_trained[part].copy()),
            positions=tuple(int(p) for p in positions[part]),
            useful_flops=useful_flops(
                config.model,
                document_lengths(sequences.document_ids[part]),
                masked_tokens=int((~sequences.is_trained[part]).sum()),
            ),
        )
        for part in parts
    ]


@dataclass(frozen=True)
class Skipped:
    """A micro-batch that was skipped because its loss was not finite."""

    positions: tuple[int, ...]
    loss: float


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of a step by phase."""

    compute: float  # forward and backward passes
    reduce: float  # the all-reduce, including the wait for other ranks
    update: float


@dataclass(frozen=True)
class Accumulated:
    """How the accumulation of a local batch ended."""

    skipped: tuple[Skipped, ...] = ()
    abandoned: bool = False
    out_of_memory: bool = False


@dataclass(frozen=True)
class StepResult:
    """Result of a step, equal on all ranks except for `skipped_locally` and `seconds`."""

    loss: float  # nats per target token
    tokens: int  # target tokens
    grad_norm: float  # before clipping; NaN without an update
    skipped: int  # micro-batches, all ranks
    updated: bool
    stop: bool  # a stop was requested on some rank
    abandoned: bool  # the step would have outlasted the grace period on some rank; nothing has changed
    out_of_memory: bool  # some rank ran out of device memory; nothing has changed
    skipped_locally: tuple[Skipped, ...]
    seconds: StepSeconds


def take_step(
    state: TrainingState,
    local_batch: Sequence[MicroBatch],
    learning_rate: float,
    gradient_clip: float,
    grace_left: GraceLeft,
) -> StepResult:
    """Accumulate gradients, reduce them over all ranks, and update the weights.

    Collective: every rank calls it once per step, also with an empty local batch. The tensors of the local batch are on the
    state's device. A stop request does not interrupt the step unless the rest of the accumulation would outlast the grace
    period on some rank.

    Raises:
        MemoryCapError: the device has no memory for reducing the gradients or updating the weights.
    """
    started = time.perf_counter()
    parts = [part for micro_batch in local_batch for part in micro_batch.parts(state.fit.rows)]
    accumulated = accumulate(state, parts, grace_left)
    sums = state.gradients.sums
    flags = [len(accumulated.skipped), grace_left() is not None, accumulated.abandoned, accumulated.out_of_memory]
    sums[SKIPPED:] = torch.tensor(flags, dtype=sums.dtype)
    synchronize(state.device)
    computed = time.perf_counter()
    with raise_memory_cap_error_on_oom(state.fit.limit_gb):
        with region("all-reduce"):
            all_reduce_sum(state.gradients.flat)
        loss, tokens, n_skipped, stops, abandoned, out_of_memory = sums.tolist()
        reduced = time.perf_counter()
        is_complete = tokens and not abandoned and not out_of_memory
        norm = clip_to_mean(state.gradients.gradients, tokens, gradient_clip).item() if is_complete else math.nan
        updated = math.isfinite(norm)
        if updated:
            with region("update"):
                update(state, learning_rate)
    return StepResult(
        loss=loss / tokens if tokens else math.nan,
        tokens=int(tokens),
        grad_norm=norm,
        skipped=int(n_skipped),
        updated=updated,
        stop=stops > 0,
        abandoned=abandoned > 0,
        out_of_memory=out_of_memory > 0,
        skipped_locally=accumulated.skipped,
        seconds=StepSeconds(computed - started, reduced - computed, time.perf_counter() - reduced),
    )


def accumulate(
    state: TrainingState, parts: Sequence[MicroBatch], grace_left: GraceLeft, skipped: tuple[Skipped, ...] = ()
) -> Accumulated:
    """Set the buffer to gradients, loss and token count of the micro-batches; leave out those whose loss is not finite.

    `skipped` are micro-batches that have been left out before.
    """
    state.gradients.zero()
    queue, losses, started = LaunchQueue(state.device), [], time.perf_counter()
    for micro_batch in parts:
        queue.wait_for_room()
        if outlasts(grace_left(), time.perf_counter() - started, queue.finished, len(parts)):
            return Accumulated(skipped, abandoned=True)
        loss = none_on_oom(partial(add_gradients, state, micro_batch), state.device)
        if loss is None:
            return Accumulated(skipped, out_of_memory=True)
        losses.append(loss)
        queue.add()
    values = none_on_oom(lambda: torch.stack(losses).tolist() if losses else [], state.device)
    if values is None:
        return Accumulated(skipped, out_of_memory=True)
    bad = [Skipped(part.positions, loss) for part, loss in zip(parts, values, strict=True) if not math.isfinite(loss)]
    if not bad:
        return Accumulated(skipped)
    finite = [part for part, loss in zip(parts, values, strict=True) if math.isfinite(loss)]
    return accumulate(state, finite, grace_left, (*skipped, *bad))


def add_gradients(state: TrainingState, micro_batch: MicroBatch) -> Tensor:
    """Launch one forward and backward pass into the buffer and return the loss sum in nats, a 0-d tensor on the device."""
    with region("forward"), state.gradients.detached(), autocast(state.precision, state.device):
        x_BTD = state.model.hidden_states(micro_batch.tokens_BT, micro_batch.document_ids_BT)
        targets_BT = micro_batch.targets()
        loss = cross_entropy_sum(x_BTD, state.model.head.weight, targets_BT, state.fit.limit_gb)
    with region("backward"):
        loss.backward()
    state.gradients.sums[LOSS] += loss.detach()
    state.gradients.sums[TOKENS] += (targets_BT != IGNORED).sum()
    return loss.detach()


def outlasts(grace_left: float | None, elapsed: float, done: int, total: int) -> bool:
    """Return whether the remaining micro-batches take longer than `grace_left` seconds (None = no limit).

    The estimate extrapolates the `elapsed` seconds that `done` of `total` micro-batches took.
    """
    if grace_left is None:
        return False
    remaining = elapsed / done * (total - done) if done else 0.0
    return remaining > grace_left


def update(state: TrainingState, learning_rate: float) -> None:
    """Update the weights once from the gradients in the buffer."""
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    state.optimizer.step()


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum over all ranks in place; collective."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        PROGRESS.enter_collective()
        dist.all_reduce(values)
    return values


def any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether the flag is set on some rank; collective."""
    return bool(all_reduce_sum(torch.tensor(float(flag), device=device)))


def broadcast_from_rank_0(decide: Callable[[], str | None]) -> str | None:
    """Call `decide` on rank 0 and return its result on every rank; collective."""
    if not dist.is_initialized():
        return decide()
    decision = [decide() if dist.get_rank() == 0 else None]
    PROGRESS.enter_collective()
    dist.broadcast_object_list(decision, src=0)
    return decision[0]
