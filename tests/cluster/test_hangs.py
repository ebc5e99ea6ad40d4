"""Processes that hang during a run: it goes on from the newest checkpoint, or ends with a clear error."""

from __future__ import annotations

import os
import random
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.cluster.conftest import ROOT, Head, environment, losses, options, records, start_job, start_program, wait_for
from tests.cluster.test_failures import processes_of_job, training_workers
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
    printed, _ = job.communicate(timeout=600)
    assert job.returncode == 0 and "made no progress for" in printed and "its process was stopped" in printed, printed
    assert "the steps since the last checkpoint are repeated" in printed
    assert len(losses(run)) == 12 and len(records(run, "attempt")) > 1
    (hang,) = (hang for hang in records(run, "hang") if hang["process"].endswith("stopped"))
    assert "TrainingThread" in hang["stack"]
    assert "made no progress" in records(run, "workers_lost")[0]["text"]


def test_an_only_worker_that_hangs_in_its_start_is_killed_and_named_and_the_run_completes(workplace: Path) -> None:
    requests, run = workplace / "requests", workplace / "tiny"
    requests.mkdir()
    (requests / "0-start").touch()
    site = f"{ROOT / 'tests/torture/hang_site'}{os.pathsep}{ROOT}"
    command = [sys.executable, str(ROOT / "jobs/train.py"), *options(scaling__hang_seconds=5.0)]
    job = start_program(command, workplace, environment(HANGS=str(requests), PYTHONPATH=site))
    printed, _ = job.communicate(timeout=600)
    assert job.returncode == 0 and "worker 0 made no progress for" in printed, printed
    hang = records(run, "hang")[0]
    assert hang["activity"] == "starting" and "TrainingThread" in hang["stack"]
    assert len(losses(run)) == 8 and len(records(run, "workers")) > 1


def test_on_a_cluster_an_actor_between_driver_and_workers_that_is_stopped_ends_the_run_with_an_error(
    head: Head, workplace: Path
) -> None:
    job = start_job(head, workplace, training__max_steps=100_000)
    wait_for(lambda: (workplace / "tiny/step_4").exists() or job.poll() is not None)
    (bridge,) = processes_of_job("ray::Bridge")
    bridge.suspend()
    try:
        printed, _ = job.communicate(timeout=600)
    finally:
        with suppress(psutil.NoSuchProcess):
            bridge.kill()
    assert job.returncode == 1 and "ray::Bridge on this machine, has not answered for" in printed, printed
    assert "Run the same command again" in printed and "Traceback" not in printed


@pytest.mark.parametrize("kinds", [RESTARTS, HARMLESS, FATAL], ids=["restarts", "harmless", "fatal"])
def test_whatever_hangs_is_resolved_or_ends_with_an_error(kinds: tuple[str, ...], workplace: Path) -> None:
    cases = run_cases(iter(kinds), workplace, random.Random(0), print)
    assert [case.kind for case in cases] == list(kinds) and all(case.outcome for case in cases)
