"""The HTML report of one or several runs: one file that needs no network."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from savant_ray import __version__
from savant_ray.config import all_settings
from savant_ray.errors import SavantError
from savant_ray.locations import replacing
from savant_ray.reporting.page.charts import charts, smooth_span
from savant_ray.reporting.page.history import Attempt, History, read_history
from savant_ray.reporting.runs import ago
from savant_ray.reporting.wording import duration, escape_controls, figure, percent

REPORT = "report.html"  # in the run folder, unless another file is named
MAX_SAMPLES = 30  # steps with a sample on the page
MAX_PAUSE = 0.03  # between attempts on the timeline, as a fraction of the training time
MIN_BAR = 0.004  # width as a fraction of the training time, so that short attempts are visible


def write_page(run_folders: Sequence[Path], path: Path, is_in_use: Callable[[Path], bool]) -> None:
    """Write the report of one or several runs; `is_in_use` returns whether some process is training a run.

    Raises:
        SettingsError: a folder holds no run.
        SavantError: the file cannot be written.
    """
    page = render([read_history(folder, is_in_use) for folder in run_folders])
    try:
        is_special = path.is_symlink() or (path.exists() and not path.is_file())  # such as /dev/stdout
        if is_special:  # must not be replaced by a file
            path.write_text(page, encoding="utf-8")
        else:
            temporary = path.with_name(f"{path.name}.tmp")
            with replacing(path, temporary):
                temporary.write_text(page, encoding="utf-8")
    except OSError as error:
        raise SavantError(f"{path}: {error.strerror}") from error


def render(histories: Sequence[History]) -> str:
    """Return the HTML."""
    names = _names(histories)
    chart_data = charts(histories, names if len(names) > 1 else [""])
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            names=names,
            histories=histories,
            overviews=[dict(_overview(history)) for history in histories],
            timelines=[timeline(history.attempts) for history in histories],
            settings=_settings(histories),
            samples=_samples(histories),
            scores=_scores(histories),
            charts=_json(chart_data),
            n_charts=len(chart_data),
            span=max((smooth_span(len(history.steps["step"])) for history in histories), default=1),
            written=datetime.now(UTC),
            version=__version__,
            asset=_asset,
        )
    )


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("savant_ray.reporting.page", "assets"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters.update(
        duration=duration, percent=percent, escape_controls=escape_controls, clock=_clock, ago=ago
    )
    return environment


def _asset(name: str) -> str:
    """Return a file of the `assets` folder."""
    return (files("savant_ray.reporting.page") / "assets" / name).read_text(encoding="utf-8")


def _json(value: Any) -> str:
    """Return JSON for a script element, without any text that could end the element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


@dataclass(frozen=True)
class TimelineBar:
    """An attempt on the timeline; positions in percent of its width."""

    attempt: Attempt
    left: float
    width: float
    checkpoints: tuple[tuple[float, int], ...]  # (position, step)


def timeline(attempts: Sequence[Attempt]) -> list[TimelineBar]:
    """Return the bars of all attempts, proportional to time; long pauses are shortened, very short attempts lengthened."""
    trained = sum(attempt.seconds for attempt in attempts) or 1.0
    widths = [max(attempt.seconds / trained, MIN_BAR) for attempt in attempts]
    pauses = [min(max(after.started - before.ended, 0.0) / trained, MAX_PAUSE) for before, after in pairwise(attempts)]
    total = sum(widths) + sum(pauses)
    bars, left = [], 0.0
    for attempt, width, pause in zip(attempts, widths, [*pauses, 0.0], strict=False):
        positions = [(left + width * _elapsed_fraction(attempt, time), step) for time, step in attempt.checkpoints]
        marks = tuple((100 * position / total, step) for position, step in positions)
        bars.append(TimelineBar(attempt, 100 * left / total, 100 * width / total, marks))
        left += width + pause
    return bars


def _elapsed_fraction(attempt: Attempt, time: float) -> float:
    """Return the fraction of the attempt that had passed at `time`."""
    return min(1.0, (time - attempt.started) / attempt.seconds) if attempt.seconds > 0 else 1.0


def _names(histories: Sequence[History]) -> list[str]:
    """Return the runs' names, or the folders of runs with the same name."""
    counts = Counter(history.summary.name for history in histories)
    runs = [history.summary for history in histories]
    return [run.name if counts[run.name] == 1 else run.folder for run in runs]


