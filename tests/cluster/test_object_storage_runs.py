"""A run whose text and checkpoints are in object storage, on one machine after another."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from savant_ray.cli import main
from savant_ray.storage.object_store import ObjectStorage
from savant_ray.training.checkpoint import checkpoints
from tests.cluster.conftest import (
    ROOT,
    RUN,
    environment,
    losses,
    options,
    records,
    started,
    steps_done,
    wait_for,
    with_text,
)
from tests.cluster.test_starting_point import start_of
from tests.storage.object_store import CREDENTIALS, ObjectStore, running_store

pytestmark = pytest.mark.slow


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with running_store() as store:
        yield store


class Machine:
    """A machine with its own home folder and Ray."""

    def __init__(self, folder: Path, store: ObjectStore) -> None:
        self._folder, self._store = folder, store
        self.run = folder / "savant_runs/s3/bucket/runs/tiny"  # the mirror
        folder.mkdir()

    def start(self, script: str, *arguments: str) -> subprocess.Popen[str]:
        there = environment(HOME=str(self._folder), **CREDENTIALS)
        command = [sys.executable, str(ROOT / "jobs" / script), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        job = subprocess.Popen(command, cwd=self._folder, env=there, text=True, **pipes)
        started.append(job)
        return job

    def train(self, **changes: Any) -> subprocess.Popen[str]:
        text = {
            "data__sources": f'[{{path: "{self._store.uri("text/savant_dataset_train.jsonl")}", weight: 1.0}}]',
            "data__validation": self._store.uri("text/savant_dataset_val.jsonl"),
            "run__storage_path": self._store.uri("runs"),
        }
        return self.start("train.py", *options(**RUN | text | changes))

    def steps(self) -> int:
        return steps_done(self.run)

    def checkpoints(self) -> int:
        return len(records(self.run, "checkpoint")) if self.steps() else 0


def upload_text(store: ObjectStore, folder: Path) -> None:
    """Write training and validation text into the store, as `Machine.train` reads them."""
    for file in (with_text(folder / "text") / "dataset").iterdir():
        store.write(f"text/{file.name}", file.read_bytes())


def end(job: subprocess.Popen[str]) -> tuple[int, str]:
    printed, _ = job.communicate(timeout=600)
    return job.returncode, printed


def test_a_run_in_object_storage_resumes_on_another_machine(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    upload_text(store, tmp_path)
    first = Machine(tmp_path / "first", store)
    changes = {"training__max_steps": 24, "checkpoint__every_steps": 6, "scaling__num_workers": 1}
    job = first.train(**changes)
    wait_for(lambda: first.steps() >= 7)
    job.send_signal(signal.SIGINT)
    code, printed = end(job)
    assert code == 75 and "run the same command again" in printed, printed
    stopped_at = first.steps()
    assert f"saved as step_{stopped_at}" in printed and f"step_{stopped_at}/manifest.json" in store.names("runs/tiny")
    assert [folder.name for folder in checkpoints(first.run)] == [f"step_{stopped_at}"], (
        "the mirror keeps the newest only"
    )

    second = Machine(tmp_path / "second", store)
    code, printed = end(second.train(**changes))
    assert code == 0 and f"step_{stopped_at}" in printed, printed
    kept = {name.partition("/")[0] for name in store.names("runs/tiny") if name.startswith("step_")}
    assert kept == {"step_12", "step_18", "step_24"}
    assert store.read("runs/tiny/metrics.jsonl") == (second.run / "metrics.jsonl").read_bytes()
    assert b"trained; next:" in store.read("runs/tiny/training_log.txt")

    assert main(["verify", str(second.run), "--steps", "1..24"]) == 0
    assert "steps 1 to 24 " in capsys.readouterr().out, "equal to a run without interruption, bit for bit"
    monkeypatch.setenv("HOME", str(tmp_path / "third"))
    assert main(["generate", "--checkpoint", store.uri("runs/tiny"), "--prompt", "one two"]) == 0
    assert capsys.readouterr().out.startswith("one two")


@pytest.mark.rare
def test_a_run_survives_an_outage_of_object_storage(
    uninterrupted_losses: list[float], store: ObjectStore, tmp_path: Path
) -> None:
    upload_text(store, tmp_path)
    machine = Machine(tmp_path / "machine", store)
    job = machine.train()
    wait_for(lambda: machine.steps() >= 15)
    store.stop()
    wait_for(lambda: records(machine.run, "checkpoint_failure"))
    store.start()
    code, printed = end(job)
    assert code == 0 and "could not be saved" in printed, printed
    assert losses(machine.run) == uninterrupted_losses
    assert store.read("runs/tiny/metrics.jsonl") == (machine.run / "metrics.jsonl").read_bytes()


@pytest.mark.rare
def test_workers_of_a_driver_that_lost_its_connection_do_not_touch_checkpoints_of_its_successor(
    store: ObjectStore, tmp_path: Path
) -> None:
    upload_text(store, tmp_path)
    changes = {"training__max_steps": 100_000, "scaling__num_workers": 1}

    first = Machine(tmp_path / "first", store)
    cut_off = first.train(**changes)
    wait_for(lambda: first.checkpoints() >= 2)
    cut_off.send_signal(signal.SIGSTOP)  # its workers continue

    second = Machine(tmp_path / "second", store)
    job = second.train(**changes)
    wait_for(lambda: second.checkpoints() >= 4)
    of_epoch_1 = {name for name in store.names("runs/tiny") if ".1/" in name}
    of_epoch_0 = {name for name in store.names("runs/tiny") if name.startswith("step_")} - of_epoch_1
    cut_off.send_signal(signal.SIGCONT)
    code, printed = end(cut_off)
    assert code == 1 and "has taken the run over" in printed, printed
    job.send_signal(signal.SIGINT)
    code, printed = end(job)
    assert code == 75 and "may still train" in printed and "run the same command again" in printed, printed

    names = [name for name in store.names("runs/tiny") if name.startswith("step_")]
    assert of_epoch_1 and {name for name in names if ".1/" not in name} <= of_epoch_0, (
        "the first driver's workers saved nothing more"
    )
    start = start_of(ObjectStorage(store.uri("runs/tiny"), tmp_path / "third"), pytest.fail)
    assert start is not None and f"saved as {start.name};" in printed
