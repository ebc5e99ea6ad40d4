"""The loop's `Host` under Ray: events to the bridge, checkpoints to storage and to Ray Train."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import Checkpoint, CheckpointUploadMode

from savant_ray.cluster.bridge import StopListener
from savant_ray.config import Config, dump_yaml
from savant_ray.data.tokenizer import Tokenizer
from savant_ray.events import CheckpointSaved, Event, SampleGenerated, StepDone, ValidationDone
from savant_ray.training.checkpoint import write_checkpoint
from savant_ray.training.state import TrainingState
from savant_ray.training.validator import Validator


class RayHost:
    """One per worker; implements `savant_ray.training.loop.Host`."""

    validator: Validator

    def __init__(self, bridge: Any, run_folder: Path, config: Config, tokenizer: Tokenizer) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.run_folder = run_folder
        self._bridge = bridge
        self._listener = StopListener(bridge)
        self._config_yaml, self._tokenizer_json = dump_yaml(config), tokenizer.to_json()
        self._reported: dict[str, float | str] = {}  # the newest figures, which go with a checkpoint into Ray's result

    def emit(self, event: Event, wait: bool = False) -> None:
        """Sends the event up; `wait` for those after which the process may end."""
        self._remember(event)
        sent = self._bridge.tell.remote(event)
        if wait:
            ray.get(sent)

    def stop_requested(self) -> bool:
        """Whether the driver wishes to stop."""
        return self._listener.stop_requested()

    def save(self, state: TrainingState, reason: str) -> None:
        """Rank 0 writes `step_N` into the run folder; all ranks hand it to Ray Train, which keeps the newest three.

        The folder already lies where Ray would copy it (NO_UPLOAD), so nothing is copied.
        """
        started = time.perf_counter()
        checkpoint = None
        if self.rank == 0:
            folder = write_checkpoint(self.run_folder, state.to_checkpoint(), self._config_yaml, self._tokenizer_json)
            checkpoint = Checkpoint(str(folder))
        ray.train.report(
            {**self._reported, "step": state.step},
            checkpoint=checkpoint,
            checkpoint_dir_name=f"step_{state.step}",
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        )
        if checkpoint is not None:
            seconds = time.perf_counter() - started
            self.emit(CheckpointSaved(step=state.step, path=checkpoint.path, reason=reason, seconds=seconds), wait=True)

    def validate(self, state: TrainingState) -> None:
        """Loss on held-out text and a sample."""
        self.validator(state)

    def _remember(self, event: Event) -> None:
        """Plain numbers and strings only: Ray writes them as JSON."""
        match event:
            case StepDone():
                self._reported |= {"train_loss": event.train_loss, "tokens_per_second": event.tokens_per_second}
            case ValidationDone():
                self._reported |= {"validation_loss": event.validation_loss, "bits_per_byte": event.bits_per_byte}
            case SampleGenerated():
                self._reported |= {"sample": event.text}
