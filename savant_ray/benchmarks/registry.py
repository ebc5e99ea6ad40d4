"""The benchmarks by name, and how their figures are shown.

A benchmark is a function that returns `{figure: {ratio, rounds, spread, detail}}`: `ratio` is the median over `rounds`
of two things measured in turn, `spread` its lowest and highest.
"""

from __future__ import annotations

import difflib
import importlib
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from savant_ray.errors import SettingsError

BENCHMARKS = {"data": "savant_ray.benchmarks.preparation"}


def run(name: str, json_path: Path | None = None) -> None:
    """Runs one benchmark, prints its table, and writes its figures to `json_path`.

    Raises:
        SettingsError: there is no benchmark of that name.
    """
    if name not in BENCHMARKS:
        close = difflib.get_close_matches(name, BENCHMARKS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(BENCHMARKS)}"
        raise SettingsError(f"benchmark {name}: no such benchmark; {hint}")
    figures = importlib.import_module(BENCHMARKS[name]).run()
    Console().print(table(figures))
    if json_path is not None:
        json_path.write_text(json.dumps(figures, indent=1) + "\n")


def table(figures: dict[str, dict[str, Any]]) -> Table:
    """A row per figure."""
    shown = Table("figure", "ratio", "rounds", "spread", "detail")
    for name, figure in figures.items():
        low, high = figure["spread"]
        shown.add_row(name, f"{figure['ratio']:.2f}", str(figure["rounds"]), f"{low:.2f}–{high:.2f}", figure["detail"])
    return shown
