"""Tables of interruptions: how often each method hit each window, and what the interruptions cost."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence

from rich.table import Table

from tests.torture.runner import METHODS, WINDOWS, Interruption


def hit_table(done: Sequence[Interruption]) -> Table:
    """Return the number of interruptions, with a row for each window and a column for each method."""
    counts = Counter((interruption.window, interruption.method) for interruption in done)
    table = Table("window", *METHODS, "all")
    for window in WINDOWS:
        row = [counts[window, method] for method in METHODS]
        table.add_row(window, *map(str, row), str(sum(row)))
    return table


def cost_table(done: Sequence[Interruption]) -> Table:
    """Return repeated steps and times, with a row for each method."""
    table = Table("method", "times", "steps repeated", "s to saved", "s to exit", caption="median (maximum)")
    for method in METHODS:
        interruptions = [interruption for interruption in done if interruption.method == method]
        table.add_row(
            method,
            str(len(interruptions)),
            _median_and_maximum(interruption.repeated for interruption in interruptions),
            _median_and_maximum(interruption.seconds_to_saved for interruption in interruptions),
            _median_and_maximum(interruption.seconds_to_exit for interruption in interruptions),
        )
    return table


def _median_and_maximum(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.3g} ({max(known):.3g})" if known else ""
