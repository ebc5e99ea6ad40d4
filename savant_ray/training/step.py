"""One optimizer step from a rank's local batch: the micro-batches of the step that this rank computes.

Losses are SUMMED over tokens, gradients and sums are reduced over all ranks, and the division by the global number of tokens
comes last. The result therefore does not depend on how the sequences were divided among ranks, and a skipped micro-batch
needs no correction. Nothing of a step is applied before its end, so when one rank runs out of device memory, all ranks can
discard the step and repeat it with less memory (`BatchFit.smaller`).

With `training.deterministic`, the result has the same bits on any number of ranks. Micro-batch i of a step has the same
sequences, whichever rank computes it. Its gradients are computed separately and set to zero if its loss is not finite, and
the gradients of all micro-batches are added in a fixed binary tree (`optim/tree_sum.py`), which continues across the ranks
(`training/reduction.py`). On one rank that takes at most log2(micro-batches) + 1 further buffers of 4 bytes a weight, and
another pass over memory for each micro-batch.

Otherwise all micro-batches of a rank add to one buffer, and one all-reduce adds those of all ranks. If the loss of a
micro-batch is not finite, its rank discards the sums and accumulates the other micro-batches again.

On a GPU a few micro-batches are in flight at a time (`LaunchQueue`), and their losses are read once, after the last one.
Before the reduction the ranks exchange a few integers (`RankStatus`). If one of them abandons the step or runs out of
memory, all skip the reduction.

Shapes: B sequences of a micro-batch, T time, N sequences of a local batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from savant_ray.config import Config
from savant_ray.data.token_cache import Sequences
from savant_ray.model.loss import IGNORED, cross_entropy_sum, next_token_targets
from savant_ray.model.transformer import UniversalTransformer
from savant_ray.optim.tree_sum import Node
from savant_ray.training.device import (
    LaunchQueue,
    autocast,
    none_on_oom,
    raise_memory_cap_error_on_oom,
    synchronize,
)
from savant_ray.training.efficiency import document_lengths, useful_flops
from savant_ray.training.profiling import region
from savant_ray.training.reduction import all_reduce_sum, from_rank_0, gather, n_ranks, sum_trees
from savant_ray.training.spikes import Spike
from savant_ray.training.state import LOSS, TOKENS, TrainingState

GraceLeft = Callable[[], float | None]  # None until a stop is requested, then the seconds left of the grace period


@dataclass(frozen=True)
class MicroBatch:
    """Sequences of one forward and backward pass."""

    tokens_BT: Tensor
    document_ids_BT: Tensor
    is_trained_BT: Tensor  # bool: the loss includes the prediction of this token
    positions: tuple[int, ...]  # in the global order
    useful_flops: float = 0.0  # of the forward and backward pass
    index: int = 0  # among the micro-batches of the step, of all ranks

    def parts(self, rows: int) -> Iterator[MicroBatch]:
        """Yield the same sequences in micro-batches of at most `rows`, whose `useful_flops` and `index` are not set."""
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


def micro_batches(
    sequences: Sequences, positions: np.ndarray, config: Config, size: int | None = None, first_index: int = 0
) -> list[MicroBatch]:
    """Copy sequences `[N, T]` into micro-batches of at most `size` (None: `training.batch_size`) in host memory.

    `first_index` is the `MicroBatch.index` of the first one.
    """
    size = size or config.training.batch_size
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
            index=index,
        )
        for index, part in enumerate(parts, first_index)
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
    reduce: float  # sums over all ranks, including the wait for other ranks
    # Clipping and update. On a GPU it ends when the update's kernels are launched, which usually run in the next `compute`.
    update: float


@dataclass(frozen=True)
class Accumulated:
    """How the accumulation of a local batch ended."""

    skipped: tuple[Skipped, ...] = ()
    abandoned: bool = False
    out_of_memory: bool = False


class RankStatus(NamedTuple):
    """What the ranks exchange before the reduction: integers of 64 bits."""

    skipped: int  # micro-batches
    stop: int  # 1: a stop was requested from this rank
    abandoned: int
    out_of_memory: int
    first_index: int  # of the first micro-batch of the local batch
    n_micro_batches: int


@dataclass(frozen=True)
class StepResult:
    """Result of a step, equal on all ranks except for `skipped_locally` and `seconds`."""

    loss: float  # nats per target token; NaN without target tokens
    tokens: int  # target tokens
    grad_norm: float  # before clipping; NaN without target tokens
    skipped: int  # micro-batches, all ranks
    updated: bool
    stop: bool  # a stop was requested on some rank
    abandoned: bool  # the step would have outlasted the grace period on some rank; nothing has changed
    out_of_memory: bool  # some rank ran out of device memory; nothing has changed
    skipped_locally: tuple[Skipped, ...]
    seconds: StepSeconds
    spike: Spike | None = None  # whether or not it has updated the weights


def take_step(
    state: TrainingState,
    local_batch: Sequence[MicroBatch],
    learning_rate: float,
    gradient_clip: float,
    grace_left: GraceLeft,
    n_loops: int | None = None,
) -> StepResult:
    """Accumulate gradients with `n_loops` loops (None: `model.n_loops`), reduce them over all ranks, update the weights.

    Collective: every rank calls it once per step, even with an empty local batch. The tensors of the local batch are on the
    state's device. A stop request does not interrupt the step unless the rest of the accumulation would outlast the grace
    period on some rank.

    Raises:
        MemoryCapError: the device has no memory for reducing the gradients or updating the weights.
    """
    started = time.perf_counter()
    accumulate_local = accumulate_in_tree if state.settings.deterministic else accumulate
    accumulated = accumulate_local(state, local_batch, n_loops, grace_left)
    status = RankStatus(
        skipped=len(accumulated.skipped),
        stop=grace_left() is not None,
        abandoned=accumulated.abandoned,
        out_of_memory=accumulated.out_of_memory,
        first_index=local_batch[0].index if local_batch else 0,
        n_micro_batches=len(local_batch),
    )
    synchronize(state.device)
    computed = time.perf_counter()
    with raise_memory_cap_error_on_oom(state.batch_fit.limit_gb):
        ranks = [RankStatus(*row) for row in gather(status, state.device)]
        abandoned, out_of_memory = any(rank.abandoned for rank in ranks), any(rank.out_of_memory for rank in ranks)
        loss, tokens = (0.0, 0.0) if abandoned or out_of_memory else reduce_gradients(state, ranks)
        reduced = time.perf_counter()
        norm = clip(state.gradients.gradients, tokens, gradient_clip) if tokens else math.nan
        mean_loss = loss / tokens if tokens else math.nan
        spike = state.spike_window.find(mean_loss, norm) if math.isfinite(norm) else None
        updated = math.isfinite(norm) and (spike is None or state.settings.updates_on_spike)
        if updated:
            with region("update"):
                update(state, learning_rate)
    return StepResult(
        loss=mean_loss,
        tokens=int(tokens),
        grad_norm=norm,
        skipped=sum(rank.skipped for rank in ranks),
        updated=updated,
        stop=any(rank.stop for rank in ranks),
        abandoned=abandoned,
        out_of_memory=out_of_memory,
        skipped_locally=accumulated.skipped,
        seconds=StepSeconds(computed - started, reduced - computed, time.perf_counter() - reduced),
        spike=spike,
    )


def reduce_gradients(state: TrainingState, ranks: Sequence[RankStatus]) -> tuple[float, float]:
    """Add the accumulated gradients and sums of all ranks; return the sum of the losses and the number of target tokens.

    Collective.
    """
    with region("all-reduce"):
        if state.settings.deterministic:
            leaves = [range(rank.first_index, rank.first_index + rank.n_micro_batches) for rank in ranks]
            sum_trees(state.gradients.tree, leaves, state.gradients.flat)
        else:
            all_reduce_sum(state.gradients.flat)
        loss, tokens = state.gradients.sums.tolist()
    return loss, tokens


def clip(gradients: Tensor, tokens: float, max_norm: float) -> float:
    """Divide summed gradients by the tokens of all ranks, clip them to `max_norm`, and return their norm before clipping.

    Collective: all ranks use the norm of rank 0. On different processors the norms may differ by rounding, and near a limit
    one rank would skip an update, or rewind, and another would not.
    """
    norm = from_rank_0(torch.linalg.vector_norm(gradients) / tokens)
    gradients.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0) / tokens)
    return norm.item()


def allocate_reduction(state: TrainingState) -> None:
    """Reduce zeros, so that NCCL allocates its memory now. Collective."""
    state.gradients.flat.zero_()
    if state.settings.deterministic:
        rank = dist.get_rank() if dist.is_initialized() else 0
        state.gradients.tree.add(Node(rank, 1), state.gradients.flat)
    gather([0] * len(RankStatus._fields), state.device)
    reduce_gradients(state, [RankStatus(0, 0, 0, 0, index, 1) for index in range(n_ranks())])
    from_rank_0(state.gradients.sums[LOSS])


def accumulate_in_tree(
    state: TrainingState, local_batch: Sequence[MicroBatch], n_loops: int | None, grace_left: GraceLeft
) -> Accumulated:
    """Set the buffer's tree to the gradients and sums of the micro-batches, zeros for those without a finite loss."""
    state.gradients.tree.clear()
    losses, ended = launch(state.device, local_batch, partial(add_to_tree, state, n_loops=n_loops), grace_left)
    return ended or Accumulated(_not_finite(local_batch, losses))


