"""Faults during a run: it continues if it can, otherwise it ends with the cause and advice."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from unittest import mock

import psutil
import pytest

from savant_ray.training.checkpoint import checkpoints
from tests.cluster.conftest import ROOT, Head, losses, records, run_job, running_head, start_job, wait_for

pytestmark = pytest.mark.slow


def steps_saved(run: Path) -> list[str]:
    return [folder.name for folder in checkpoints(run)]


# Python imports this file at its start when its folder is on PYTHONPATH.
FULL_DISK = """
import errno, os
rename = os.rename

def full(source, target, **options):
    if os.path.basename(target) in ("step_4", "step_8"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), target)
    return rename(source, target, **options)

os.rename = full
"""


@pytest.mark.rare
def test_training_continues_with_a_warning_if_a_checkpoint_cannot_be_written(workplace: Path) -> None:
    run, site = workplace / "tiny", workplace / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(FULL_DISK)
    with mock.patch.dict(os.environ, {"PYTHONPATH": f"{site}{os.pathsep}{ROOT}"}), running_head() as head:
        code, printed = run_job(head, workplace)
        assert "WARNING: step 4 could not be saved" in printed and len(losses(run)) == 8, printed
        assert code == 4 and "step 8 could not be saved" in printed and "resume from the beginning" in printed, printed
        assert [line["step"] for line in records(run, "checkpoint_failure")] == [4, 8] and steps_saved(run) == []


def test_a_run_that_diverges_ends_with_advice(head: Head, workplace: Path) -> None:
    hot = {"training__learning_rate": 3e38, "training__weight_decay": 1.0, "training__warmup_fraction": 0.0}
    code, printed = run_job(head, workplace, **hot, training__max_skipped_steps=3)
    assert code == 1 and "3 steps in a row" in printed and "Lower training.learning_rate" in printed, printed
    assert "Traceback" not in printed
    run = workplace / "tiny"
    skipped = records(run, "skip")
    assert skipped and all(
        skip["positions"] and "savant_dataset_train.jsonl:" in skip["documents"][0] for skip in skipped
    )
    assert len(records(run, "attempt")) == 1, "what no retry can mend is not tried again"


NEVER_AGAIN = {"training__max_steps": 2000, "scaling__max_failures": 0}


def test_workers_that_fail_too_often_end_the_run_and_the_message_says_how_to_resume(
    head: Head, workplace: Path
) -> None:
    job = start_job(head, workplace, **NEVER_AGAIN)
    wait_for(lambda: steps_saved(workplace / "tiny"))
    (worker,) = training_workers()
    os.kill(worker.pid, signal.SIGKILL)
    printed, _ = job.communicate(timeout=600)
    assert job.returncode == 1 and "run the same command again" in printed, printed
    assert "Traceback" not in printed


@pytest.mark.rare
def test_an_error_in_a_worker_names_it_its_cause_and_the_last_checkpoint(head: Head, workplace: Path) -> None:
    code, printed = run_job(head, workplace)
    assert code == 0, printed
    (shard,) = workplace.glob("cache/savant_dataset_val-*/shard-*.arrow")
    log = workplace / "tiny/training_log.txt"
    starts = log.read_text().count("starting workers")
    job = start_job(head, workplace, **NEVER_AGAIN)
    wait_for(lambda: log.read_text().count("starting workers") > starts)  # until then the driver would mend it
    shard.write_bytes(bytes(shard.stat().st_size))  # what reads it raises a ValueError, in the worker only
    printed, _ = job.communicate(timeout=600)
    assert job.returncode == 1 and "error: worker 0: " in printed and "Not an Arrow file" in printed, printed
    assert "run the same command again to resume from step_8" in printed and "Traceback" not in printed, printed


def training_workers() -> list[psutil.Process]:
    return processes_of_job("RayTrainWorker")


def processes_of_job(title: str) -> list[psutil.Process]:
    """Return those of the one job that runs on the head, which is a child of this process."""
    processes = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has exited since it was listed, or is a zombie
            if title in " ".join(process.cmdline()):
                processes.append(process)
    return processes


@pytest.mark.parametrize("second", [pytest.param(False, marks=pytest.mark.rare), True], ids=["once", "twice"])
def test_ctrl_c_during_compilation_saves_the_first_step_and_a_second_one_exits(
    second: bool, head: Head, workplace: Path
) -> None:
    patient = {"run__grace_seconds": 600}  # compiling may take longer than the usual 30 s, and the step be given up
    job = start_job(head, workplace, training__max_steps=60, training__compile="true", **patient)
    run = workplace / "tiny"
    wait_for(lambda: (run / "metrics.jsonl").exists() and records(run, "attempt"))  # what comes next is the first step
    workers = training_workers()
    assert workers
    job.send_signal(signal.SIGINT)
    if second:
        wait_for(lambda: "stopping: " in (run / "training_log.txt").read_text())
        job.send_signal(signal.SIGINT)
    printed, _ = job.communicate(timeout=600)
    assert job.returncode == 75, printed
    if second:
        assert "resume from the beginning (no checkpoint yet)" in printed and steps_saved(run) == []
    else:
        assert steps_saved(run) == ["step_1"] and "run the same command again" in printed, printed
    wait_for(lambda: not any(worker.is_running() for worker in workers))


def test_a_signal_during_data_preparation_ends_the_run_before_workers_start(head: Head, workplace: Path) -> None:
    text = workplace / "dataset/savant_dataset_train.jsonl"
    text.write_text(text.read_text() * 100)
    job = start_job(head, workplace)
    log = workplace / "tiny/training_log.txt"
    wait_for(lambda: log.exists() and "tokenizing" in log.read_text())
    job.send_signal(signal.SIGTERM)
    printed, _ = job.communicate(timeout=600)
    assert job.returncode == 75 and "resume from the beginning" in printed, printed
    assert "starting workers" not in printed and not training_workers()
