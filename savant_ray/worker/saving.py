"""Writes checkpoints in a background thread; training waits only while the state is copied.

At most one checkpoint is written at a time: the next save, and the end of training, wait for the pending one. Each rank
reports it to Ray Train from this thread, because `ray.train.report()` waits for all ranks and thus for rank 0's storage.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray.train
from ray.train import Checkpoint, CheckpointUploadMode

from savant_ray.errors import error_context
from savant_ray.events import CheckpointFailed, CheckpointSaved, Event
from savant_ray.storage.protocol import RunStorage
from savant_ray.storage.tolerant_file_system import tolerant_file_system
from savant_ray.training.checkpoint import RECORDS


@dataclass(frozen=True)
class PendingCheckpoint:
    """A checkpoint that is being written."""

    step: int
    reason: str
    content: dict[str, Any] | None  # None on ranks other than 0
    figures: Mapping[str, float | str]  # reported with it to Ray Train, which keeps them in its list of checkpoints
    n_lines: int  # record lines that belong to it
    started: float  # by time.perf_counter()
    stall_seconds: float


class Saver:
    """Saves checkpoints; every worker has one.

    `files` are the contents of further files by name. `lines` are the newest lines of the record; when the driver has
    recorded a checkpoint, the lines up to it are removed. Until then all checkpoints contain them, because the driver may
    have died, and old checkpoints are deleted. `emit` sends an event, waits until it has arrived, and returns the number of
    checkpoints whose events the driver may not have recorded yet. `saved_step` is the step of the newest checkpoint, 0
    without one.
    """

    def __init__(
        self,
        storage: RunStorage,
        files: Mapping[str, str],
        lines: list[dict[str, Any]],
        emit: Callable[[Event], int],
        saved_step: int = 0,
    ) -> None:
        self.saved_step = saved_step
        self._unrecorded: deque[int] = deque()  # number of lines of each checkpoint since the one before it
        self.seconds = 0.0  # duration of the newest save
        self._storage, self._files, self._lines, self._emit = storage, files, lines, emit
        self._storage_failed = False  # in the newest save; set only on rank 0, which writes
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def begin(
        self,
        step: int,
        reason: str,
        copy_state: Callable[[], dict[str, Any]] | None,
        figures: Mapping[str, float | str],
    ) -> None:
        """Wait for the pending checkpoint, copy the state and start writing; every rank calls it.

        `copy_state` is None on ranks other than 0.

        Raises:
            SavantError: another process has taken over the run.
        """
        started = time.perf_counter()
        self.finish()
        self._storage_failed = False
        content = None if copy_state is None else copy_state()
        stall_seconds = time.perf_counter() - started
        pending = PendingCheckpoint(step, reason, content, figures, len(self._lines), started, stall_seconds)
        self._thread = threading.Thread(target=self._run, args=(pending,), name=f"save-{step}", daemon=True)
        self._thread.start()

    def finish(self) -> bool:
        """Wait for the pending checkpoint; return False on rank 0 if the storage failed.

        Raises:
            SavantError: another process has taken over the run.
            Exception: any other error of the thread; a second call does not raise it again.
        """
        if self._thread is not None:
            self._thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error
        return not self._storage_failed

    def seconds_to_finish(self) -> float:
        """Return the estimated duration of a save that begins now, including the wait for the pending one."""
        is_writing = self._thread is not None and self._thread.is_alive()
        return self.seconds * (2 if is_writing else 1)

    def _run(self, pending: PendingCheckpoint) -> None:
        is_stored = False
        try:
            try:
                with error_context(f"saving step_{pending.step}"):
                    is_stored = self._store(pending)
            finally:  # the other ranks wait in their report
                self._report(pending, is_stored)
        except BaseException as error:
            self._error = error

    def _store(self, pending: PendingCheckpoint) -> bool:
        """Write and store the checkpoint; return False on other ranks, or if the storage failed."""
        if pending.content is None:
            return False
        records = "".join(json.dumps(line) + "\n" for line in self._lines[: pending.n_lines])
        try:
            self._storage.save(pending.content, {**self._files, RECORDS: records})
        except OSError as error:
            self._storage_failed = True
            self._emit(CheckpointFailed(step=pending.step, text=str(error)))
            return False
        return True

    def _report(self, pending: PendingCheckpoint, is_stored: bool) -> None:
        """Report the checkpoint to Ray Train, which keeps the newest `checkpoint.keep` ones, and to the driver.

        It is already in the folder to which Ray Train would copy it, hence NO_UPLOAD.
        """
        name, storage = f"step_{pending.step}", self._storage
        file_system = tolerant_file_system(storage.filesystem, storage)
        ray.train.report(
            {**pending.figures, "step": pending.step},
            checkpoint=Checkpoint(f"{storage.path}/{name}", file_system) if is_stored else None,
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        )
        if not is_stored:
            return
        self.saved_step, self.seconds = pending.step, time.perf_counter() - pending.started
        self._unrecorded.append(pending.n_lines - sum(self._unrecorded))
        n_unrecorded = self._emit(
            CheckpointSaved(
                step=pending.step,
                path=storage.locate(name),
                reason=pending.reason,
                seconds=self.seconds,
                stall_seconds=pending.stall_seconds,
            )
        )
        while len(self._unrecorded) > n_unrecorded:
            del self._lines[: self._unrecorded.popleft()]