def accumulate(
    state: TrainingState,
    local_batch: Sequence[MicroBatch],
    n_loops: int | None,
    grace_left: GraceLeft,
    skipped: tuple[Skipped, ...] = (),
) -> Accumulated:
    """Set the buffer to gradients, loss and token count of the micro-batches; leave out those whose loss is not finite.

    Each micro-batch is divided into parts of at most `BatchFit.rows` sequences. `skipped` are those that an earlier call
    has left out.
    """
    state.gradients.flat.zero_()
    parts = [part for micro_batch in local_batch for part in micro_batch.parts(state.batch_fit.rows)]
    losses, ended = launch(state.device, parts, partial(add_gradients, state, n_loops=n_loops), grace_left)
    if ended is not None:
        return replace(ended, skipped=skipped)
    bad = _not_finite(parts, losses)
    if not bad:
        return Accumulated(skipped)
    finite = [part for part, loss in zip(parts, losses, strict=True) if math.isfinite(loss)]
    return accumulate(state, finite, n_loops, grace_left, (*skipped, *bad))


def launch(
    device: torch.device,
    micro_batches: Sequence[MicroBatch],
    compute: Callable[[MicroBatch], Tensor],
    grace_left: GraceLeft,
) -> tuple[list[float], Accumulated | None]:
    """Call `compute` for each micro-batch and return the loss sums that it returns, or how the accumulation ended early."""
    queue, losses, started = LaunchQueue(device), [], time.perf_counter()
    for micro_batch in micro_batches:
        queue.wait_for_room()
        if outlasts(grace_left(), time.perf_counter() - started, queue.finished, len(micro_batches)):
            return [], Accumulated(abandoned=True)
        loss = none_on_oom(partial(compute, micro_batch), device)
        if loss is None:
            return [], Accumulated(out_of_memory=True)
        losses.append(loss)
        queue.add()
    values = none_on_oom(lambda: torch.stack(losses).tolist() if losses else [], device)
    return ([], Accumulated(out_of_memory=True)) if values is None else (values, None)


