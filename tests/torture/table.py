"""What a torture has shown: how often each window was hit by what, and what it cost."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence

from rich.table import Table

from tests.torture.runner import MEANS, WINDOWS, Interruption


def hits(done: Sequence[Interruption]) -> Table:
    """A row per window, a column per means."""
    counted = Counter((each.window, each.means) for each in done)
    table = Table("window", *MEANS, "all")
    for window in WINDOWS:
        row = [counted[window, means] for means in MEANS]
        table.add_row(window, *map(str, row), str(sum(row)))
    return table


def costs(done: Sequence[Interruption]) -> Table:
    """A row per means."""
    table = Table("means", "times", "steps repeated", "s to saved", "s to exit", caption="median (most)")
    for means in MEANS:
        mine = [each for each in done if each.means == means]
        table.add_row(
            means,
            str(len(mine)),
            _median_and_most(each.repeated for each in mine),
            _median_and_most(each.seconds_to_saved for each in mine),
            _median_and_most(each.seconds_to_exit for each in mine),
        )
    return table


def _median_and_most(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.3g} ({max(known):.3g})" if known else ""
