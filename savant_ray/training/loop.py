"""The training loop. Start reading here.

Each step takes the next `effective_batch` sequences of the global order; each rank trains on its local batch of them
(`training/step.py`). Events, checkpoints and validation are the task of a `Host`: `worker/host.py` under Ray, a few
lines in tests.
"""

from __future__ import annotations

import functools
import json
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import torch

from savant_ray.config import Config
from savant_ray.errors import TrainingError, error_context
from savant_ray.events import Event, MicroBatchSkipped, Notice, Rewound, SpikeFound, StepDone
from savant_ray.optim.schedule import scheduled_rate
from savant_ray.training.checkpoint import left_out_file
from savant_ray.training.device import memory_used_gb, skip_on_oom, update_memory_cap
from savant_ray.training.efficiency import Peak
from savant_ray.training.profiling import StepProfiler, region
from savant_ray.training.rank_comparison import raise_if_ranks_differ
from savant_ray.training.reduction import any_rank
from savant_ray.training.seeds import loops_of_step
from savant_ray.training.spikes import WINDOW, Spike
from savant_ray.training.state import TrainingState
from savant_ray.training.step import MicroBatch, StepResult, take_step

MAX_REWINDS = 3  # within `WINDOW` steps


class Host(Protocol):
    """The environment of the loop; every rank has one."""

    rank: int

    def emit(self, event: Event) -> None:
        """Send an event to the driver without blocking."""

    def observe_rank(self, data_wait_seconds: float, memory_gb: float) -> None:
        """Record this rank's wait for the data of a step and its memory in GiB; called after each step."""

    def grace_left(self) -> float | None:
        """Return None until a stop is requested from this rank, then the seconds left; called for each micro-batch."""

    def save(self, state: TrainingState, reason: str) -> None:
        """Begin a checkpoint of the current state; called on all ranks. A storage failure is reported, not raised.

        Raises:
            DeviceMemoryError: the device has no memory for copying the state.
        """

    def store_file(self, file: Path, name: str) -> str:
        """Copy a file into the run folder as `name` and return where it is; called on any rank.

        Raises:
            SavantError, OSError: it cannot be stored.
        """

    def finish_saving(self) -> bool:
        """Wait until the pending checkpoint is written; called on all ranks. Return False if this rank's storage failed."""

    def restore(self, state: TrainingState) -> None:
        """Load the run's newest checkpoint, if there is one, into the state; called on all ranks.

        Raises:
            CheckpointError: it is damaged.
        """

    def local_batches(self, state: TrainingState) -> Iterable[Sequence[MicroBatch]]:
        """Return this rank's micro-batches of each step from `state.position` on, without `state.left_out`."""

    def validate(self, state: TrainingState) -> bool:
        """Run validation, logic problems and sampling; collective. Return True if a stop was requested before the end.

        Raises:
            DeviceMemoryError: the device has no memory for a single sequence.
        """


