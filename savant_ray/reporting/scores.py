"""An exam's result as a table."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track
from rich.table import Table

from savant_ray.reporting.wording import percent, printable

Item = TypeVar("Item")


def with_progress(answers: Iterable[Item], total: int) -> Iterable[Item]:
    """The answers as they come, counted on a terminal."""
    console = Console(stderr=True)
    return track(answers, "answering", total, console=console, transient=True, disable=not console.is_terminal)


def print_scores(result: dict[str, Any]) -> None:
    """A template a row; below, all with trained wordings and all with new ones."""
    table = Table("template", "right", "questions", "95 % interval", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, score in result["templates"].items():
        table.add_row(printable(name), *_row(score))
    table.add_section()
    table.add_row("all", *_row(result))
    if result["new_wordings"]["n"]:
        table.add_row("all, new wording", *_row(result["new_wordings"]))
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def print_depths(result: dict[str, Any]) -> None:
    """A number of loops a row."""
    table = Table("loops", "right", "questions", "95 % interval", "loss", "last loop changes", "cosine", box=None)
    for column in table.columns:
        column.justify = "right"
    for each in result["depths"]:
        figures = (each["loss"], each.get("residual"), each.get("cosine"))
        table.add_row(str(each["loops"]), *_row(each), *("–" if x is None else f"{x:.4f}" for x in figures))
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def _row(score: dict[str, Any]) -> list[str]:
    low, high = score["interval"]
    return [percent(score["score"]), f"{score['n']:,}", f"{percent(low)} – {percent(high)}"]
