"""A run's record as columns of steps, launches, validations, samples and scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from savant_ray.events import (
    AttemptEnded,
    AttemptStarted,
    CheckpointSaved,
    DataPrepared,
    LogicScored,
    RunFailed,
    SampleGenerated,
    StepDone,
    ValidationDone,
    WorkersLost,
)
from savant_ray.reporting.record import METRICS, parsed
from savant_ray.reporting.runs import RunSummary, summarise

COLUMNS = (
    "step",
    "train_loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "tokens_per_second",
    "share_of_peak",
    "memory_gb",
    "data_wait_seconds",
    "step_seconds",
    "skipped_micro_batches",
)


@dataclass
class Launch:
    """The workers of one attempt, from the model being built to their end."""

    started: float  # seconds since the epoch, like all times here
    ended: float  # when it was heard of last
    first_step: int  # updates done before it
    last_step: int
    ending: str = "killed"  # finished, stopped, failed, workers lost, running, or killed without a word
    reason: str = ""
    checkpoints: list[tuple[float, int]] = field(default_factory=list)  # (time, step)

    @property
    def seconds(self) -> float:
        """How long it lasted."""
        return self.ended - self.started


@dataclass
class History:
    """All that a record tells of a run."""

    summary: RunSummary
    steps: dict[str, np.ndarray]  # column -> [N], float64, NaN where unknown
    launches: list[Launch] = field(default_factory=list)
    attempt: dict[str, Any] = field(default_factory=dict)  # the newest line of each
    data: dict[str, Any] = field(default_factory=dict)
    validations: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Of all launches."""
        return sum(launch.seconds for launch in self.launches)


def read_history(run_folder: Path, is_in_use: Callable[[Path], bool]) -> History:
    """The run's record; a line that cannot be read is left out.

    Raises:
        SettingsError: there is no record in the folder.
    """
    history = History(summarise(run_folder, is_in_use), steps={})
    columns: dict[str, list[float]] = {name: [] for name in COLUMNS}
    for line in _lines(run_folder / METRICS):
        if line["event"] == StepDone.kind:
            for name, values in columns.items():
                value = line.get(name)
                values.append(math.nan if value is None else value)
        _note(line, history)
    history.steps = {name: np.asarray(values, dtype=np.float64) for name, values in columns.items()}
    if history.launches and history.summary.state == "running":
        history.launches[-1].ending = "running"
    return history


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for text in file:
            if (line := parsed(text)) is not None:
                yield line


def _note(line: dict[str, Any], history: History) -> None:
    if "time" not in line:  # damaged
        return
    time = datetime.fromisoformat(line["time"]).timestamp()
    kind = line["event"]
    if kind == DataPrepared.kind:
        history.data = line
    elif kind == AttemptStarted.kind:
        history.attempt = line
        history.launches.append(Launch(time, time, line.get("step", 0), line.get("step", 0)))
    elif kind == ValidationDone.kind:
        history.validations.append(line)
    elif kind == SampleGenerated.kind:
        history.samples.append(line)
    elif kind == LogicScored.kind:
        history.scores.append(line)
    if history.launches and kind != DataPrepared.kind:
        _continue(history.launches[-1], kind, time, line)


def _continue(launch: Launch, kind: str, time: float, line: dict[str, Any]) -> None:
    """What the newest launch did, or how it ended."""
    if kind in (AttemptEnded.kind, RunFailed.kind, WorkersLost.kind):
        launch.ended = time
    if kind == AttemptEnded.kind:
        launch.ending = "finished" if line.get("finished") else "stopped"
    elif kind == RunFailed.kind:
        launch.ending, launch.reason = "failed", line.get("text", "")
    elif kind == WorkersLost.kind:
        launch.ending, launch.reason = "workers lost", line.get("text", "")
    elif kind in (StepDone.kind, ValidationDone.kind, CheckpointSaved.kind):
        launch.ended, launch.last_step = max(launch.ended, time), max(launch.last_step, line["step"])
    if kind == CheckpointSaved.kind:
        launch.checkpoints.append((time, line["step"]))