def train(state: TrainingState, config: Config, local_batches: Iterable[Sequence[MicroBatch]], host: Host) -> bool:
    """Train to `training.max_steps` and return True, or return False after a stop; the last finished step is saved.

    `local_batches` yields this rank's micro-batches of each step on its device, from `state.position` on. A step is saved
    before it is validated. A run resumed from a step with a due validation therefore starts with that validation, which
    may have been cut short. After a rewind the micro-batches come from `host.local_batches`.

    Raises:
        TrainingError: `training.max_skipped_steps` consecutive steps did not update the weights, or there were more than
            `MAX_REWINDS` rewinds within `WINDOW` steps.
        MemoryCapError: one sequence, or the model with its gradients and optimizer state, does not fit.
        DeviceMemoryError: a save or a validation does not fit.
        RanksDifferError: the ranks have different weights or optimizer state.
        SavantError, OSError: as `rewind`.
    """
    settings = config.training
    with StepProfiler(settings, state, host) as profiler:
        first_step, saved_step = state.step + 1, state.step
        if validation_is_due(state.step, config) and host.validate(state):
            return False
        stop, peak = False, Peak(state.settings.precision, state.device)
        profiler.before_step(first_step)
        batches = iter(local_batches)
        while True:
            started = time.perf_counter()
            with region("data wait"):
                local_batch = next(batches, None)
            if local_batch is None:
                break
            data_wait = time.perf_counter() - started
            rate = scheduled_rate(state.next_in_schedule, settings)
            n_loops = loops_of_step(config, state.step + 1)
            started = time.perf_counter()
            result = step_with_oom_retry(state, local_batch, rate, settings.gradient_clip, host, n_loops)
            seconds = data_wait + time.perf_counter() - started
            if result.spike is not None and settings.on_spike == "rewind":
                rewind(state, result.spike, settings.effective_batch, host)
                saved_step = min(saved_step, state.step)
                if not result.stop:
                    batches = iter(host.local_batches(state))
                    profiler.before_step(state.step + 1)
                    continue
            elif result.abandoned:
                text = f"step {state.step + 1:,} would outlast the grace period: abandoned, nothing is lost"
                host.emit(Notice(text=text))
            else:
                if result.spike is not None and host.rank == 0:
                    host.emit(spike_found(state, result.spike, settings.effective_batch, not result.updated))
                count_step(state, result, settings.effective_batch)
                flops = sum(micro_batch.useful_flops for micro_batch in local_batch)
                if state.step == first_step:  # libraries have allocated their memory, and it counts towards the cap
                    notify(host, update_memory_cap(state.device, settings.vram_limit_gb))
                    if flops:
                        measure_peak(peak, host, state.device)
                # `useful_flops` are those of a step with `model.n_loops` loops.
                share_of_peak = peak.utilization(flops, seconds) if n_loops == config.model.n_loops else None
                emit_step(host, state, result, rate, seconds, data_wait, share_of_peak)
                profiler.after_step(state.step)
                raise_if_updates_fail(state, result, settings.max_skipped_steps)
                if settings.compare_ranks_every and state.step % settings.compare_ranks_every == 0:
                    raise_if_ranks_differ(state)

            stop = result.stop
            if not stop and (reason := save_reason(state.step, config)):
                save(host, state, reason, config)
                saved_step = state.step
            if not stop and validation_is_due(state.step, config):
                stop = host.validate(state)
                measure_peak(peak, host, state.device)
                # Generation has loaded kernels and CUDA graphs, which take memory outside of the allocator.
                notify(host, update_memory_cap(state.device, settings.vram_limit_gb))
            if stop:
                # A saved step is saved again only if its write failed: Ray drops a checkpoint that is reported twice.
                if state.step > saved_step or any_rank(not host.finish_saving(), state.device):
                    save(host, state, "stop", config)
                break
            profiler.before_step(state.step + 1)
        host.finish_saving()
        return not stop


def step_with_oom_retry(
    state: TrainingState,
    local_batch: Sequence[MicroBatch],
    rate: float,
    gradient_clip: float,
    host: Host,
    n_loops: int | None = None,
) -> StepResult:
    """Take a step; while some rank runs out of memory, repeat it on all ranks with `BatchFit.smaller`.

    Raises:
        MemoryCapError: one sequence does not fit.
    """
    while True:
        result = take_step(state, local_batch, rate, gradient_clip, host.grace_left, n_loops)
        if result.abandoned or not result.out_of_memory:
            return result
        state.set_batch_fit(state.batch_fit.smaller())
        if host.rank == 0:
            host.emit(Notice(text=f"step {state.step + 1:,} did not fit into memory: from now on {state.batch_fit}"))


def save(host: Host, state: TrainingState, reason: str, config: Config) -> None:
    """Begin a checkpoint. Ranks are compared first, unless `compare_ranks_every` is 0; if they differ, nothing is saved.

    Raises:
        RanksDifferError: the ranks have different weights or optimizer state.
    """
    if config.training.compare_ranks_every:
        raise_if_ranks_differ(state)
    host.save(state, reason)


def save_reason(step: int, config: Config) -> str | None:
    """Return why a checkpoint is due after this step, or None."""
    if step >= config.training.max_steps:
        return "final"
    if step == config.training.last_stable_step:
        return "before the decay of the learning rate"
    return "periodic" if step % config.checkpoint.every_steps == 0 else None


def validation_is_due(step: int, config: Config) -> bool:
    """Return whether a validation follows this step: every `validation.every_steps` steps and after the last."""
    return step >= config.training.max_steps or (step > 0 and step % config.validation.every_steps == 0)


