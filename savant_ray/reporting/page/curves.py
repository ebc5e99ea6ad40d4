"""Thousands of steps as the few points that a screen can show, and as a smooth curve."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

POINTS = 1200  # about the pixels of a wide chart
SPANS = 50  # the smooth curve averages over a fiftieth of the run
DIGITS = 5


@dataclass(frozen=True)
class Curve:
    """Points over steps."""

    label: str
    run: int  # whose it is: its colour
    style: str  # "raw", "smooth", "points" or "limit"
    steps: np.ndarray  # [N], ascending
    values: np.ndarray  # [N]


def smooth_span(n: int) -> int:
    """Steps that the smooth curve of `n` steps averages over."""
    return max(1, n // SPANS)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Their exponential moving average `[N]`, unbiased from the first on; what is not finite is left out of it."""
    series = pd.Series(np.where(np.isfinite(values), values, np.nan))
    return series.ewm(span=smooth_span(len(values)), ignore_na=True).mean().to_numpy()


def worth_drawing(values: np.ndarray, points: int = POINTS) -> np.ndarray:
    """Indices of the lowest and the highest value of each stretch, ascending: no spike is lost.

    Half of the stretches are equally long, half grow with the step, so that a logarithmic axis has its points as well.
    """
    n = len(values)
    if n <= points:
        return np.arange(n)
    even, growing = np.linspace(0, n, points // 4), np.geomspace(1, n, points // 4)
    edges = np.unique(np.concatenate([[0], even, growing]).astype(np.int64))
    low, high = (np.where(np.isfinite(values), values, worst) for worst in (np.inf, -np.inf))
    kept = [
        start + part
        for start, end in itertools.pairwise(edges)
        for part in (np.argmin(low[start:end]), np.argmax(high[start:end]))
    ]
    return np.unique([*kept, n - 1])


def aligned(curves: Sequence[Curve]) -> dict[str, Any]:
    """Curves over one axis of steps, with None where a curve has no point; plain numbers for JSON."""
    steps = np.unique(np.concatenate([curve.steps for curve in curves])) if curves else np.zeros(0)
    series = []
    for curve in curves:
        values = np.full(len(steps), np.nan)
        values[np.searchsorted(steps, curve.steps)] = curve.values
        series.append({"label": curve.label, "run": curve.run, "style": curve.style, "values": _plain(values)})
    return {"steps": steps.astype(int).tolist(), "series": series}


def _plain(values: np.ndarray) -> list[float | None]:
    return [float(f"{value:.{DIGITS}g}") if np.isfinite(value) else None for value in values]
