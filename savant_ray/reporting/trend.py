"""The course of a number in a few characters: ▇▅▄▃▃▂▂▁."""

from __future__ import annotations

import itertools
import math
from collections import deque
from statistics import fmean

HEIGHTS = "▁▂▃▄▅▆▇█"
WIDTH = 16  # characters


class Trend:
    """The recent values, each character the mean of as many."""

    def __init__(self, per_character: int = 8) -> None:
        self._values: deque[float] = deque(maxlen=WIDTH * per_character)

    def add(self, value: float) -> None:
        """The next value; one that is not finite leaves no trace."""
        if math.isfinite(value):
            self._values.append(value)

    def __str__(self) -> str:
        """From the lowest to the highest mean; empty before there are two values."""
        values = list(self._values)
        if len(values) < 2:
            return ""
        n = min(WIDTH, len(values))
        edges = [round(i * len(values) / n) for i in range(n + 1)]
        means = [fmean(values[start:end]) for start, end in itertools.pairwise(edges)]
        low, span = min(means), max(means) - min(means)
        return "".join(HEIGHTS[int((mean - low) / span * (len(HEIGHTS) - 1)) if span else 0] for mean in means)