def _not_finite(micro_batches: Sequence[MicroBatch], losses: Sequence[float]) -> tuple[Skipped, ...]:
    pairs = zip(micro_batches, losses, strict=True)
    return tuple(Skipped(batch.positions, loss) for batch, loss in pairs if not math.isfinite(loss))


def add_to_tree(state: TrainingState, micro_batch: MicroBatch, n_loops: int | None = None) -> Tensor:
    """Launch the passes of a micro-batch and add its gradients to the tree; return the loss sum in nats, a 0-d tensor.

    If the sum is not finite, zeros are added instead. On a GPU the device decides this, and the host does not wait.
    """
    state.gradients.flat.zero_()
    for part in micro_batch.parts(state.batch_fit.rows):
        add_gradients(state, part, n_loops)
    flat, loss = state.gradients.flat, state.gradients.sums[LOSS].clone()
    if loss.device.type != "cpu":
        flat.masked_fill_(~loss.isfinite(), 0)
    elif not loss.isfinite():
        flat.zero_()
    state.gradients.tree.add(Node(micro_batch.index, 1), flat)
    return loss


def add_gradients(state: TrainingState, micro_batch: MicroBatch, n_loops: int | None = None) -> Tensor:
    """Launch one forward and backward pass into the buffer and return the loss sum in nats, a 0-d tensor on the device."""
    with region("forward"), state.gradients.detached(), autocast(state.settings.precision, state.device):
        loss, tokens = loss_and_tokens(state.model, micro_batch, state.batch_fit.limit_gb, n_loops)
    with region("backward"):
        loss.backward()
    state.gradients.sums[LOSS] += loss.detach()
    state.gradients.sums[TOKENS] += tokens
    return loss.detach()


def loss_and_tokens(
    model: UniversalTransformer,
    micro_batch: MicroBatch,
    memory_limit_gb: float = 10.0,
    n_loops: int | None = None,
    training_graph: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the sum of the token losses in nats and the number of target tokens, 0-d tensors.

    `memory_limit_gb` is that of `cross_entropy_sum`, GiB; `training_graph` is that of `UniversalTransformer.loop_states`.
    """
    x_BTD = model.hidden_states(micro_batch.tokens_BT, micro_batch.document_ids_BT, n_loops, training_graph)
    targets_BT = next_token_targets(micro_batch.tokens_BT, micro_batch.document_ids_BT, micro_batch.is_trained_BT)
    return cross_entropy_sum(x_BTD, model.head.weight, targets_BT, memory_limit_gb), (targets_BT != IGNORED).sum()


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
    if state.average is not None:
        state.average.update()
