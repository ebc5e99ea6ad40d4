"""Runs of a tiny model that are recorded and saved without Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from savant_ray.config import Config
from savant_ray.data.documents import Document
from savant_ray.data.stream import StepStream, StreamPlan
from savant_ray.data.tokenizer import Tokenizer
from savant_ray.events import AttemptStarted, Event, Rewound
from savant_ray.reporting.record import Record
from savant_ray.storage.local import LocalStorage
from savant_ray.training.checkpoint import write_checkpoint
from savant_ray.training.device import processor_name
from savant_ray.training.loop import train
from savant_ray.training.state import TrainingState, new_state
from savant_ray.training.step import MicroBatch, micro_batches
from savant_ray.worker.resume import load_newest, load_newest_checkpoint
from tests.data.without_ray import cache_of
from tests.training.tiny import CPU, MODEL, RecordingHost

VOCABULARY = 258  # a token for each byte, and two special ones
BeforeStep = Callable[[TrainingState, int], None]  # receives the number of the next step


def tiny_run_config(**training: Any) -> Config:
    settings = dict(
        max_steps=8, batch_size=2, accumulation=2, learning_rate=1e-2, precision="fp32", compile=False
    )  # fmt: skip
    return Config.from_dict(
        {
            "model": MODEL | {"vocab_size": VOCABULARY},
            "training": settings | training,
            "checkpoint": {"every_steps": 3},
        }
    )


def tiny_plan(tokenizer: Tokenizer, folder: Path, config: Config) -> StreamPlan:
    documents = [Document(number, f"{number} and {number * 7 % 10} are numbers") for number in range(40)]
    cache = cache_of(documents, tokenizer, config.model.max_seq_len, folder)
    return StreamPlan((str(cache.folder),), (1.0,), config.run.seed, config.training.effective_batch)


class SavingHost(RecordingHost):
    """A `Host` that writes the record and the checkpoints of a run folder."""

    def __init__(self, folder: Path, config: Config, plan: StreamPlan, before_step: BeforeStep, **stop: Any) -> None:
        super().__init__(**stop)
        self._config, self._plan, self._before_step = config, plan, before_step
        self._folder, self._record = folder, Record(folder)

    def emit(self, event: Event) -> None:
        super().emit(event)
        if isinstance(event, Rewound):
            self._record.rewind(event.step, repeats_validation=False)
        self._record.append(event)

    def restore(self, state: TrainingState) -> None:
        load_newest_checkpoint(state, LocalStorage(self._folder), allow_changes=False)

    def store_file(self, file: Path, name: str) -> str:
        return LocalStorage(self._folder).store_file(file, name)

    def local_batches(self, state: TrainingState) -> Iterator[list[MicroBatch]]:
        return local_batches(state, self._config, self._plan, self._before_step)

    def save(self, state: TrainingState, reason: str) -> None:
        write_checkpoint(self._folder, state.to_checkpoint(), {})


def train_recorded(
    folder: Path,
    config: Config,
    plan: StreamPlan,
    before_step: BeforeStep = lambda state, step: None,
    stop_at: int | None = None,
    **attempt: Any,
) -> TrainingState:
    """Train a run in one process, or continue it from its newest checkpoint; `attempt` are further fields of the event."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(config.run.seed)  # as a worker does; checkpoints contain the state of the generator
    state = new_state(config, CPU)
    load_newest(state, config, LocalStorage(folder), allow_changes=False)
    host = SavingHost(folder, config, plan, before_step, stop_at=stop_at)
    host.step = state.step
    host.emit(attempt_event(state, config, **attempt))
    train(state, config, host.local_batches(state), host)
    return state


def attempt_event(state: TrainingState, config: Config, **fields: Any) -> AttemptStarted:
    defaults: dict[str, Any] = dict(
        step=state.step,
        workers=1,
        device="cpu",
        parameters=1,
        max_steps=config.training.max_steps,
        effective_batch=config.training.effective_batch,
        validates_first=False,
        precision=state.settings.precision,
        threads=torch.get_num_threads(),
        versions={"torch": str(torch.__version__)},
        processor=processor_name(),
        settings=config.to_dict(),
    )
    return AttemptStarted(**defaults | fields)


def local_batches(
    state: TrainingState, config: Config, plan: StreamPlan, before_step: BeforeStep
) -> Iterator[list[MicroBatch]]:
    plan = replace(plan, effective_batch=config.training.effective_batch, left_out=state.left_out)
    stream = StepStream(plan, rank=0, world_size=1)
    while state.step < config.training.max_steps:
        step = stream.read_step(state.position)
        before_step(state, state.step + 1)
        yield micro_batches(step.sequences, step.positions, config)
