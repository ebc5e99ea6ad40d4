"""`make torture N=100`: as many interruptions of 60-step runs, each of which must end as the one that nobody disturbed."""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from tests.cluster.conftest import with_text
from tests.torture.promises import expect_the_same_run
from tests.torture.runner import Torture, planned, tortured_head
from tests.torture.table import costs, hits

if __name__ == "__main__":
    n, seed = (int(argument) for argument in [*sys.argv[1:], "100", "0"][:2])
    console = Console(width=120)
    with tempfile.TemporaryDirectory(prefix="torture") as scratch:
        folder = with_text(Path(scratch))
        with tortured_head(folder / "windows") as head:
            torture = Torture(head, folder, folder / "windows", sys.executable)
            straight = torture.train_straight()
            chance = random.Random(seed)
            torture.interrupt(planned(n, chance), chance, console.print)
            for run in torture.trained:
                expect_the_same_run(straight, run)
    console.print(hits(torture.done), costs(torture.done))
    console.print(f"{len(torture.done)} interruptions survived; {len(torture.trained)} runs, each bit for bit the same")
