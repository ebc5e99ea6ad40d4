"""DESIGN section 1, kept: whatever ends a run, the next start goes on as if nothing had happened."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.cluster.conftest import with_text
from tests.torture.promises import expect_the_same_run
from tests.torture.runner import STOPS, Torture, tortured_head


N = 4  # `make torture N=100` goes through every window many times


@pytest.mark.slow
def test_an_interrupted_run_is_the_run_that_nobody_interrupted(tmp_path: Path) -> None:
    folder = with_text(tmp_path)
    with tortured_head(folder / "windows") as head:
        torture = Torture(head, folder, folder / "windows", sys.executable)
        straight = torture.train_straight()
        torture.interrupt(N, seed=0, say=print)
    for run in torture.trained:
        expect_the_same_run(straight, run)
    assert len(torture.done) == N and len({each.window for each in torture.done}) == N
    assert all(each.repeated == 0 for each in torture.done if each.means in STOPS), torture.done
