"""The console for tables, and the output of `savant data`: counts, lengths and examples of each source."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from savant_ray.reporting.wording import escape_controls, percent

BAR_WIDTH = 40
UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "bytes"))


def table_console(pipe_width: int, soft_wrap: bool = False) -> Console:
    """Return a console for standard output with `pipe_width` columns if it is not a terminal.

    It prints texts as they are: names of files, runs and questions may contain `[a]` or `:a:`, which rich would interpret.
    """
    width = None if sys.stdout.isatty() else pipe_width
    return Console(width=width, soft_wrap=soft_wrap, markup=False, emoji=False)


def print_text_statistics(sources: Sequence[Mapping[str, Any]], plan: Mapping[str, Any]) -> None:
    """Print the statistics of all sources, and how many epochs of each the run would read.

    Args:
        sources: as `data.text_statistics.TextStatistics` has them, with `estimate`: the factor from what was read to the
            complete source.
        plan: `sequence_length`, `effective_batch`, `max_steps`, and `fractions`: of the sequences, for each source.
    """
    console = table_console(120, soft_wrap=True)
    for source in sources:
        _print_source(console, source)
    _print_plan(console, sources, plan)


def _print_source(console: Console, source: Mapping[str, Any]) -> None:
    console.print(Text(escape_controls(source["name"]), style="bold"))
    is_complete = source["is_limit_reached"] or source["bytes_read"] == source["bytes"]
    factor = source["estimate"]
    about = "" if is_complete else "about "
    scale, unit = next((scale, unit) for scale, unit in UNITS if source["bytes"] >= scale or scale == 1)
    read = f"{source['bytes_read'] / scale:,.1f} of {source['bytes'] / scale:,.1f} {unit}"
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    rows = {
        "read": f"{read} in {source['files']:,} file{'s' * (source['files'] != 1)}"
        + (
            " (up to the limit)"
            if source["is_limit_reached"]
            else " (a sample; --full reads all of it)" * (not is_complete)
        ),
        "documents": f"{about}{round(source['documents'] * factor):,}",
        "tokens": f"{about}{round(source['tokens'] * factor):,}",
        "trained tokens": f"{_percent_of(source['trained_tokens'], source['tokens'])} of the tokens",
        "length, tokens": f"{source['shortest']:,} to {source['longest']:,}, median {source['median']:,}",
        "padding": f"{_percent_of(source['padding'], source['tokens'] + source['padding'])} of the positions",
        "cut documents": f"{source['cut_documents']:,} ({_percent_of(source['cut_documents'], source['documents'])})",
        "duplicates": f"{source['duplicates']:,} ({_percent_of(source['duplicates'], source['documents'])})",
        "filtered": f"{source['filtered']:,} of {source['records']:,} records",
        "invalid": f"{source['bad_records']:,} of {source['records']:,} records",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    if not source["documents"]:
        console.print(Text("    warning: no documents, so this source cannot be trained on", style="bold red"))
    for problem in source["first_bad_records"]:
        console.print(Text(f"    {escape_controls(problem)}", style="red"))
    _print_lengths(console, source["lengths"])
    for number, pieces in enumerate(source["examples"], start=1):
        console.print(Text(f"  example {number}", style="dim"))
        console.print(_rendered(pieces))
    console.print()


def _print_lengths(console: Console, lengths: Mapping[str, int]) -> None:
    if not lengths:
        return
    most = max(lengths.values())
    table = Table("tokens", "documents", "", box=None, padding=(0, 2, 0, 2))
    table.columns[1].justify = "right"
    for name, n_documents in lengths.items():
        table.add_row(name, f"{n_documents:,}", "█" * round(BAR_WIDTH * n_documents / most))
    console.print(table)


def _rendered(pieces: Sequence[tuple[str, bool]]) -> Text:
    """Return a document in which what is not trained on is dim on a terminal, and in ⟦brackets⟧ elsewhere."""
    text = Text("    ")
    for piece, is_trained in pieces:
        shown = escape_controls(piece).replace("\n", "\n    ")
        if sys.stdout.isatty():
            text.append(shown, style="green" if is_trained else "dim")
        else:
            text.append(shown if is_trained else f"⟦{shown}⟧")
    return text


def _print_plan(console: Console, sources: Sequence[Mapping[str, Any]], plan: Mapping[str, Any]) -> None:
    batch, steps = plan["effective_batch"], plan["max_steps"]
    table = Table("source", "of the sequences", "sequences", "steps per epoch", f"epochs in {steps:,} steps", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for source, fraction in zip(sources, plan["fractions"], strict=True):
        n_sequences = round(source["sequences"] * source["estimate"])
        steps_per_epoch = n_sequences / (fraction * batch)
        epochs = steps / steps_per_epoch if n_sequences else 0.0
        table.add_row(
            escape_controls(source["name"]),
            percent(fraction),
            f"{n_sequences:,}",
            f"{steps_per_epoch:,.0f}" if steps_per_epoch >= 1 else "less than 1",
            f"{epochs:,.2f}",
        )
    console.print(f"sequences of {plan['sequence_length']:,} tokens, {batch:,} in a step")
    console.print(table)


def _percent_of(part: int, whole: int) -> str:
    return percent(part / whole if whole else 0.0)
