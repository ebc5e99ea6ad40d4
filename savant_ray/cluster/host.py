"""The loop's `Host` under Ray: events to the bridge, checkpoints to storage and to Ray Train."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from typing import Any

import ray
import ray.train
from ray.train import Checkpoint, CheckpointUploadMode

from savant_ray.cluster.bridge import StopListener
from savant_ray.cluster.disk import Disk
from savant_ray.cluster.preemption import drain_grace_left
from savant_ray.config import Config, dump_yaml
from savant_ray.data.stream import StreamPlan
from savant_ray.data.tokenizer import Tokenizer
from savant_ray.events import (
    CheckpointFailed,
    CheckpointSaved,
    Event,
    MicroBatchSkipped,
    Notice,
    SampleGenerated,
    StepDone,
    ValidationDone,
)
from savant_ray.reporting.record import to_line
from savant_ray.training.checkpoint import CONFIG, RECORDS, TOKENIZER, write_checkpoint
from savant_ray.training.ranks import any_rank
from savant_ray.training.state import TrainingState
from savant_ray.training.validator import Validator


class RayHost:
    """One per worker; implements `savant_ray.training.loop.Host`."""

    plan: StreamPlan
    validator: Validator
    saved_step = 0  # of the newest checkpoint

    def __init__(self, bridge: Any, storage: Disk, config: Config, tokenizer: Tokenizer) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self._storage = storage
        self._bridge = bridge
        self._listener = StopListener(bridge)
        self._grace_seconds = config.run.grace_seconds
        self._save_seconds = 0.0  # how long the last checkpoint took
        self._drain_told = False
        self._texts = {CONFIG: dump_yaml(config), TOKENIZER: tokenizer.to_json()}
        self._lines: list[dict[str, Any]] = []  # of the record, since the last checkpoint
        self._reported: dict[str, float | str] = {}  # the newest figures, which go with a checkpoint into Ray's result

    def emit(self, event: Event, wait: bool = False) -> None:
        """Sends the event up; `wait` until it and those before it have arrived."""
        if isinstance(event, MicroBatchSkipped):
            event = dataclasses.replace(event, documents=self._documents(event.positions))
        self._remember(event)
        sent = self._bridge.tell.remote(event)
        if wait:
            ray.get(sent)

    def grace_left(self) -> float | None:
        """None until the driver wishes to stop or a node of the run is drained; then seconds, less those of a save."""
        left = self._listener.grace_left()
        if left is None and (left := drain_grace_left(self._grace_seconds)) is not None:
            self._tell_drain()
        return None if left is None else left - self._save_seconds

    def stop_requested(self) -> bool:
        """Whether there is a reason to stop."""
        return self.grace_left() is not None

    def save(self, state: TrainingState, reason: str) -> bool:
        """Rank 0 writes `step_N` to where the run is kept; all ranks hand it to Ray Train, which keeps the newest three.

        It already lies where Ray would copy it (NO_UPLOAD), so nothing is copied. False on every rank: the storage
        refused, so that there is nothing to hand over.
        """
        started = time.perf_counter()
        path = self._write(state) if self.rank == 0 else None
        if any_rank(self.rank == 0 and path is None, state.device):
            return False
        name = f"step_{state.step}"
        ray.train.report(
            {**self._reported, "step": state.step},
            checkpoint=Checkpoint(path, self._storage.filesystem) if path else None,
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        )
        self.saved_step, self._save_seconds = state.step, time.perf_counter() - started
        if path is not None:
            self._lines.clear()
            where = self._storage.locate(name)
            self.emit(CheckpointSaved(step=state.step, path=where, reason=reason, seconds=self._save_seconds), wait=True)
        return True

    def validate(self, state: TrainingState) -> bool:
        """Loss on held-out text and a sample; whether some rank has a reason to stop."""
        return self.validator(state)

    def _write(self, state: TrainingState) -> str | None:
        """The checkpoint's path in the storage; None: the storage refused it, and the driver was told."""
        texts = {**self._texts, RECORDS: "".join(json.dumps(line) + "\n" for line in self._lines)}
        try:
            return self._storage.keep(write_checkpoint(self._storage.folder, state.to_checkpoint(), texts))
        except OSError as error:
            self.emit(CheckpointFailed(step=state.step, text=str(error)), wait=True)
            return None

    def _tell_drain(self) -> None:
        if not self._drain_told:  # by every rank, as any may be the first to hear of it
            self.emit(Notice(text="a node of this run is being taken away: this step is finished and saved"))
        self._drain_told = True

    def _documents(self, positions: Sequence[int]) -> tuple[str, ...]:
        return tuple(f"{file}:{line}" for position in positions for file, line in self.plan.documents(position))

    def _remember(self, event: Event) -> None:
        """For Ray's result: plain numbers and strings only, as Ray writes them as JSON."""
        if self.rank == 0:
            self._lines.append(to_line(event))
        match event:
            case StepDone():
                self._reported |= {"train_loss": event.train_loss, "tokens_per_second": event.tokens_per_second}
            case ValidationDone():
                self._reported |= {"validation_loss": event.validation_loss, "bits_per_byte": event.bits_per_byte}
            case SampleGenerated():
                self._reported |= {"sample": event.text}
