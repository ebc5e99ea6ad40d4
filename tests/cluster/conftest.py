"""Fixtures and functions for tests that run jobs on a local Ray, with a small text and a tiny model."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray._common.utils import reset_ray_address
from ray._private.utils import get_ray_address_file, write_ray_address
from ray.cluster_utils import Cluster

from savant_ray.reporting.record import METRICS, read_records

ROOT = Path(__file__).parents[2]
WORDS = "red blue green one two three four five six seven eight nine ten cat dog tree sea sun".split()

SETTINGS = {
    "run.name": "tiny",
    "model.vocab_size": 400,
    "model.dim": 32,
    "model.n_heads": 2,
    "model.n_loops": 2,
    "model.max_seq_len": 64,
    "model.window_size": 16,
    "model.global_every": 2,
    "training.max_steps": 8,
    "training.batch_size": 3,
    "training.accumulation": 4,
    "training.learning_rate": 0.01,
    "training.precision": "fp32",
    "training.compile": "false",
    "validation.every_steps": 4,
    "validation.batches": 2,
    "validation.max_new_tokens": 5,
    "validation.logic_problems": 0,
    "checkpoint.every_steps": 4,
}


FAST_HEAD = {
    "RAY_worker_niceness": "0",  # with Ray's default of 15, workers wait for other processes of this machine
    "RAY_USAGE_STATS_ENABLED": "0",  # Ray Data's process for them starts with the first read
    "LOG_NAME_UPDATE_INTERVAL_S": "2",  # between two searches for new logs, of which a shared head has a thousand
}
FAST_RAY = FAST_HEAD | {
    "OMP_NUM_THREADS": "1",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",  # only for the dashboard; takes a tenth of an attempt's start
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # only for nodes that are drained; a process that takes as long
}
RUN: dict[str, Any] = {  # long enough to be interrupted
    "training__max_steps": 100,
    "training__accumulation": 16,  # a step takes long enough to be interrupted
    "checkpoint__every_steps": 10,
    "validation__every_steps": 100,
    "scaling__num_workers": 2,
    "scaling__resources_per_worker": "{CPU: 1}",
}


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """Return a folder with training and validation text; the optional logic file is missing."""
    return with_text(tmp_path)


def with_text(folder: Path) -> Path:
    """Write training and validation text into the folder and return it."""
    write_text(folder / "dataset/savant_dataset_train.jsonl", 300, seed=1)
    write_text(folder / "dataset/savant_dataset_val.jsonl", 60, seed=2)
    return folder


def write_text(path: Path, documents: int, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)
    texts = (" ".join(chance.choices(WORDS, k=chance.randint(5, 60))) for _ in range(documents))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def options(**changes: Any) -> list[str]:
    """Return `SETTINGS` with these changes as options of the command line; `__` in a name stands for a dot."""
    settings = SETTINGS | {name.replace("__", "."): value for name, value in changes.items()}
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def environment(**changes: str) -> dict[str, str]:
    """Return this process's environment variables for a job, with these changes.

    Variables of Ray and settings are removed, because they would change the job, and so are those that `make test ARGS=…`
    passes on to each `make` that it starts. `python` is the one that runs the tests.
    """
    removed = ("RAY_", "SAVANT_", "MAKE", "MFLAGS", "ARGS", "CONFIG", "ADDRESS")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(removed)}
    return kept | {"PATH": path_with_this_python()} | FAST_RAY | changes


def path_with_this_python() -> str:
    """Return PATH with the folder of this process's Python before all others."""
    return f"{Path(sys.executable).parent}:{os.environ['PATH']}"


started: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def no_job_is_left_running() -> Iterator[None]:
    """Kill jobs that a failed test has left: they would occupy the CPUs of their head in all later tests."""
    yield
    while started:
        job = started.pop()
        job.kill()
        job.wait()


@dataclass(frozen=True)
class Head:
    """A running Ray head."""

    address: str
    dashboard: str
    can_drain: bool = False
    """Whether its jobs watch for nodes that are drained."""


@pytest.fixture(scope="session")
def head() -> Iterator[Head]:
    """Yield one head for all tests that do not need their own: a job on a running head starts sooner."""
    with running_head() as head:
        yield head


@contextmanager
def running_head() -> Iterator[Head]:
    """Yield a head with a dashboard, two CPUs and the environment of this process."""
    port = free_port()
    agent = free_port()  # another Ray on this machine may use the default port
    dashboard = {"include_dashboard": True, "dashboard_port": port, "dashboard_agent_listen_port": agent}
    with running_cluster(num_cpus=2, object_store_memory=200 << 20, **dashboard) as cluster:
        yield Head(cluster.address, f"http://127.0.0.1:{port}")


@contextmanager
def running_cluster(**head: Any) -> Iterator[Cluster]:
    """Yield a cluster that consists of a head only."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # a short path, because Ray's sockets are below it
    # A submitted job inherits the head's PATH.
    os.environ |= {"RAY_AUTH_MODE": "disabled", "PATH": path_with_this_python()} | FAST_HEAD
    # `Cluster` writes into this folder and does not create it.
    Path(get_ray_address_file(None)).parent.mkdir(parents=True, exist_ok=True)
    cluster = Cluster(initialize_head=True, head_node_args={"temp_dir": folder, **head})
    reset_ray_address()  # otherwise a run without a cluster would use this one
    write_ray_address(cluster.address, folder)  # otherwise a job would use any Ray that it finds on this machine
    try:
        yield cluster
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def uninterrupted_losses(head: Head, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Return the losses of `RUN` without interruptions, which one of pytest-xdist's processes computes for all."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    workplace = shared / "uninterrupted"
    with (shared / "uninterrupted.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not workplace.exists():
            code, printed = run_job(head, with_text(workplace), **RUN)
            assert code == 0, printed
    return losses(workplace / "tiny")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start_job(head: Head, workplace: Path, *flags: str, **changes: Any) -> subprocess.Popen[str]:
    """Start `python jobs/train.py` in the workplace, on the running head."""
    command = [sys.executable, str(ROOT / "jobs/train.py"), *flags, *options(**changes)]
    variables = environment(RAY_ADDRESS=head.address, RAY_AUTH_MODE="disabled")
    if head.can_drain:
        del variables["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"]  # as users have it
    return start_program(command, workplace, variables)


def start_program(command: list[str], folder: Path, variables: dict[str, str]) -> subprocess.Popen[str]:
    """Start a program; what it prints can be read from its stdout. It is killed if the test leaves it running."""
    program = subprocess.Popen(
        command, cwd=folder, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    started.append(program)
    return program


def run_job(head: Head, workplace: Path, *flags: str, **changes: Any) -> tuple[int, str]:
    """Run a job to its end; return its exit code and what it printed."""
    job = start_job(head, workplace, *flags, **changes)
    printed, _ = job.communicate(timeout=600)
    return job.returncode, printed


def records(run: Path, event: str) -> list[dict[str, Any]]:
    """Return the lines of an event in the run's record so far."""
    return [line for line in read_records(run / METRICS) if line["event"] == event]


def steps_done(run: Path) -> int:
    return len(records(run, "step")) if (run / METRICS).exists() else 0


def losses(run: Path) -> list[float]:
    steps = records(run, "step")
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1)), "each step once, in order"
    return [step["train_loss"] for step in steps]


def wait_for(condition: Callable[[], Any], seconds: float = 900) -> None:
    """Wait for the condition; the limit is for hangs, many times what a busy machine needs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)
