"""The loop's `Host` under Ray: events to the bridge, wishes from it, checkpoints to the saver."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import ray
import ray.train

from savant_ray.cluster.bridge import StopListener
from savant_ray.cluster.preemption import drain_grace_left
from savant_ray.config import Config, dump_yaml
from savant_ray.data.stream import StreamPlan
from savant_ray.data.tokenizer import Tokenizer
from savant_ray.errors import doing
from savant_ray.events import (
    Event,
    MicroBatchSkipped,
    Notice,
    SampleGenerated,
    StepDone,
    ValidationDone,
)
from savant_ray.reporting.record import to_line
from savant_ray.storage.local import Disk
from savant_ray.training.checkpoint import CONFIG, TOKENIZER
from savant_ray.training.host_copies import HostCopy
from savant_ray.training.state import TrainingState
from savant_ray.training.validator import Validator
from savant_ray.worker.metrics import RunMetrics
from savant_ray.worker.saving import Saver


class RayHost:
    """One per worker; implements `savant_ray.training.loop.Host`."""

    plan: StreamPlan
    validator: Validator

    def __init__(self, bridge: Any, storage: Disk, config: Config, tokenizer: Tokenizer) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.metrics = RunMetrics(config.run.name, self.rank)
        self._bridge = bridge
        self._listener = StopListener(bridge)
        self._grace_seconds = config.run.grace_seconds
        self._drain_told = False
        texts = {CONFIG: dump_yaml(config), TOKENIZER: tokenizer.to_json()}
        self.saver = Saver(storage, texts, functools.partial(self.emit, wait=True))
        self.host_copy = HostCopy()  # used on rank 0
        self._figures: dict[str, float | str] = {}  # the newest, which go with a checkpoint into Ray's result

    def emit(self, event: Event, wait: bool = False) -> None:
        """Sends the event up; `wait` until it and those before it have arrived."""
        if isinstance(event, MicroBatchSkipped):
            event = dataclasses.replace(event, documents=self._documents(event.positions))
        self._remember(event)
        self.metrics.observe(event)
        sent = self._bridge.send.remote(event)
        if wait:
            ray.get(sent)

    def grace_left(self) -> float | None:
        """None until the driver wishes to stop or a node of the run is drained; then seconds, less those of a save."""
        left = self._listener.grace_left()
        if left is None and (left := drain_grace_left(self._grace_seconds)) is not None:
            self._tell_drain()
        return None if left is None else left - self.saver.seconds_to_finish()

    def stop_requested(self) -> bool:
        """Whether there is a reason to stop."""
        return self.grace_left() is not None

    def save(self, state: TrainingState, reason: str) -> None:
        """Copies the state; rank 0 writes it as `step_N` to where the run is kept while training goes on."""
        copy_state = functools.partial(self.host_copy.update, state) if self.rank == 0 else None
        self.saver.begin(state.step, reason, copy_state, dict(self._figures))

    def finish_saving(self) -> bool:
        """Waits for the checkpoint that is being written; False: the storage refused it."""
        return self.saver.finish()

    def validate(self, state: TrainingState) -> bool:
        """Loss on held-out text, logic problems and a sample; whether some rank has a reason to stop."""
        with doing(f"validating after step {state.step:,}"):
            return self.validator(state)

    def _tell_drain(self) -> None:
        if not self._drain_told:  # by every rank, as any may be the first to hear of it
            self.emit(Notice(text="a node of this run is being taken away: this step is finished and saved"))
        self._drain_told = True

    def _documents(self, positions: Sequence[int]) -> tuple[str, ...]:
        return tuple(f"{file}:{line}" for position in positions for file, line in self.plan.documents(position))

    def _remember(self, event: Event) -> None:
        """For Ray's result: plain numbers and strings only, as Ray writes them as JSON."""
        if self.rank == 0:
            self.saver.lines.append(to_line(event))
        match event:
            case StepDone():
                self._figures |= {"train_loss": event.train_loss, "tokens_per_second": event.tokens_per_second}
            case ValidationDone():
                self._figures |= {"validation_loss": event.validation_loss, "bits_per_byte": event.bits_per_byte}
            case SampleGenerated():
                self._figures |= {"sample": event.text}
