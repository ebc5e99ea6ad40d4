"""The benchmarks by name, and how their figures are shown.

A benchmark is a function that returns `{figure: {ratio, rounds, spread, share_of_peak?, detail}}`: `ratio` is the
median over `rounds` of two things measured in turn, `spread` its lowest and highest, `share_of_peak` what the first of
them makes of the machine (`benchmarks/peak.py`).
"""

from __future__ import annotations

import difflib
import importlib
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from savant_ray.benchmarks.rounds import tell
from savant_ray.errors import SettingsError

BENCHMARKS = {
    "train": "training.run",
    "attention": "pieces.run_attention",
    "loss": "pieces.run_loss",
    "generate": "generation.run",
    "checkpoint": "checkpointing.run",
    "precision": "precision.run",
    "data": "preparation.run",
    "ray": "under_ray.run",
    "scaling": "scaling.run",
    "start": "start.run",
}
WIDTH = 140


def run(name: str | None, json_path: Path | None = None) -> None:
    """Runs a benchmark, or all in turn, prints tables, and writes the figures to `json_path`.

    Raises:
        SettingsError: there is no benchmark of that name.
    """
    if name is not None and name not in BENCHMARKS:
        close = difflib.get_close_matches(name, BENCHMARKS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(BENCHMARKS)}"
        raise SettingsError(f"benchmark {name}: no such benchmark; {hint}")
    all_figures: dict[str, dict[str, Any]] = {}
    for each in BENCHMARKS if name is None else [name]:
        module, _, function = BENCHMARKS[each].partition(".")
        tell(f"benchmark {each}")
        figures = getattr(importlib.import_module(f"savant_ray.benchmarks.{module}"), function)()
        Console(width=WIDTH).print(table(figures))
        all_figures |= figures
        if json_path is not None:
            json_path.write_text(json.dumps(all_figures, indent=1) + "\n")


def table(figures: dict[str, dict[str, Any]]) -> Table:
    """A row per figure."""
    shown = Table("figure", "ratio", "rounds", "spread", "of peak", "detail")
    for name, figure in figures.items():
        low, high = figure["spread"]
        share = f"{figure['share_of_peak']:.1%}" if "share_of_peak" in figure else ""
        ratio, rounds, spread = f"{figure['ratio']:.2f}", str(figure["rounds"]), f"{low:.2f}–{high:.2f}"
        shown.add_row(name, ratio, rounds, spread, share, figure["detail"])
    return shown
