"""The report: what the template shows, in one HTML file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from savant_ray import __version__
from savant_ray.config import setting_rows
from savant_ray.errors import SavantError
from savant_ray.reporting.page.charts import charts
from savant_ray.reporting.page.curves import smooth_span
from savant_ray.reporting.page.history import History, read_history
from savant_ray.reporting.page.timeline import timeline
from savant_ray.reporting.runs import ago
from savant_ray.reporting.wording import duration, percent, printable

MOST_SAMPLES = 30  # steps whose answers are shown; more would not be read


def write_page(run_folders: Sequence[Path], path: Path, is_in_use: Callable[[Path], bool]) -> None:
    """Writes the report of one or several runs; `is_in_use` says whether some process trains a run now.

    Raises:
        SettingsError: a folder holds no run.
        SavantError: the file cannot be written.
    """
    page = render([read_history(folder, is_in_use) for folder in run_folders])
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):  # such as /dev/stdout: it stays what it is
            path.write_text(page, encoding="utf-8")
        else:
            _replace(path, page)
    except OSError as error:
        raise SavantError(f"{path}: {error.strerror}") from error


def _replace(path: Path, page: str) -> None:
    aside = path.with_name(f"{path.name}.tmp")
    try:
        aside.write_text(page, encoding="utf-8")
        aside.replace(path)
    except OSError:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def render(histories: Sequence[History]) -> str:
    """The HTML."""
    names = _names(histories)
    drawn = charts(histories, names if len(names) > 1 else [""])
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            names=names,
            histories=histories,
            figures=[dict(_figures(history)) for history in histories],
            timelines=[timeline(history.launches) for history in histories],
            settings=_settings(histories),
            samples=_samples(histories),
            scores=_scores(histories),
            charts=_json(drawn),
            n_charts=len(drawn),
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
    environment.filters.update(duration=duration, percent=percent, printable=printable, clock=_clock, ago=ago)
    return environment


def _asset(name: str) -> str:
    """A file of ours."""
    return (files("savant_ray.reporting.page") / "assets" / name).read_text(encoding="utf-8")


def _json(value: Any) -> str:
    """For a script element: no text in it can end the element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _names(histories: Sequence[History]) -> list[str]:
    """What tells the runs apart: their names, or their folders where names are the same."""
    times = Counter(history.summary.name for history in histories)
    runs = [history.summary for history in histories]
    return [run.name if times[run.name] == 1 else run.folder for run in runs]


def _figures(history: History) -> Iterator[tuple[str, str]]:
    """What is said of a run at a glance."""
    run, steps = history.summary, history.steps
    yield "step", f"{run.step:,}" + ("" if run.max_steps is None else f" of {run.max_steps:,}")
    if run.train_loss is not None:
        yield "training loss", f"{run.train_loss:.4f}"
    if run.validation_loss is not None:
        yield "validation loss", f"{run.validation_loss:.4f}"
        yield "bits per byte", f"{history.validations[-1]['bits_per_byte']:.3f}"
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
    yield "trained for", duration(history.seconds) + _in_launches(len(history.launches))
    if run.seconds_left is not None:
        yield "left", duration(run.seconds_left)
    yield "last checkpoint", run.checkpoint or "none yet"


def _in_launches(n: int) -> str:
    return f" in {n} launches" if n > 1 else ""


def _settings(histories: Sequence[History]) -> list[dict[str, Any]]:
    """Each setting with its default and each run's value; empty where no record tells of any.

    A setting that an older version did not have counts as its default.
    """
    told = [history.attempt.get("settings", {}) for history in histories]
    if not any(told):
        return []
    rows = []
    for setting in setting_rows():
        section, _, name = setting.name.partition(".")
        default = _shown(setting.default)
        values = [_shown(settings.get(section, {}).get(name, setting.default)) for settings in told]
        rows.append(
            {
                "name": setting.name,
                "meaning": setting.meaning,
                "default": default,
                "values": [value if settings else "–" for value, settings in zip(values, told, strict=True)],
                "unusual": any(value != default for value in values),
                "differs": len(set(values)) > 1,
            }
        )
    return rows


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _samples(histories: Sequence[History]) -> dict[str, Any]:
    """Prompts, and the answers of a few steps: `rows` of a step and each run's sample, or None."""
    of_step = [{line["step"]: line for line in history.samples} for history in histories]
    steps = sorted({step for samples in of_step for step in samples})
    places = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MOST_SAMPLES)).round().astype(int))
    shown = [steps[place] for place in places] if steps else []
    losses = [{line["step"]: line["validation_loss"] for line in history.validations} for history in histories]
    runs = list(zip(of_step, losses, strict=True))
    rows = [(step, [(samples.get(step), loss.get(step)) for samples, loss in runs]) for step in shown]
    prompts = list(dict.fromkeys(line["prompt"] for history in histories for line in history.samples))
    return {"prompts": prompts, "rows": rows, "of": len(steps)}


def _scores(histories: Sequence[History]) -> dict[str, Any]:
    """Each run's newest final score or None, and `rows` of a template and each run's share; empty without any."""
    newest = [next((line for line in reversed(history.scores) if line.get("final")), None) for history in histories]
    if not any(newest):
        return {}
    shares = [line["templates"] if line else {} for line in newest]
    templates = sorted({name for share in shares for name in share})
    rows = [(name, [share.get(name) for share in shares]) for name in templates]
    return {"newest": newest, "rows": [*rows, ("all", newest)]}


def _clock(time: float | datetime) -> str:
    """`2026-01-31 17:05 UTC`; the page tells it in the reader's own time."""
    then = time if isinstance(time, datetime) else datetime.fromtimestamp(time, UTC)
    return f"{then:%Y-%m-%d %H:%M} UTC"
