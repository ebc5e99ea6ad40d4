"""Charts of the report: their curves, reduced to the points that a screen can show."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from savant_ray.reporting.page.history import History

MAX_POINTS = 1200  # about the width of a wide chart in pixels
SMOOTHING_SPANS = 50  # the smooth curve averages over 1/50 of the run
DIGITS = 5  # significant, in the JSON of the page


@dataclass(frozen=True)
class Figure:
    """A field of each step and how it is drawn."""

    title: str
    unit: str
    column: str
    scale: float = 1.0
    smooth: bool = True
    logarithmic: bool = False


FIGURES = (
    Figure("Learning rate", "", "learning_rate", smooth=False),
    Figure("Gradient norm", "before clipping", "grad_norm", logarithmic=True),
    Figure("Throughput", "tokens/s", "tokens_per_second"),
    Figure("Share of peak", "% of the speed of a large matrix product", "share_of_peak", scale=100),
    Figure("Memory", "GiB, rank 0", "memory_gb", smooth=False),
    Figure("Waiting for data", "ms a step", "data_wait_seconds", scale=1000),
)


def charts(histories: Sequence[History], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return all charts that have data, the loss first."""
    all_charts = [
        _chart("Loss", "nats per token", _loss_curves(histories, names)),
        _chart("Validation", "bits per byte", _validation_curves(histories, names, "bits_per_byte")),
        _chart("Logic score", "% right", _score_curves(histories, names)),
        _chart("Residual of each loop", "|s′ − s| / |s|", _loop_curves(histories, names, "residuals"), True),
        _chart("Similarity of tokens", "mean cosine after each loop", _loop_curves(histories, names, "cosines")),
        *(_chart(f.title, f.unit, _step_curves(histories, names, f), f.logarithmic) for f in FIGURES),
    ]
    return [chart for chart in all_charts if chart["steps"]]


def _chart(title: str, unit: str, curves: Sequence[Curve], logarithmic: bool = False) -> dict[str, Any]:
    return {"title": title, "unit": unit, "logarithmic": logarithmic, **aligned(curves)}


def _loss_curves(histories: Sequence[History], names: Sequence[str]) -> list[Curve]:
    figure = Figure("Loss", "", "train_loss")
    return _step_curves(histories, names, figure, "training") + _validation_curves(histories, names, "validation_loss")


def _step_curves(histories: Sequence[History], names: Sequence[str], figure: Figure, series: str = "") -> list[Curve]:
    curves = []
    for run, (history, name) in enumerate(zip(histories, names, strict=True)):
        values = history.steps[figure.column] * figure.scale
        if not np.isfinite(values).any():
            continue
        kept = downsampled(values)
        steps, label = history.steps["step"][kept], _label(name, series)
        curves.append(Curve(f"{label or 'each step'}", run, "raw", steps, values[kept]))
        if figure.smooth:
            curves.append(Curve(f"{label} smoothed".strip(), run, "smooth", steps, smoothed(values)[kept]))
        limit = history.newest_attempt.get("vram_limit_gb") if figure.column == "memory_gb" else None
        if limit is not None:
            curves.append(Curve(_label(name, "cap"), run, "limit", steps, np.full(len(steps), limit)))
    return curves


def _validation_curves(histories: Sequence[History], names: Sequence[str], field: str) -> list[Curve]:
    return _point_curves([history.validations for history in histories], names, "validation", field)


def _loop_curves(histories: Sequence[History], names: Sequence[str], field: str) -> list[Curve]:
    """Return one curve for each loop of each run."""
    curves = []
    for run, (history, name) in enumerate(zip(histories, names, strict=True)):
        lines = [line for line in history.validations if line.get(field)]
        for loop in range(max((len(line[field]) for line in lines), default=0)):
            by_step = {line["step"]: line[field][loop] for line in lines if loop < len(line[field])}
            steps = np.array(sorted(by_step), dtype=np.float64)
            values = np.array([by_step[step] for step in steps], dtype=np.float64)  # None becomes NaN
            curves.append(Curve(_label(name, f"loop {loop + 1}"), run, "points", steps, values))
    return curves


def _score_curves(histories: Sequence[History], names: Sequence[str]) -> list[Curve]:
    return _point_curves([history.scores for history in histories], names, "logic", "score", scale=100)


def _point_curves(
    run_lines: Sequence[Sequence[dict[str, Any]]], names: Sequence[str], label: str, field: str, scale: float = 1.0
) -> list[Curve]:
    """Return one curve of a field for each run; the later of two lines of a step counts."""
    curves = []
    for run, (lines, name) in enumerate(zip(run_lines, names, strict=True)):
        by_step = {line["step"]: scale * line[field] for line in lines if line.get(field) is not None}
        steps = np.array(sorted(by_step), dtype=np.float64)
        if by_step:
            values = np.array([by_step[step] for step in steps])
            curves.append(Curve(_label(name, label), run, "points", steps, values))
    return curves


def _label(name: str, series: str) -> str:
    """Join the run's name, which is empty in a report of one run, and the name of the series."""
    return " ".join(part for part in (name, series) if part)


@dataclass(frozen=True)
class Curve:
    """Values over steps."""

    label: str
    run: int  # index; selects the color
    style: str  # "raw", "smooth", "points" or "limit"
    steps: np.ndarray  # [N], ascending
    values: np.ndarray  # [N]


def smooth_span(n: int) -> int:
    """Return the span, in steps, of the moving average over `n` steps."""
    return max(1, n // SMOOTHING_SPANS)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Return the bias-corrected exponential moving average `[N]`; values that are not finite are ignored."""
    series = pd.Series(np.where(np.isfinite(values), values, np.nan))
    return series.ewm(span=smooth_span(len(values)), ignore_na=True).mean().to_numpy()


def downsampled(values: np.ndarray, points: int = MAX_POINTS) -> np.ndarray:
    """Return ascending indices of the lowest and the highest value of each interval, so that no spike is lost.

    Half of the intervals are equally long, half grow with the step, so that a logarithmic axis has enough points.
    """
    n = len(values)
    if n <= points:
        return np.arange(n)
    linear, logarithmic = np.linspace(0, n, points // 4), np.geomspace(1, n, points // 4)
    edges = np.unique(np.concatenate([[0], linear, logarithmic]).astype(np.int64))
    low, high = (np.where(np.isfinite(values), values, fill) for fill in (np.inf, -np.inf))
    kept = [
        start + offset
        for start, end in itertools.pairwise(edges)
        for offset in (np.argmin(low[start:end]), np.argmax(high[start:end]))
    ]
    return np.unique([*kept, n - 1])


def aligned(curves: Sequence[Curve]) -> dict[str, Any]:
    """Return the curves over a common axis of steps as plain values for JSON; None where a curve has no point."""
    steps = np.unique(np.concatenate([curve.steps for curve in curves])) if curves else np.zeros(0)
    series = []
    for curve in curves:
        values = np.full(len(steps), np.nan)
        values[np.searchsorted(steps, curve.steps)] = curve.values
        series.append({"label": curve.label, "run": curve.run, "style": curve.style, "values": _plain_values(values)})
    return {"steps": steps.astype(int).tolist(), "series": series}


def _plain_values(values: np.ndarray) -> list[float | None]:
    return [float(f"{value:.{DIGITS}g}") if np.isfinite(value) else None for value in values]
