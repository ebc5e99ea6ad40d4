"""Checkpoints are written beside training: it stands still only while the state is copied.

One at a time: the next save, and the end of training, wait for the one that is being written. Each rank hands it over
to Ray Train from a thread of its own, because `report()` waits for all ranks, and so for rank 0's disk.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray.train
from ray.train import Checkpoint, CheckpointUploadMode

from savant_ray.errors import doing
from savant_ray.events import CheckpointFailed, CheckpointSaved, Event
from savant_ray.storage.protocol import RunStorage
from savant_ray.storage.tolerant_file_system import tolerant_file_system
from savant_ray.training.checkpoint import RECORDS, write_checkpoint


@dataclass(frozen=True)
class Save:
    """A checkpoint on its way."""

    step: int
    reason: str
    content: dict[str, Any] | None  # rank 0's
    figures: Mapping[str, float | str]  # which Ray's dashboard shows beside it
    n_lines: int
    started: float  # by time.perf_counter()
    stall_seconds: float


class Saver:
    """One per worker; `tell` sends an event and waits until it has arrived."""

    def __init__(self, storage: RunStorage, texts: Mapping[str, str], tell: Callable[[Event], None]) -> None:
        self.lines: list[dict[str, Any]] = []  # of the record, since the last checkpoint
        self.saved_step = 0  # of the newest checkpoint
        self.seconds = 0.0  # that the last one took
        self._refused = False  # the last one, by the storage; known on rank 0
        self._storage, self._texts, self._tell = storage, texts, tell
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def begin(
        self,
        step: int,
        reason: str,
        copy_state: Callable[[], dict[str, Any]] | None,
        figures: Mapping[str, float | str],
    ) -> None:
        """Copies the state where `copy_state` is given, which is on rank 0, and returns; every rank calls it."""
        started = time.perf_counter()
        self.finish()
        self._refused = False
        content = None if copy_state is None else copy_state()
        save = Save(step, reason, content, figures, len(self.lines), started, time.perf_counter() - started)
        self._thread = threading.Thread(target=self._run, args=(save,), name=f"save-{step}", daemon=True)
        self._thread.start()

    def finish(self) -> bool:
        """Waits for the checkpoint that is being written; False: the storage refused it. Raises once what else went wrong.

        Raises:
            SavantError: another process has taken the run over.
        """
        if self._thread is not None:
            self._thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error
        return not self._refused

    def seconds_to_finish(self) -> float:
        """How long a save that begins now may take."""
        is_writing = self._thread is not None and self._thread.is_alive()
        return self.seconds * (2 if is_writing else 1)

    def _run(self, save: Save) -> None:
        path = None
        try:
            try:
                with doing(f"saving step_{save.step}"):
                    path = self._write(save)
            finally:  # the other ranks wait for it
                self._hand_over(save, path)
        except BaseException as error:
            self._error = error

    def _write(self, save: Save) -> str | None:
        """Its path in the storage; None: not here, or the storage refused it, and the driver was told."""
        if save.content is None:
            return None
        records = "".join(json.dumps(line) + "\n" for line in self.lines[: save.n_lines])
        texts = {**self._texts, RECORDS: records}
        try:
            self._storage.check_owner()
            folder = write_checkpoint(self._storage.folder, save.content, texts, self._storage.check_owner)
            return self._storage.commit(folder)
        except OSError as error:
            self._refused = True
            self._tell(CheckpointFailed(step=save.step, text=str(error)))
            return None

    def _hand_over(self, save: Save, path: str | None) -> None:
        """It lies where Ray would copy it (NO_UPLOAD), so nothing is copied; Ray keeps the newest `checkpoint.keep`."""
        name = f"step_{save.step}"
        filesystem = tolerant_file_system(self._storage.filesystem, self._storage)
        ray.train.report(
            {**save.figures, "step": save.step},
            checkpoint=None if path is None else Checkpoint(path, filesystem),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        )
        if path is None:
            return
        self.saved_step, self.seconds = save.step, time.perf_counter() - save.started
        del self.lines[: save.n_lines]
        self._tell(
            CheckpointSaved(
                step=save.step,
                path=self._storage.locate(name),
                reason=save.reason,
                seconds=self.seconds,
                stall_seconds=save.stall_seconds,
            )
        )
