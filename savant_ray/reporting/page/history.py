"""A run's record as columns of steps, attempts, validations, samples and scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from savant_ray.events import (
    AttemptEnded,
    AttemptStarted,
    CheckpointSaved,
    DataPrepared,
    LogicScored,
    Rewound,
    RunFailed,
    SampleGenerated,
    SpikeFound,
    StepDone,
    ValidationDone,
    WorkersLost,
)
from savant_ray.reporting.record import METRICS, intact_events
from savant_ray.reporting.runs import RunSummary, ending, not_saved, summarize

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
class Attempt:
    """One start of the workers, from the moment they have built the model to their end; a restart by Ray is another one."""

    started: float  # seconds since the epoch, like all times here
    ended: float  # time of its newest step, validation or checkpoint, or of its end
    first_step: int  # updates done before the attempt
    last_step: int
    # finished, stopped, not saved, failed, workers lost, running, or killed: no event of its end
    ending: str = "killed"
    reason: str = ""
    checkpoints: list[tuple[float, int]] = field(default_factory=list)  # (time, step)

    @property
    def seconds(self) -> float:
        """Return the duration of the attempt."""
        return self.ended - self.started


@dataclass
class History:
    """The contents of a run's record."""

    summary: RunSummary
    steps: dict[str, np.ndarray]  # column -> [N], float64, NaN where unknown
    attempts: list[Attempt] = field(default_factory=list)
    newest_attempt: dict[str, Any] = field(default_factory=dict)  # the newest `attempt` line
    data: dict[str, Any] = field(default_factory=dict)  # the newest `data` line
    validations: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)
    spikes: list[tuple[SpikeFound, int | None]] = field(default_factory=list)  # and the step that training went back to

    @property
    def seconds(self) -> float:
        """Return the total duration of all attempts."""
        return sum(attempt.seconds for attempt in self.attempts)


def read_history(run_folder: Path, is_in_use: Callable[[Path], bool]) -> History:
    """Read a run's record; damaged lines are ignored.

    Raises:
        SettingsError: there is no record in the folder.
    """
    history = History(summarize(run_folder, is_in_use), steps={})
    columns: dict[str, list[float]] = {name: [] for name in COLUMNS}
    for line in intact_events(run_folder / METRICS):
        if line["event"] == StepDone.kind:
            for name, values in columns.items():
                value = line.get(name)
                values.append(math.nan if value is None else value)
        _add(line, history)
    history.steps = {name: np.asarray(values, dtype=np.float64) for name, values in columns.items()}
    if history.attempts and history.summary.state == "running" and history.attempts[-1].ending == Attempt.ending:
        history.attempts[-1].ending = "running"
    return history


def _add(line: dict[str, Any], history: History) -> None:
    time = datetime.fromisoformat(line["time"]).timestamp()
    kind = line["event"]
    if kind == DataPrepared.kind:
        with suppress(ValidationError):  # a damaged line
            TypeAdapter(DataPrepared).validate_python(line)
            history.data = line
    elif kind == AttemptStarted.kind:
        history.newest_attempt = line
        history.attempts.append(Attempt(time, time, line.get("step", 0), line.get("step", 0)))
    elif kind == ValidationDone.kind:
        history.validations.append(line)
    elif kind == SampleGenerated.kind:
        history.samples.append(line)
    elif kind == LogicScored.kind:
        history.scores.append(line)
    elif kind == SpikeFound.kind:
        with suppress(ValidationError):
            history.spikes.append((TypeAdapter(SpikeFound).validate_python(line), None))
    elif kind == Rewound.kind:
        with suppress(ValidationError):
            rewound = TypeAdapter(Rewound).validate_python(line)
            if (rewound.spike, rewound.step) not in history.spikes:  # restarted workers find it again
                history.spikes.append((rewound.spike, rewound.step))
    if history.attempts and kind != DataPrepared.kind:
        _update(history.attempts[-1], kind, time, line)


def _update(attempt: Attempt, kind: str, time: float, line: dict[str, Any]) -> None:
    """Update the newest attempt with its progress or its end."""
    if kind == WorkersLost.kind and attempt.ending != Attempt.ending:
        return  # it has ended, and these workers were lost before they had built the model
    if kind in (AttemptEnded.kind, RunFailed.kind, WorkersLost.kind):
        attempt.ended = time
    if kind == AttemptEnded.kind:
        attempt.ending = ending(line)
        attempt.reason = not_saved(line) if attempt.ending == "not saved" else ""
    elif kind == RunFailed.kind:
        attempt.ending, attempt.reason = "failed", line.get("text", "")
    elif kind == WorkersLost.kind:
        attempt.ending, attempt.reason = "workers lost", line.get("text", "")
    elif kind in (StepDone.kind, ValidationDone.kind, CheckpointSaved.kind):
        attempt.ended, attempt.last_step = max(attempt.ended, time), max(attempt.last_step, line["step"])
    if kind == CheckpointSaved.kind:
        attempt.checkpoints.append((time, line["step"]))
