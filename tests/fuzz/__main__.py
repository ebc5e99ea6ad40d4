"""`make fuzz N=100000`: N cases of each property, or a fraction of N where a case takes longer."""

from __future__ import annotations

import importlib
import re
import sys
import time
import traceback

from rich.console import Console
from rich.table import Table

from tests.fuzz.property import INPUTS, PROPERTIES, Property
from tests.tracked_files import tracked_files

SECONDS_BETWEEN_LINES = 30.0  # of progress, if the output is not a terminal


def collect() -> list[Property]:
    """Import the test modules in this folder and return the properties that they register."""
    for path in tracked_files("tests/fuzz/test_*.py"):
        importlib.import_module(f"tests.fuzz.{path.stem}")
    return PROPERTIES


def fuzz(tested: Property, cases: int, console: Console) -> tuple[int, float, bool]:
    """Test a property and print progress and failures; return the number of cases, seconds, and whether it held."""
    started = last_line = time.monotonic()
    done, holds = 0, True
    with console.status(tested.name) as status:
        try:
            for done in tested.run(cases):
                status.update(f"{tested.name}: {done:,} of {cases:,}")
                if not console.is_terminal and time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
                    last_line = time.monotonic()
                    console.print(f"{tested.name}: {done:,} of {cases:,} …")
        except Exception as failure:
            traceback.print_exception(failure)
            holds = False
    seconds = time.monotonic() - started
    console.print(f"{'' if holds else 'FAILED: '}{tested.name}: {done:,} cases in {seconds:.0f} s")
    return done, seconds, holds


def main(n: int, pattern: str = "") -> int:
    """Test the properties whose names match the regular expression, print a table, and return 1 if one does not hold."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    table = Table("property", "cases", "generated input", "s", box=None)
    failed = 0
    for tested in collect():
        if re.search(pattern, tested.name):
            done, seconds, holds = fuzz(tested, max(1, n // tested.one_in), console)
            failed += not holds
            table.add_row(tested.name, f"{done:,}" if holds else "FAILED", tested.generated, f"{seconds:.0f}")
    console.print(table)
    if INPUTS:
        readers = Table("damaged or senseless inputs read as", "inputs", box=None)
        for reader, inputs in sorted(INPUTS.items()):
            readers.add_row(reader, f"{inputs:,}")
        readers.add_row("in total", f"{INPUTS.total():,}")
        console.print(readers)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000, " ".join(sys.argv[2:])))
