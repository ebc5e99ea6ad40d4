"""The whole training loop. Start reading here.

A step takes the next `effective_batch` sequences of the global order, each rank its share of them (`training/step.py`).
What the loop needs from the outside, it asks of a `Host`: under Ray that is `cluster/host.py`, in tests a few lines.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

import torch

from savant_ray.config import Config
from savant_ray.errors import TrainingError
from savant_ray.events import Event, MicroBatchSkipped, Notice, StepDone
from savant_ray.optim.schedule import learning_rate
from savant_ray.training.efficiency import Peak
from savant_ray.training.fitting import skip_on_oom
from savant_ray.training.memory import cap_memory_again, memory_used_gb
from savant_ray.training.micro_batch import MicroBatch
from savant_ray.training.ranks import any_rank
from savant_ray.training.state import TrainingState
from savant_ray.training.step import StepResult, take_step

Share = TypeVar("Share")


class Host(Protocol):
    """Where the loop runs; every rank has one."""

    rank: int

    def emit(self, event: Event) -> None:
        """Tells the driver; never blocks."""

    def grace_left(self) -> float | None:
        """None until this rank is asked to stop, then the seconds that are left for it; costs nothing."""

    def save(self, state: TrainingState, reason: str) -> None:
        """Begin a checkpoint of the state as it is now; all ranks call it. A storage that refuses is reported.

        Raises:
            DeviceMemoryError: the device has no memory for copying the state.
        """

    def finish_saving(self) -> bool:
        """Waits until the checkpoint that was begun is written; all ranks call it. False: this rank's storage refused."""

    def validate(self, state: TrainingState) -> bool:
        """Loss on held-out text, logic problems, a sample; collective. True: a rank was asked to stop; it is cut short.

        Raises:
            DeviceMemoryError: the device has no memory for a single sequence.
        """


def train(state: TrainingState, config: Config, shares: Iterable[Sequence[MicroBatch]], host: Host) -> bool:
    """Trains to `training.max_steps`; returns False when it was stopped before. The last finished step is saved.

    `shares` yields this rank's micro-batches, step by step, from `state.position` on. A validation comes after the
    checkpoint of its step, so a run that goes on from a step that has one begins with it: it may have been cut short.

    Raises:
        TrainingError: `training.max_skipped_steps` steps in a row could not update the weights.
        MemoryCapError: one sequence, or the model with its gradients and optimizer state, does not fit.
        DeviceMemoryError: a save or a validation does not fit.
    """
    settings = config.training
    begun = saved = state.step
    if validation_is_due(state.step, config):
        if host.validate(state):
            return False
    elif host.rank == 0:  # remembers the weights for the first validation
        skip_on_oom(state.weights_moved, state.device, "comparing weights", functools.partial(warn, host))
    stop, peak = False, Peak(state.precision, state.device)
    for share, data_wait in timed(shares):
        rate = learning_rate(state.next_in_schedule, settings.learning_rate, settings.warmup_steps, settings.max_steps)
        started = time.perf_counter()
        result = step_with_oom_retry(state, share, rate, settings.gradient_clip, host)
        seconds = data_wait + time.perf_counter() - started
        if result.abandoned:
            host.emit(Notice(text=f"step {state.step + 1:,} would outlast the grace period: given up, nothing is lost"))
        else:
            advance(state, result, settings.effective_batch)
            flops = useful(share)
            if state.step == begun + 1:  # libraries have taken their memory by now, and it counts
                warn(host, cap_memory_again(state.device, settings.vram_limit_gb))
                if flops:
                    measure(peak, host, state.device)
            tell(host, state, result, rate, seconds, data_wait, peak.share(flops, seconds))
            refuse_endless_skips(state, settings.max_skipped_steps)

        stop = result.stop
        if not stop and (reason := save_reason(state.step, config)):
            host.save(state, reason)
            saved = state.step
        if not stop and validation_is_due(state.step, config):
            stop = host.validate(state)
            measure(peak, host, state.device)
        if stop:
            if state.step > saved or any_rank(not host.finish_saving(), state.device):  # it loses what is told twice
                host.save(state, "stop")
            break
    host.finish_saving()
    return not stop