def _overview(history: History) -> Iterator[tuple[str, str]]:
    """Yield the names and values of a run's overview."""
    run, steps = history.summary, history.steps
    yield "step", f"{run.step:,}" + ("" if run.max_steps is None else f" of {run.max_steps:,}")
    if run.train_loss is not None:
        yield "training loss", f"{run.train_loss:.4f}"
    if run.validation_step is not None:
        yield "validation loss", figure(run.validation_loss)
        yield "bits per byte", figure(history.validations[-1]["bits_per_byte"], digits=3)
    if run.best_validation_loss is not None:
        yield "best validation loss", f"{run.best_validation_loss:.4f} at step {run.best_validation_step:,}"
    if len(steps["step"]):
        yield "tokens trained on", f"{np.nansum(steps['tokens']):,.0f}"
        yield "throughput", f"{np.nanmedian(steps['tokens_per_second']):,.0f} tokens/s"
        if np.isfinite(steps["share_of_peak"]).any():
            yield "share of peak", percent(float(np.nanmedian(steps["share_of_peak"])))
        yield "memory", f"{np.nanmax(steps['memory_gb']):.2f} GiB at most"
        yield (
            "waiting for data",
            percent(float(np.nansum(steps["data_wait_seconds"]) / np.nansum(steps["step_seconds"]))),
        )
        yield "micro-batches skipped", f"{np.nansum(steps['skipped_micro_batches']):,.0f}"
        yield "spikes", f"{len(history.spikes):,}"
    n_attempts = len(history.attempts)
    yield "trained for", duration(history.seconds) + (f" in {n_attempts} attempts" if n_attempts > 1 else "")
    if run.seconds_left is not None:
        yield "left", duration(run.seconds_left)
    yield "last checkpoint", run.checkpoint or "none yet"


def _settings(histories: Sequence[History]) -> list[dict[str, Any]]:
    """Return each setting with its default and each run's value; empty if no record contains settings.

    A setting that did not exist in an older version has its default.
    """
    run_settings = [history.newest_attempt.get("settings", {}) for history in histories]
    if not any(run_settings):
        return []
    rows = []
    for setting in all_settings():
        section, _, name = setting.name.partition(".")
        default = _as_text(setting.default)
        values = [_as_text(settings.get(section, {}).get(name, setting.default)) for settings in run_settings]
        rows.append(
            {
                "name": setting.name,
                "description": setting.description,
                "default": default,
                "values": [value if settings else "–" for value, settings in zip(values, run_settings, strict=True)],
                "changed": any(value != default for value in values),
                "differs": len(set(values)) > 1,
            }
        )
    return rows


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _samples(histories: Sequence[History]) -> dict[str, Any]:
    """Return the prompts, and for up to `MAX_SAMPLES` steps a row with the step and each run's (sample, validation loss)."""
    by_step = [{line["step"]: line for line in history.samples} for history in histories]
    steps = sorted({step for samples in by_step for step in samples})
    indices = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MAX_SAMPLES)).round().astype(int))
    shown = [steps[index] for index in indices] if steps else []
    losses = [{line["step"]: line["validation_loss"] for line in history.validations} for history in histories]
    runs = list(zip(by_step, losses, strict=True))
    rows = [(step, [(samples.get(step), loss.get(step)) for samples, loss in runs]) for step in shown]
    prompts = list(dict.fromkeys(line["prompt"] for history in histories for line in history.samples))
    return {"prompts": prompts, "rows": rows, "n_steps": len(steps)}


def _scores(histories: Sequence[History]) -> dict[str, Any]:
    """Return the scores after the last step: `newest` of each run, and `rows` of (template, score of each run).

    A missing score is None; the result is empty if no run has one.
    """
    newest = [next((line for line in reversed(history.scores) if line.get("final")), None) for history in histories]
    if not any(newest):
        return {}
    scores = [line["templates"] if line else {} for line in newest]
    templates = sorted({name for run_scores in scores for name in run_scores})
    rows = [(name, [run_scores.get(name) for run_scores in scores]) for name in templates]
    return {"newest": newest, "rows": [*rows, ("all", newest)]}


def _clock(time: float | datetime) -> str:
    """Return `2026-01-31 17:05 UTC`; the page converts it to the reader's time zone."""
    moment = time if isinstance(time, datetime) else datetime.fromtimestamp(time, UTC)
    return f"{moment:%Y-%m-%d %H:%M} UTC"
