"""Promises 1 and 2 of docs/DESIGN.md: an interrupted run resumes and computes what an uninterrupted one does."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from tests.cluster.conftest import with_text
from tests.torture.promises import assert_same_run
from tests.torture.runner import STOPS, Torture, head_with_windows

Interruptions = tuple[tuple[str, str], ...]  # pairs of means and window; `make torture N=100` draws all of them
A_STOP_AND_A_KILL: Interruptions = (
    ("SIGTERM", "validation"),
    ("kill -9 a worker", "update"),
)
OTHERS: Interruptions = (
    ("job stop", "background write"),
    ("SIGINT", "handover"),
    ("SIGSTOP a worker", "accumulation"),
    ("SIGHUP", "save"),
    ("kill -9 the driver", "generation"),
)


@pytest.mark.slow
@pytest.mark.parametrize("interruptions", [A_STOP_AND_A_KILL, pytest.param(OTHERS, marks=pytest.mark.rare)])
def test_an_interrupted_run_equals_an_uninterrupted_one(interruptions: Interruptions, tmp_path: Path) -> None:
    folder = with_text(tmp_path)
    with head_with_windows(folder / "windows") as head:
        torture = Torture(head, folder, folder / "windows", sys.executable, max_steps=20)
        uninterrupted = torture.train_uninterrupted()
        for run in torture.interrupt(interruptions, random.Random(0)):
            assert_same_run(uninterrupted, run)
    assert [(each.method, each.window) for each in torture.done] == list(interruptions)
    assert all(each.repeated == 0 for each in torture.done if each.method in STOPS), torture.done
