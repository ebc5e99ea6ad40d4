"""The connection of a worker to the driver, and the loop's `Host` under Ray: checkpoints, validation, batches."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray
import ray.train
from ray.exceptions import ActorUnavailableError

from savant_ray.cluster.bridge import WorkerProgress
from savant_ray.cluster.stuck_process import allow_stack_dumps
from savant_ray.config import Config, dump_yaml
from savant_ray.data.stream import StepStream
from savant_ray.data.tokenizer import Tokenizer
from savant_ray.errors import error_context
from savant_ray.evaluation.validator import Validator
from savant_ray.events import (
    Event,
    MicroBatchSkipped,
    Notice,
    Rewound,
    SampleGenerated,
    SpikeFound,
    StepDone,
    ValidationDone,
)
from savant_ray.ray_internals import preemption_deadline_ms
from savant_ray.reporting.record import to_line
from savant_ray.storage.protocol import RunStorage
from savant_ray.training.checkpoint import CONFIG
from savant_ray.training.host_copies import HostCopy
from savant_ray.training.loop import validation_is_due
from savant_ray.training.progress import PROGRESS, SLOW, STORAGE
from savant_ray.training.state import TrainingState
from savant_ray.worker.batch_reader import BatchReader, local_batches
from savant_ray.worker.metrics import RunMetrics
from savant_ray.worker.resume import load_newest_checkpoint
from savant_ray.worker.saving import Saver

HEARTBEAT_SECONDS = 1.0


class DriverConnection:
    """Sends this worker's events and heartbeats to the driver, and receives stop requests.

    A daemon thread asks the bridge for a stop request, so that a training step never waits for the answer. Each question is
    a heartbeat, with the progress of this process. A worker creates the connection before it does anything else, so that the
    driver notices every later hang.
    """

    def __init__(self, bridge: Any, config: Config) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.lines: list[dict[str, Any]] = []  # on rank 0: the newest lines of the record (see `Saver`)
        self.figures: dict[str, float | str] = {}  # the latest ones, reported to Ray Train with each checkpoint
        self._bridge, self._grace_seconds = bridge, config.run.grace_seconds
        self._sender, self._numbers = uuid.uuid4().hex, itertools.count()
        self.metrics = RunMetrics(config.run.name, self.rank)
        allow_stack_dumps()
        self._progress = _progress_of(self.rank, self.world_size)
        self._deadline: float | None = None  # of a requested stop, by time.monotonic()
        self._drain_reported = False
        first = self._heartbeat()
        threading.Thread(target=self._listen, args=(first,), name="stop-listener", daemon=True).start()

    def emit(self, event: Event) -> Any:
        """Send an event to the driver; return the call, for `emit_and_wait`."""
        self._record(event)
        self.metrics.observe(event)
        return self._bridge.send.remote(event, self._sender, next(self._numbers))

    def emit_and_wait(self, event: Event) -> int:
        """Send an event to the driver; return the result of `Bridge.send` when it and all earlier ones have arrived."""
        n_unrecorded: int = ray.get(self.emit(event))
        return n_unrecorded

    def grace_left(self) -> float | None:
        """Return the seconds until this worker must have ended, None if it need not stop.

        A stop is requested by the driver, or by draining a node of the run.
        """
        if self._deadline is not None:
            return self._deadline - time.monotonic()
        left = _drain_grace_left(self._grace_seconds)
        if left is not None:
            self._report_drain()
        return left

    def _heartbeat(self) -> Any:
        return self._bridge.wait_for_stop_request.remote(self._progress(), HEARTBEAT_SECONDS)

    def _listen(self, heartbeat: Any) -> None:
        while True:
            try:
                grace_seconds = ray.get(heartbeat)
                if self._deadline is not None:  # the bridge answers immediately
                    time.sleep(HEARTBEAT_SECONDS)
                elif grace_seconds is not None:
                    self._deadline = time.monotonic() + grace_seconds
            except ActorUnavailableError:  # the connection to the driver's node has failed, and may be restored
                time.sleep(HEARTBEAT_SECONDS)
            heartbeat = self._heartbeat()

    def drop_lines_after(self, step: int) -> None:
        """Remove the lines of later steps, which are repeated, from those of the next checkpoint."""
        self.lines[:] = [line for line in self.lines if line.get("step", 0) <= step]

    def _report_drain(self) -> None:
        if not self._drain_reported:  # every rank reports it once, because any rank may be the first to detect it
            self.emit(Notice(text="a node of this run is being drained: this step is finished and saved"))
        self._drain_reported = True

    def _record(self, event: Event) -> None:
        """Add the event's line to the record of the next checkpoint, and its figures to those reported to Ray Train.

        The figures are plain numbers and strings, because Ray Train writes them as JSON.
        """
        if self.rank == 0:
            self.lines.append(to_line(event))
        match event:
            case StepDone():
                self.figures |= {"train_loss": event.train_loss, "tokens_per_second": event.tokens_per_second}
            case ValidationDone():
                self.figures |= {"validation_loss": event.validation_loss, "bits_per_byte": event.bits_per_byte}
            case SampleGenerated():
                self.figures |= {"sample": event.text}


class RayHost:
    """Implements `savant_ray.training.loop.Host`; every worker has one.

    Its construction reads the validation sequences. On rank 0 it also begins to allocate the host memory for copies of the
    state, in the background, and copies the weights, because the next validation reports how many have changed. A validation
    that is due now makes this copy itself.

    Raises:
        DataError: the validation sequences cannot be read.
    """

    def __init__(
        self,
        connection: DriverConnection,
        storage: RunStorage,
        config: Config,
        tokenizer: Tokenizer,
        stream: StepStream,
        validation_cache: str,
        allow_changes: bool,
        state: TrainingState,
    ) -> None:
        self.rank = connection.rank
        self._connection, self._storage, self._config = connection, storage, config
        self._stream, self._left_out = stream, state.left_out
        self._allow_changes = allow_changes
        PROGRESS.begin("reading the validation text", STORAGE)
        files = {CONFIG: dump_yaml(config), **tokenizer.files()}
        self._saver = Saver(storage, files, connection.lines, connection.emit_and_wait, saved_step=state.step)
        self._host_copy = HostCopy()  # used on rank 0
        if self.rank == 0:
            self._host_copy.allocate(state)
        self._validator = Validator.from_cache(
            validation_cache,
            config,
            tokenizer,
            self.rank,
            connection.world_size,
            emit=self.emit,
            stop_requested=self.stop_requested,
        )
        if self.rank == 0 and not validation_is_due(state.step, config):
            self._validator.remember_weights(state)

    def emit(self, event: Event) -> None:
        """Send an event to the driver, with the documents of the sequences that it is about."""
        self._connection.emit(self._with_documents(event))

    def observe_rank(self, data_wait_seconds: float, memory_gb: float) -> None:
        """Set Ray's metrics of this rank: its wait for data and its memory."""
        PROGRESS.end_step()
        self._connection.metrics.observe_rank(data_wait_seconds, memory_gb)

    def grace_left(self) -> float | None:
        """Return the seconds that the current step may still take, None if it need not stop.

        The time that the final checkpoint takes is subtracted. Each call is also a progress mark, because the loop calls
        this for each unit of its work.
        """
        PROGRESS.mark()
        left = self._connection.grace_left()
        return None if left is None else left - self._saver.seconds_to_finish()

    def stop_requested(self) -> bool:
        """Return whether the driver has requested a stop or a node of the run is being drained."""
        return self.grace_left() is not None

    def save(self, state: TrainingState, reason: str) -> None:
        """Copy the state; rank 0 writes it as `step_N` to the run's storage while training continues."""
        copy_state = functools.partial(self._host_copy.update, state) if self.rank == 0 else None
        with self._saving_marked():
            self._saver.begin(state.step, reason, copy_state, dict(self._connection.figures))

    def finish_saving(self) -> bool:
        """Wait until the pending checkpoint is written; return False if the storage failed."""
        with self._saving_marked():
            return self._saver.finish()

    @contextmanager
    def _saving_marked(self) -> Iterator[None]:
        """Mark that this rank writes, or waits for rank 0, which writes: the report to Ray Train waits for all ranks."""
        PROGRESS.begin("saving a checkpoint", STORAGE)
        if self.rank != 0:
            PROGRESS.enter_collective()
        yield
        if self.rank == 0:
            PROGRESS.enter_collective()

    def restore(self, state: TrainingState) -> None:
        """Load the newest checkpoint of the storage, if there is one.

        Lines of later steps are removed from those of the next checkpoint.

        Raises:
            CheckpointError: it is damaged or does not fit.
            SavantError: another process has taken over the run.
            OSError: the storage cannot be read.
        """
        self.finish_saving()
        PROGRESS.begin("going back to the newest checkpoint", STORAGE)
        with error_context("going back to the newest checkpoint"):
            resumed, _ = load_newest_checkpoint(state, self._storage, self._allow_changes)
        if resumed is not None and self.rank == 0:
            self._validator.remember_weights(state)  # the next validation reports how many have changed since then
        self._connection.drop_lines_after(state.step)

    def local_batches(self, state: TrainingState) -> BatchReader:
        """Start reading this rank's sequences from `state.position` on.

        Raises:
            MemoryCapError: the device has no memory for those of a step.
        """
        self._left_out = state.left_out
        return local_batches(self._stream, state, self._config)

    def store_file(self, file: Path, name: str) -> str:
        """Copy a file into the run's storage as `name` and return its path or URI.

        Raises:
            SavantError: another process has taken over the run.
            OSError: the storage failed.
        """
        PROGRESS.begin("storing a file in the run folder", STORAGE)
        self._storage.check_owner()
        return self._storage.store_file(file, name)

    @property
    def saved_step(self) -> int:
        """Return the step of the newest checkpoint, 0 without one."""
        return self._saver.saved_step

    def validate(self, state: TrainingState) -> bool:
        """Run validation, logic problems and sampling; return whether a stop was requested on some rank."""
        PROGRESS.begin("validating", SLOW)
        with error_context(f"validating after step {state.step:,}"):
            return self._validator(state)

    def _with_documents(self, event: Event) -> Event:
        """Return the event with the documents of the sequences that it is about."""
        match event:
            case MicroBatchSkipped():
                return dataclasses.replace(event, documents=self._documents(event.positions))
            case SpikeFound():
                return self._spike_with_documents(event)
            case Rewound():
                return dataclasses.replace(event, spike=self._spike_with_documents(event.spike))
        return event

    def _spike_with_documents(self, spike: SpikeFound) -> SpikeFound:
        positions = range(spike.first_position, spike.first_position + spike.n_sequences)
        return dataclasses.replace(spike, documents=self._documents(positions))

    def _documents(self, positions: Sequence[int]) -> tuple[str, ...]:
        plan = dataclasses.replace(self._stream.plan, left_out=self._left_out)
        return tuple(f"{file}:{line}" for position in positions for file, line in plan.documents(position))


def _progress_of(rank: int, world_size: int) -> Callable[[], WorkerProgress]:
    """Return a function that returns the progress of this process."""
    context, host, process = ray.get_runtime_context(), socket.gethostname(), psutil.Process(os.getpid())
    actor_id, node_id, started = str(context.get_actor_id()), context.get_node_id(), process.create_time()

    def progress() -> WorkerProgress:
        newest = PROGRESS.newest
        return WorkerProgress(
            rank=rank,
            world_size=world_size,
            actor_id=actor_id,
            node_id=node_id,
            host=host,
            pid=process.pid,
            process_started=started,
            marks=newest.number,
            activity=newest.activity,
            limit_factor=newest.limit_factor,
            collectives=newest.collectives,
            waits=newest.waits,
            finished=newest.finished,
        )

    return progress


def _drain_grace_left(default_seconds: float) -> float | None:
    """Return the seconds until the first drained node of this run is shut down, None if no node is being drained.

    `default_seconds` is returned for a drain without a deadline.
    """
    deadline_ms = preemption_deadline_ms()
    if deadline_ms is None:
        return None
    return deadline_ms / 1000 - time.time() if deadline_ms else default_seconds