def rewind(state: TrainingState, spike: Spike, n_sequences: int, host: Host) -> None:
    """Leave out the sequences of the step after `state`, which is a spike, and go back to the newest checkpoint. Collective.

    With deterministic arithmetic the steps up to the spike are repeated bit for bit, so the result does not depend on which
    checkpoint is the newest, or on whether there is one. What a hardware error has damaged since that checkpoint is undone.

    Which sequences are left out is stored in the run folder first. Otherwise a kill before the next checkpoint would lose
    this, and a spike that a hardware error has caused would not be found again.

    Raises:
        TrainingError: there were `MAX_REWINDS` others within the last `WINDOW` steps.
        SavantError, OSError: it cannot be stored.
    """
    event = spike_found(state, spike, n_sequences, update_skipped=True)
    # What was left out later in the order is of steps that are repeated, because checkpoints after them were removed.
    recent = [first for first, _ in state.left_out if state.position - WINDOW * n_sequences < first <= state.position]
    if len(recent) >= MAX_REWINDS:
        raise TrainingError(
            f"step {event.step:,} has a spike (loss {event.train_loss:.4f}, limit {event.loss_limit:.4f}; gradient norm "
            f"{event.grad_norm:.4g}, limit {event.grad_norm_limit:.4g}) after the sequences of {len(recent)} others within "
            f"{WINDOW} steps were left out, so the text is probably not the cause; the last checkpoints are kept. Lower "
            "training.learning_rate, or set training.on_spike to warn."
        )
    left_out = (*state.left_out, (state.position, n_sequences))
    if host.rank == 0:
        with tempfile.TemporaryDirectory() as folder, error_context("storing which sequences are left out"):
            file = Path(folder, left_out_file(state.data_fingerprint))
            file.write_text(json.dumps(left_out), encoding="utf-8")
            host.store_file(file, file.name)
    host.restore(state)
    state.left_out = left_out
    if host.rank == 0:
        host.emit(Rewound(step=state.step, spike=event))


def spike_found(state: TrainingState, spike: Spike, n_sequences: int, update_skipped: bool) -> SpikeFound:
    """Return the event of a spike in the step after `state`."""
    return SpikeFound(
        step=state.step + 1,
        train_loss=spike.loss,
        loss_limit=spike.loss_limit,
        grad_norm=spike.grad_norm,
        grad_norm_limit=spike.grad_norm_limit,
        update_skipped=update_skipped,
        first_position=state.position,
        n_sequences=n_sequences,
    )


def count_step(state: TrainingState, result: StepResult, effective_batch: int) -> None:
    """Add a finished step to the state's counters."""
    state.step += 1
    state.position += effective_batch
    state.tokens_seen += result.tokens
    state.skipped_micro_batches += result.skipped
    state.skipped_in_a_row = 0 if result.updated else state.skipped_in_a_row + 1
    state.spike_window.add(result.loss, result.grad_norm)


def notify(host: Host, note: str | None) -> None:
    """Emit a notice for the user with this rank's number, if there is a note."""
    if note is not None:
        host.emit(Notice(text=f"rank {host.rank}: {note}"))


def measure_peak(peak: Peak, host: Host, device: torch.device) -> None:
    """Measure the peak speed of the device, if there is memory for it."""
    skip_on_oom(peak.measure, device, "measuring the speed of matrix products", functools.partial(notify, host))


def emit_step(
    host: Host,
    state: TrainingState,
    result: StepResult,
    rate: float,
    seconds: float,
    data_wait: float,
    share_of_peak: float | None,
) -> None:
    """Emit the step from rank 0, and from each rank the micro-batches that it skipped and its own figures."""
    for skipped in result.skipped_locally:
        host.emit(
            MicroBatchSkipped(step=state.step, rank=host.rank, loss=str(skipped.loss), positions=skipped.positions)
        )
    memory_gb = memory_used_gb(state.device)
    host.observe_rank(data_wait, memory_gb)
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
            micro_batch_size=state.batch_fit.rows,
            memory_gb=memory_gb,
            data_wait_seconds=data_wait,
            compute_seconds=result.seconds.compute,
            reduce_seconds=result.seconds.reduce,
            update_seconds=result.seconds.update,
            step_seconds=seconds,
            share_of_peak=share_of_peak,
            update_skipped=not result.updated,
        )
    )


def raise_if_updates_fail(state: TrainingState, result: StepResult, limit: int) -> None:
    """Raise TrainingError after `limit` consecutive steps without an update; the last checkpoints stay as they are.

    `result` is that of the last of these steps.
    """
    if state.skipped_in_a_row < limit:
        return
    steps = f"{state.skipped_in_a_row} steps in a row (up to step {state.step})"
    if not result.tokens and not result.skipped:
        raise TrainingError(
            f"{steps} did not change the weights; the last one had no token to train on, because all were masked. The last "
            "checkpoints are kept. Train on more of the text, or on more sequences per step (training.batch_size, "
            "training.accumulation)."
        )
    if result.spike is not None:
        raise TrainingError(
            f"{steps} did not change the weights, because loss or gradient norm were far above those of the steps before "
            f"(the last loss: {result.loss:.4f}, its limit: {result.spike.loss_limit:.4f}); the last checkpoints are kept. "
            "If the text has changed, set training.on_spike to warn; otherwise lower training.learning_rate. "
            "(training.max_skipped_steps sets this limit.)"
        )
    raise TrainingError(
        f"{steps} gave no finite gradient, so the weights did not change; the last checkpoints are kept. Lower "
        "training.learning_rate, or look at the skipped positions in metrics.jsonl. (training.max_skipped_steps sets this "
        "limit.)"
    )
