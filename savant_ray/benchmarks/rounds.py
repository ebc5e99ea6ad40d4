"""Two things measured in turn, again and again: machines are shared, so only a ratio of neighbours counts."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

Figures = dict[str, dict[str, Any]]


def seconds(act: Callable[[], object]) -> float:
    """How long it takes, by the clock."""
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def in_turn(rounds: int, *measures: Callable[[], float], warm_up: int = 1) -> list[list[float]]:
    """What each measure gave in each round, told on the way; the first `warm_up` rounds are not counted."""
    results = []
    for number in range(1, warm_up + rounds + 1):
        results.append([measure() for measure in measures])
        tell(f"round {number} of {warm_up + rounds}: {', '.join(f'{result:.4g}' for result in results[-1])}")
    return [list(of_one) for of_one in zip(*results[warm_up:], strict=True)]


def tell(progress: str) -> None:
    """A line beside the figures, which go to standard output: some benchmarks take many minutes."""
    print(f"  {progress}", file=sys.stderr, flush=True)


def figure(ratios: Sequence[float], detail: str, shares_of_peak: Sequence[float] = ()) -> dict[str, Any]:
    """Medians, and the lowest and highest ratio."""
    share = {"share_of_peak": round(statistics.median(shares_of_peak), 4)} if shares_of_peak else {}
    return {
        "ratio": round(statistics.median(ratios), 3),
        "rounds": len(ratios),
        "spread": [round(min(ratios), 3), round(max(ratios), 3)],
        **share,
        "detail": detail,
    }
