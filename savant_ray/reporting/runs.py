"""Summaries of runs from their records: a table of all runs, five lines about one."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from savant_ray.errors import SettingsError
from savant_ray.events import (
    AttemptEnded,
    AttemptStarted,
    CheckpointSaved,
    RunFailed,
    SampleGenerated,
    StepDone,
    ValidationDone,
)
from savant_ray.reporting.record import METRICS, parse_event
from savant_ray.reporting.text_tables import table_console
from savant_ray.reporting.wording import duration, escape_controls, figure, relative_path

STEP_PREFIX = json.dumps({"event": StepDone.kind})[:-1].encode()  # most lines are steps; only the last ones are parsed
RECENT_STEPS = 100
SAMPLE_WIDTH = 100  # characters
PIPE_WIDTH = 300  # columns if standard output is not a terminal, so that rows are not wrapped
# Takes the path of a file of the original script, or of a folder with such files, of which the one with the highest step in
# its name is used. Returns the step and the path of the file, or None if there is none.
NewestOriginal = Callable[[Path], tuple[int, Path] | None]


@dataclass(frozen=True)
class RunSummary:
    """Summary of one run; None = not in its record."""

    name: str
    folder: str
    # running, not started, finished, stopped, not saved (finished or stopped, but its last step could not be saved), failed
    # (by an error of a worker), interrupted (without a recorded end: killed, or ended by an error of the driver), or "file
    # of the original"
    state: str
    step: int
    max_steps: int | None
    train_loss: float | None
    validation_loss: float | None  # also None if it is not finite
    validation_step: int | None
    best_validation_loss: float | None
    best_validation_step: int | None
    tokens_per_second: float | None
    step_seconds: float | None  # median of recent steps
    checkpoint: str | None  # the newest in the record
    checkpoint_time: str | None
    sample: str | None
    sample_step: int | None
    last_time: str
    failure: str | None  # why it failed, or what is not saved

    @property
    def seconds_left(self) -> float | None:
        """Return the estimated remaining seconds at the speed of recent steps; None if the run is not running."""
        if self.state != "running" or self.step_seconds is None or self.max_steps is None:
            return None
        return (self.max_steps - self.step) * self.step_seconds


def find_runs(folders: Iterable[Path], newest_original: NewestOriginal = lambda path: None) -> list[Path]:
    """Return the folders with a record or with files of the original script.

    The search covers `folders`, the folders directly in them, and all levels below `savant_runs` in them. A path in
    `folders` may also be a file of the original script, which is then returned itself.
    """
    runs: list[Path] = []
    for folder in folders:
        if folder.is_file() and newest_original(folder):
            runs.append(folder)
        for subfolders in ("", "*/", "savant_runs/**/"):
            runs += [record.parent for record in sorted(folder.glob(subfolders + METRICS))]
            files = sorted(folder.glob(f"{subfolders}step_*.pt"))
            runs += [path for path in dict.fromkeys(file.parent for file in files) if newest_original(path)]
    return list(dict.fromkeys(path.resolve() for path in runs))


def summarize(
    run_folder: Path, is_in_use: Callable[[Path], bool], newest_original: NewestOriginal = lambda path: None
) -> RunSummary:
    """Summarize a run; `is_in_use` returns whether some process is training it.

    A folder with files of the original script is summarized from their names if no attempt has trained or saved in it.

    Raises:
        SettingsError: there is neither a record nor a file of the original script.
    """
    original = newest_original(run_folder)
    if not (run_folder / METRICS).is_file() and original is None:
        raise SettingsError(f"{run_folder}: no run (it has no {METRICS}); `savant runs` lists the runs in this folder")
    steps, newest, best = _read(run_folder / METRICS) if (run_folder / METRICS).is_file() else ([], {}, {})
    if original is not None and not {AttemptStarted.kind, CheckpointSaved.kind} & newest.keys():
        return _summarize_original(run_folder, *original)
    step = steps[-1] if steps else {}
    attempt, ended, validated = (newest.get(event.kind, {}) for event in (AttemptStarted, AttemptEnded, ValidationDone))
    saved, sample = newest.get(CheckpointSaved.kind, {}), newest.get(SampleGenerated.kind, {})
    state = "running" if is_in_use(run_folder) else _state(newest)
    times = [line["step_seconds"] for line in steps if line.get("step_seconds") is not None]
    return RunSummary(
        name=run_folder.resolve().name,
        folder=str(run_folder),
        state=state,
        step=max(step.get("step", 0), ended.get("step", 0), saved.get("step", 0)),
        max_steps=attempt.get("max_steps"),
        train_loss=step.get("train_loss"),
        validation_loss=validated.get("validation_loss"),
        validation_step=validated.get("step"),
        best_validation_loss=best.get("validation_loss"),
        best_validation_step=best.get("step"),
        tokens_per_second=step.get("tokens_per_second"),
        step_seconds=median(times) if times else None,
        checkpoint=f"step_{saved['step']}" if saved else None,
        checkpoint_time=saved.get("time"),
        sample=sample.get("text"),
        sample_step=sample.get("step"),
        last_time=max((line.get("time", "") for line in [step, *newest.values()] if line), default=""),
        failure=_failure(state, newest),
    )


def _summarize_original(path: Path, step: int, newest: Path) -> RunSummary:
    """Summarize a file of the original script from its name and modification time, without opening it."""
    time = datetime.fromtimestamp(newest.stat().st_mtime, UTC).isoformat()
    unknown: dict[str, Any] = {field.name: None for field in fields(RunSummary)}
    known = dict(name=path.resolve().name, folder=str(path), state="file of the original", step=step, last_time=time)
    return RunSummary(**{**unknown, **known, "checkpoint": newest.name, "checkpoint_time": time})


def print_table(runs: Iterable[RunSummary]) -> None:
    """Print one row per run, and below the table which runs have not saved their last step."""
    runs = list(runs)
    table = Table("run", "state", "step", "loss", "validation", "last checkpoint", "last event", box=None)
    for run in runs:
        steps = f"{run.step:,}" + ("" if run.max_steps is None else f" of {run.max_steps:,}")
        losses = ("" if loss is None else f"{loss:.4f}" for loss in (run.train_loss, run.validation_loss))
        table.add_row(
            escape_controls(relative_path(Path(run.folder))),
            run.state,
            steps,
            *losses,
            run.checkpoint or "none",
            ago(run.last_time),
        )
    table_console(PIPE_WIDTH).print(table)
    for run in runs:
        if run.state == "not saved":
            print(escape_controls(f"{relative_path(Path(run.folder))}: {run.failure}"))


def status(run: RunSummary) -> str:
    """Return five lines about a run."""
    last_event = f", last event {ago(run.last_time)}" if run.last_time else ""
    failure = f": {run.failure}" if run.failure else ""
    progress = [f"step {run.step:,}" if run.max_steps is None else f"step {run.step:,} of {run.max_steps:,}"]
    if run.train_loss is not None:
        progress.append(f"loss {run.train_loss:.4f}")
    if run.tokens_per_second is not None:
        progress.append(f"{run.tokens_per_second:,.0f} tokens/s")
    if run.seconds_left is not None:
        progress.append(f"{duration(run.seconds_left)} left")
    lines = [
        f"{run.name}: {run.state}{last_event}{failure}",
        " · ".join(progress),
        _validation(run),
        f"saved {run.checkpoint}, {ago(run.checkpoint_time)}" if run.checkpoint_time else "no checkpoint yet",
        _sample(run),
    ]
    return escape_controls("\n".join(line.replace("\n", " ") for line in lines))


def to_json(runs: Iterable[RunSummary]) -> str:
    """Return the summaries as JSON in ASCII, because in standard output other characters may become invalid escapes."""
    return json.dumps([{**asdict(run), "seconds_left": run.seconds_left} for run in runs], indent=2)


def ago(time: str | None) -> str:
    """Return `12 min 5 s ago` for an ISO time."""
    if not time:
        return "unknown"
    return f"{duration(max(0.0, (datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds()))} ago"


def _read(path: Path) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]], dict[str, Any]]:
    """Return the recent steps, the newest line of each other kind, and the best validation.

    The end of an attempt is left out if another attempt has started after it.
    """
    recent: deque[bytes] = deque(maxlen=RECENT_STEPS)
    newest: dict[str, dict[str, Any]] = {}
    best: dict[str, Any] = {}
    with path.open("rb") as file:
        for text in file:
            if text.startswith(STEP_PREFIX):
                recent.append(text)
            elif (line := parse_event(text)) is not None:
                if line["event"] == AttemptStarted.kind:
                    newest.pop(AttemptEnded.kind, None)  # its step may be after those that this attempt repeats
                newest.pop(line["event"], None)  # inserted again below, so that kinds are ordered by their newest line
                newest[line["event"]] = line
                loss = line.get("validation_loss")
                if loss is not None and loss <= best.get("validation_loss", loss):
                    best = line
    return [line for text in recent if (line := parse_event(text)) is not None], newest, best


def _state(newest: dict[str, dict[str, Any]]) -> str:
    """Return the state of a run that is not running, from the newest start or end of an attempt."""
    last = [kind for kind in newest if kind in (AttemptStarted.kind, AttemptEnded.kind, RunFailed.kind)][-1:]
    if last == [RunFailed.kind]:
        return "failed"
    if last == [AttemptEnded.kind]:
        return ending(newest[AttemptEnded.kind])
    return "interrupted" if last else "not started"


def ending(line: dict[str, Any]) -> str:
    """Return how an attempt ended, from its `end` line: finished, stopped, or not saved."""
    saved_step = line.get("saved_step")
    if isinstance(saved_step, int) and saved_step < line.get("step", 0):
        return "not saved"
    return "finished" if line.get("finished") else "stopped"


def not_saved(line: dict[str, Any]) -> str:
    """Describe an end without a checkpoint of its last step, from the `end` line."""
    start = f"resumes after step {line['saved_step']:,}" if line["saved_step"] else "begins again"
    return f"step {line['step']:,} could not be saved; the same command {start}"


def _failure(state: str, newest: dict[str, dict[str, Any]]) -> str | None:
    if state == "not saved":
        return not_saved(newest[AttemptEnded.kind])
    return newest[RunFailed.kind].get("text") if state == "failed" else None


def _validation(run: RunSummary) -> str:
    if run.validation_step is None:
        return "no validation yet"
    newest = f"validation loss {figure(run.validation_loss)}"
    if run.best_validation_loss is None:
        return newest
    return f"{newest} · best {run.best_validation_loss:.4f} at step {run.best_validation_step:,}"


def _sample(run: RunSummary) -> str:
    if run.sample is None:
        return "no sample yet"
    text = " ".join(run.sample.split())
    truncated = text if len(text) <= SAMPLE_WIDTH else f"{text[:SAMPLE_WIDTH]}…"
    return f"answered at step {run.sample_step:,}: {truncated}"
