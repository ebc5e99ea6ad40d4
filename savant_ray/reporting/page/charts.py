"""Which curves are drawn together, and in which units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from savant_ray.reporting.page.curves import Curve, aligned, smoothed, worth_drawing
from savant_ray.reporting.page.history import History


@dataclass(frozen=True)
class Figure:
    """A figure of each step and how it is drawn."""

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
    Figure("Share of peak", "% of the matrix product's", "share_of_peak", scale=100),
    Figure("Memory", "GiB, peak of rank 0", "memory_gb", smooth=False),
    Figure("Waiting for data", "ms a step", "data_wait_seconds", scale=1000),
)


def charts(histories: Sequence[History], names: Sequence[str]) -> list[dict[str, Any]]:
    """All charts, the loss first; one that has nothing to show is left out."""
    all_charts = [
        _chart("Loss", "nats per token", _losses(histories, names)),
        _chart("Validation", "bits per byte", _validations(histories, names, "bits_per_byte")),
        _chart("Logic score", "% right", _scores(histories, names)),
        _chart("What each loop still changes", "|s′ − s| / |s|", _loops(histories, names, "residuals"), True),
        _chart("How alike tokens become", "mean cosine after each loop", _loops(histories, names, "cosines")),
        *(_chart(each.title, each.unit, _figures(histories, names, each), each.logarithmic) for each in FIGURES),
    ]
    return [chart for chart in all_charts if chart["steps"]]


def _chart(title: str, unit: str, curves: Sequence[Curve], logarithmic: bool = False) -> dict[str, Any]:
    return {"title": title, "unit": unit, "logarithmic": logarithmic, **aligned(curves)}


def _losses(histories: Sequence[History], names: Sequence[str]) -> list[Curve]:
    figure = Figure("Loss", "", "train_loss")
    return _figures(histories, names, figure, "training") + _validations(histories, names, "validation_loss")


def _figures(histories: Sequence[History], names: Sequence[str], figure: Figure, what: str = "") -> list[Curve]:
    curves = []
    for run, (history, name) in enumerate(zip(histories, names, strict=True)):
        values = history.steps[figure.column] * figure.scale
        if not np.isfinite(values).any():
            continue
        kept = worth_drawing(values)
        steps, label = history.steps["step"][kept], _label(name, what)
        curves.append(Curve(f"{label or 'each step'}", run, "raw", steps, values[kept]))
        if figure.smooth:
            curves.append(Curve(f"{label} smoothed".strip(), run, "smooth", steps, smoothed(values)[kept]))
        limit = history.attempt.get("vram_limit_gb") if figure.column == "memory_gb" else None
        if limit is not None:
            curves.append(Curve(_label(name, "cap"), run, "limit", steps, np.full(len(steps), limit)))
    return curves


def _validations(histories: Sequence[History], names: Sequence[str], field: str) -> list[Curve]:
    return _points([history.validations for history in histories], names, "validation", field)


def _loops(histories: Sequence[History], names: Sequence[str], field: str) -> list[Curve]:
    """A curve for each loop of each run."""
    curves = []
    for run, (history, name) in enumerate(zip(histories, names, strict=True)):
        told = [line for line in history.validations if line.get(field)]
        for loop in range(max((len(line[field]) for line in told), default=0)):
            of_step = {line["step"]: line[field][loop] for line in told if loop < len(line[field])}
            steps = np.array(sorted(of_step), dtype=np.float64)
            values = np.array([of_step[step] for step in steps], dtype=np.float64)  # None becomes NaN
            curves.append(Curve(_label(name, f"loop {loop + 1}"), run, "points", steps, values))
    return curves


def _scores(histories: Sequence[History], names: Sequence[str]) -> list[Curve]:
    return _points([history.scores for history in histories], names, "logic", "score", scale=100)


def _points(
    lines: Sequence[Sequence[dict[str, Any]]], names: Sequence[str], what: str, field: str, scale: float = 1.0
) -> list[Curve]:
    """A field of each run's lines; of two lines of a step the later counts."""
    curves = []
    for run, (told, name) in enumerate(zip(lines, names, strict=True)):
        of_step = {line["step"]: scale * line[field] for line in told if line.get(field) is not None}
        steps = np.array(sorted(of_step), dtype=np.float64)
        if of_step:
            values = np.array([of_step[step] for step in steps])
            curves.append(Curve(_label(name, what), run, "points", steps, values))
    return curves


def _label(name: str, what: str) -> str:
    """`name` is empty where there is one run only."""
    return " ".join(part for part in (name, what) if part)
