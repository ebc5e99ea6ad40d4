"""Processes that hang during a run: it goes on from the newest checkpoint, or ends with a clear error."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.cluster.conftest import Head, losses, records, start_job, wait_for
from tests.cluster.test_failures import training_workers
from tests.torture.hangs import FATAL, HARMLESS, RESTARTS, run_cases

pytestmark = [pytest.mark.slow, pytest.mark.rare]


def test_a_stopped_worker_is_killed_and_named_and_training_goes_on(head: Head, workplace: Path) -> None:
    run = workplace / "tiny"
    job = start_job(
        head,
        workplace,
        training__max_steps=12,
        training__accumulation=16,
        validation__every_steps=100,
        scaling__num_workers=2,
        scaling__resources_per_worker="{CPU: 1}",
        scaling__hang_seconds=10.0,
    )
    wait_for(lambda: (run / "step_4").exists() or job.poll() is not None)
    training_workers()[0].suspend()
    printed, _ = job.communicate(timeout=120)
    assert job.returncode == 0 and "made no progress for" in printed and "its process was stopped" in printed, printed
    assert "the steps since the last checkpoint are repeated" in printed
    assert len(losses(run)) == 12 and len(records(run, "attempt")) > 1
    (hang,) = (hang for hang in records(run, "hang") if hang["process"].endswith("stopped"))
    assert "TrainingThread" in hang["stack"]
    assert "made no progress" in records(run, "workers_lost")[0]["text"]


@pytest.mark.parametrize("kinds", [RESTARTS, HARMLESS, FATAL], ids=["restarts", "harmless", "fatal"])
def test_whatever_hangs_is_resolved_or_ends_with_an_error(kinds: tuple[str, ...], workplace: Path) -> None:
    cases = run_cases(iter(kinds), workplace, random.Random(0), print)
    assert [case.kind for case in cases] == list(kinds) and all(case.outcome for case in cases)