def step_with_oom_retry(
    state: TrainingState, share: Sequence[MicroBatch], rate: float, gradient_clip: float, host: Host
) -> StepResult:
    """Takes a step, with less at once when there was no room for it; all ranks together.

    Raises:
        MemoryCapError: one sequence does not fit.
    """
    while (result := take_step(state, share, rate, gradient_clip, host.grace_left)).no_room and not result.abandoned:
        state.use(state.fit.smaller())
        if host.rank == 0:
            host.emit(Notice(text=f"step {state.step + 1:,} did not fit into memory: from here on {state.fit}"))
    return result


def save_reason(step: int, config: Config) -> str | None:
    """Why there is to be a checkpoint after this step, if there is."""
    if step >= config.training.max_steps:
        return "final"
    return "periodic" if step % config.checkpoint.every_steps == 0 else None


def validation_is_due(step: int, config: Config) -> bool:
    """After every `validation.every_steps` steps and the last."""
    return step >= config.training.max_steps or (step > 0 and step % config.validation.every_steps == 0)


def advance(state: TrainingState, result: StepResult, effective_batch: int) -> None:
    """Counts the step."""
    state.step += 1
    state.position += effective_batch
    state.tokens_seen += result.tokens
    state.skipped_micro_batches += result.skipped
    state.skipped_in_a_row = 0 if result.updated else state.skipped_in_a_row + 1


def warn(host: Host, note: str | None) -> None:
    """Tells the user, of whichever rank it is."""
    if note is not None:
        host.emit(Notice(text=f"rank {host.rank}: {note}"))


def measure(peak: Peak, host: Host, device: torch.device) -> None:
    """Measure the peak speed of the device, if there is memory for it."""
    skip_on_oom(peak.measure, device, "measuring the speed of matrix products", functools.partial(warn, host))


def useful(share: Sequence[MicroBatch]) -> float:
    """FLOPs of this rank's share."""
    return sum(micro_batch.useful_flops for micro_batch in share)


def tell(
    host: Host,
    state: TrainingState,
    result: StepResult,
    rate: float,
    seconds: float,
    wait: float,
    share_of_peak: float | None,
) -> None:
    """Emits what happened: rank 0 the step, each rank what it skipped."""
    for skipped in result.skipped_here:
        host.emit(
            MicroBatchSkipped(step=state.step, rank=host.rank, loss=str(skipped.loss), positions=skipped.positions)
        )
    if host.rank != 0:
        return
    host.emit(
        StepDone(
            step=state.step,
            train_loss=result.loss,
            learning_rate=rate,
            grad_norm=result.grad_norm,
            tokens=result.tokens,
            tokens_per_second=result.tokens / seconds,
            skipped_micro_batches=result.skipped,
            micro_batch_size=state.fit.rows,
            memory_gb=memory_used_gb(state.device),
            data_wait_seconds=wait,
            compute_seconds=result.seconds.compute,
            reduce_seconds=result.seconds.reduce,
            update_seconds=result.seconds.update,
            step_seconds=seconds,
            share_of_peak=share_of_peak,
            update_skipped=not result.updated,
        )
    )


def refuse_endless_skips(state: TrainingState, limit: int) -> None:
    """Ends a run that no longer learns; its last checkpoints stay as they are."""
    if state.skipped_in_a_row >= limit:
        raise TrainingError(
            f"{state.skipped_in_a_row} steps in a row (up to step {state.step}) gave no finite gradient, so the weights "
            "did not change; the last checkpoints are kept. Lower training.learning_rate, or look at the skipped "
            "positions in metrics.jsonl. (training.max_skipped_steps sets this limit.)"
        )


def timed(shares: Iterable[Share]) -> Iterator[tuple[Share, float]]:
    """Each share with the seconds that were spent waiting for it."""
    iterator = iter(shares)
    while True:
        started = time.perf_counter()
        try:
            share = next(iterator)
        except StopIteration:
            return
        yield share, time.perf_counter() - started
