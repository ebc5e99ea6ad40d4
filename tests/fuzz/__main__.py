"""`make fuzz N=100000`: so many cases of each cheap property, a share of it of those that cost more."""

from __future__ import annotations

import importlib
import re
import sys
import time
import traceback

from rich.console import Console
from rich.table import Table

from tests.fuzz.property import PROPERTIES, Property
from tests.tracked_files import tracked_files

SECONDS_BETWEEN_REMARKS = 30.0  # into a file; on a terminal it is told all the time


def collect() -> list[Property]:
    """The properties of every module beside this one."""
    for path in tracked_files("tests/fuzz/test_*.py"):
        importlib.import_module(f"tests.fuzz.{path.stem}")
    return PROPERTIES


def fuzz(wanted: Property, cases: int, console: Console) -> tuple[int, float, bool]:
    """Cases done, seconds, and whether it held; says how far it is, and what does not hold."""
    started = said = time.monotonic()
    done, holds = 0, True
    with console.status(wanted.name) as status:
        try:
            for done in wanted.run(cases):
                status.update(f"{wanted.name}: {done:,} of {cases:,}")
                if not console.is_terminal and time.monotonic() - said > SECONDS_BETWEEN_REMARKS:
                    said = time.monotonic()
                    console.print(f"{wanted.name}: {done:,} of {cases:,} …")
        except Exception as failure:
            traceback.print_exception(failure)
            holds = False
    seconds = time.monotonic() - started
    console.print(f"{'' if holds else 'FAILED: '}{wanted.name}: {done:,} cases in {seconds:.0f} s")
    return done, seconds, holds


def main(n: int, words: str = "") -> int:
    """Tries the properties whose names match `words`, all by default, and prints what was done; 1 if one does not hold."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    table = Table("property", "cases", "what was generated", "s", box=None)
    failed = 0
    for wanted in collect():
        if re.search(words, wanted.name):
            done, seconds, holds = fuzz(wanted, max(1, n // wanted.one_in), console)
            failed += not holds
            table.add_row(wanted.name, f"{done:,}" if holds else "FAILED", wanted.generated, f"{seconds:.0f}")
    console.print(table)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000, " ".join(sys.argv[2:])))
