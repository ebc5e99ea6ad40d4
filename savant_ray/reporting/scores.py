"""Tables of evaluation results."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track
from rich.table import Table

from savant_ray.reporting.text_tables import table_console
from savant_ray.reporting.wording import escape_controls, percent

Item = TypeVar("Item")
PIPE_WIDTH = 100  # columns of the tables if standard output is not a terminal


def with_progress(items: Iterable[Item], total: int) -> Iterable[Item]:
    """Yield the items; show a progress bar if standard error is a terminal."""
    console = Console(stderr=True)
    return track(items, "answering", total, console=console, transient=True, disable=not console.is_terminal)


def print_scores(result: dict[str, Any]) -> None:
    """Print one row per template, then all questions in trained wordings, then those in new wordings."""
    table = Table("template", "right", "questions", "95 % interval", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, score in result["templates"].items():
        table.add_row(escape_controls(name), *_row(score))
    table.add_section()
    table.add_row("all", *_row(result))
    if result["new_wordings"]["n"]:
        table.add_row("all, new wording", *_row(result["new_wordings"]))
    table_console(PIPE_WIDTH).print(table)


def print_depths(result: dict[str, Any]) -> None:
    """Print one row per number of loops."""
    table = Table("loops", "right", "questions", "95 % interval", "loss", "last loop changes", "cosine", box=None)
    for column in table.columns:
        column.justify = "right"
    for row in result["depths"]:
        figures = (row["loss"], row.get("residual"), row.get("cosine"))
        table.add_row(str(row["loops"]), *_row(row), *("–" if x is None else f"{x:.4f}" for x in figures))
    table_console(PIPE_WIDTH).print(table)


def _row(score: dict[str, Any]) -> list[str]:
    low, high = score["interval"]
    return [percent(score["score"]), f"{score['n']:,}", f"{percent(low)} – {percent(high)}"]
