"""`make torture N=100 SEED=0`: N interruptions of 60-step runs, each of which must equal an uninterrupted run."""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

from rich.console import Console

import tests.conftest  # noqa: F401 - signals that nohup or a background shell ignores have their effects again
from tests.cluster.conftest import with_text
from tests.torture.promises import assert_same_run
from tests.torture.runner import Torture, head_with_windows, random_plan
from tests.torture.table import cost_table, hit_table

if __name__ == "__main__":
    n, seed = (int(argument) for argument in [*sys.argv[1:], "100", "0"][:2])
    console = Console(width=120)
    with tempfile.TemporaryDirectory(prefix="torture") as scratch:
        folder = with_text(Path(scratch))
        with head_with_windows(folder / "windows") as head:
            torture = Torture(head, folder, folder / "windows", sys.executable)
            uninterrupted = torture.train_uninterrupted()
            chance = random.Random(seed)
            for run in torture.interrupt(random_plan(n, chance), chance):
                assert_same_run(uninterrupted, run)
                console.print(
                    f"{len(torture.done)} interruptions in {len(torture.trained)} runs, all bit for bit equal to an "
                    "uninterrupted run"
                )
    console.print(hit_table(torture.done), cost_table(torture.done))
