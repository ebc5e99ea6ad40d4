"""Benchmarks by name, and functions that measure times and print figures.

A benchmark measures two programs alternately and reports the ratio, since other processes disturb absolute times on shared
machines. It is a function that returns `{figure: {ratio, rounds, spread, share_of_peak?, detail}}`: `ratio` is the median
over `rounds`, `spread` its minimum and maximum, `share_of_peak` the package's fraction of the peak FLOP/s.

The ratio is the package's value divided by that of the other program. Most values are speeds, so that 2 is twice as fast.
Those of `checkpoint` and `start` are times, and some are sizes of memory, so that less is better. The docstring of a
benchmark says how its ratio is defined if it differs from this.
"""

from __future__ import annotations

import difflib
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from savant_ray.errors import SettingsError

Figures = dict[str, dict[str, Any]]

BENCHMARKS = {
    "train": "training.run",
    "attention": "components.run_attention",
    "loss": "components.run_loss",
    "generate": "components.run_generation",
    "checkpoint": "checkpointing.run",
    "precision": "precision.run",
    "data": "preparation.run",
    "ray": "under_ray.run",
    "scaling": "scaling.run",
    "start": "start.run",
}
TABLE_WIDTH = 140


def run(name: str | None, json_path: Path | None = None) -> None:
    """Run one benchmark, or all if `name` is None, print tables, and write the figures to `json_path`.

    Raises:
        SettingsError: there is no benchmark of that name.
    """
    if name is not None and name not in BENCHMARKS:
        close = difflib.get_close_matches(name, BENCHMARKS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(BENCHMARKS)}"
        raise SettingsError(f"benchmark {name}: no such benchmark; {hint}")
    all_figures: Figures = {}
    for benchmark in BENCHMARKS if name is None else [name]:
        module, _, function = BENCHMARKS[benchmark].partition(".")
        log_progress(f"benchmark {benchmark}")
        figures = getattr(importlib.import_module(f"savant_ray.benchmarks.{module}"), function)()
        Console(width=TABLE_WIDTH).print(table(figures))
        all_figures |= figures
        if json_path is not None:
            json_path.write_text(json.dumps(all_figures, indent=1) + "\n")


def table(figures: Figures) -> Table:
    """Return a table with one row per figure."""
    result = Table("figure", "ratio", "rounds", "spread", "of peak", "detail")
    for name, figure in figures.items():
        low, high = figure["spread"]
        share_of_peak = f"{figure['share_of_peak']:.1%}" if "share_of_peak" in figure else ""
        ratio, rounds, spread = f"{figure['ratio']:.2f}", str(figure["rounds"]), f"{low:.2f}–{high:.2f}"
        result.add_row(name, ratio, rounds, spread, share_of_peak, figure["detail"])
    return result


def seconds(function: Callable[[], object]) -> float:
    """Return the wall-clock seconds that `function()` takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def alternate(rounds: int, *measures: Callable[[], float], warm_up: int = 1) -> list[list[float]]:
    """Call all measures in each round and return the results of each; the first `warm_up` rounds are discarded."""
    results = []
    for number in range(1, warm_up + rounds + 1):
        results.append([measure() for measure in measures])
        log_progress(f"round {number} of {warm_up + rounds}: {', '.join(f'{result:.4g}' for result in results[-1])}")
    return [list(measurements) for measurements in zip(*results[warm_up:], strict=True)]


def log_progress(text: str) -> None:
    """Print a line to standard error; some benchmarks take minutes, and standard output is for their tables."""
    # In one write, so that lines of several processes stay whole; `print` would write the newline by itself.
    sys.stderr.write(f"  {text}\n")
    sys.stderr.flush()


def figure(ratios: Sequence[float], detail: str, shares_of_peak: Sequence[float] = ()) -> dict[str, Any]:
    """Return median, minimum and maximum of the ratios, and the median share of peak if it was measured."""
    share = {"share_of_peak": round(statistics.median(shares_of_peak), 4)} if shares_of_peak else {}
    return {
        "ratio": round(statistics.median(ratios), 3),
        "rounds": len(ratios),
        "spread": [round(min(ratios), 3), round(max(ratios), 3)],
        **share,
        "detail": detail,
    }
