"""Real jobs on a real local Ray, with a text and a model small enough to wait for."""

from __future__ import annotations

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


LEAN = {
    "OMP_NUM_THREADS": "1",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",  # takes a tenth of the start of an attempt, for the dashboard
    "RAY_worker_niceness": "0",  # at Ray's 15, workers wait for whatever else this machine does
}
RUN: dict[str, Any] = {  # long enough for something to happen to it
    "training__max_steps": 100,
    "training__accumulation": 16,  # a step takes long enough to be hit
    "checkpoint__every_steps": 10,
    "validation__every_steps": 100,
    "scaling__num_workers": 2,
    "scaling__resources_per_worker": "{CPU: 1}",
}


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with training and validation text; the optional logic file is missing."""
    return with_text(tmp_path)


def with_text(folder: Path) -> Path:
    write_text(folder / "dataset/savant_dataset_train.jsonl", 300, seed=1)
    write_text(folder / "dataset/savant_dataset_val.jsonl", 60, seed=2)
    return folder


def write_text(path: Path, documents: int, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)
    texts = (" ".join(chance.choices(WORDS, k=chance.randint(5, 60))) for _ in range(documents))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def options(**changes: Any) -> list[str]:
    settings = SETTINGS | {name.replace("__", "."): value for name, value in changes.items()}
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def environment(**changes: str) -> dict[str, str]:
    """This process's, without what would send a job elsewhere; `python` is the one that runs the tests.

    Nor with what `make test ARGS=…` hands on to each `make` below it.
    """
    others = ("RAY_", "SAVANT_", "MAKE", "MFLAGS", "ARGS", "CONFIG", "ADDRESS")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    return kept | {"PATH": here_first()} | LEAN | changes


def here_first() -> str:
    return f"{Path(sys.executable).parent}:{os.environ['PATH']}"


started: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def no_job_is_left_running() -> Iterator[None]:
    """A job that a failed test left behind would keep its head's CPUs from all later tests."""
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


@pytest.fixture(scope="session")
def head() -> Iterator[Head]:
    """One head for all tests that do not need their own: a job on it starts sooner."""
    with running_head() as head:
        yield head


@contextmanager
def running_head() -> Iterator[Head]:
    """A head with a dashboard, two CPUs and the environment of this process."""
    port = free_port()
    agent = free_port()  # another Ray of this machine may have the usual one
    dashboard = {"include_dashboard": True, "dashboard_port": port, "dashboard_agent_listen_port": agent}
    with running_cluster(num_cpus=2, object_store_memory=200 << 20, **dashboard) as cluster:
        yield Head(cluster.address, f"http://127.0.0.1:{port}")


@contextmanager
def running_cluster(**head: Any) -> Iterator[Cluster]:
    """A cluster of nothing but a head."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # short: Ray's sockets lie below it
    # A submitted job inherits the head's PATH.
    os.environ |= {"RAY_AUTH_MODE": "disabled", "PATH": here_first(), "RAY_worker_niceness": "0"}
    # `Cluster` writes there and does not create it.
    Path(get_ray_address_file(None)).parent.mkdir(parents=True, exist_ok=True)
    cluster = Cluster(initialize_head=True, head_node_args={"temp_dir": folder, **head})
    reset_ray_address()  # else a run without a cluster takes this one
    write_ray_address(cluster.address, folder)  # else a job takes any Ray that it finds on this machine
    try:
        yield cluster
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def straight(head: Head, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of `RUN` when nothing happens to it."""
    workplace = with_text(tmp_path_factory.mktemp("straight"))
    code, printed = run_job(head, workplace, **RUN)
    assert code == 0, printed
    return losses(workplace / "tiny")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start_job(head: Head, workplace: Path, *flags: str, **changes: Any) -> subprocess.Popen[str]:
    """Starts `python jobs/train.py` in the workplace, on the running head."""
    command = [sys.executable, str(ROOT / "jobs/train.py"), *flags, *options(**changes)]
    there = environment(RAY_ADDRESS=head.address, RAY_AUTH_MODE="disabled")
    job = subprocess.Popen(
        command, cwd=workplace, env=there, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    started.append(job)
    return job


def run_job(head: Head, workplace: Path, *flags: str, **changes: Any) -> tuple[int, str]:
    """Runs a job to its end: exit code and what it printed."""
    job = start_job(head, workplace, *flags, **changes)
    printed, _ = job.communicate(timeout=300)
    return job.returncode, printed


def records(run: Path, event: str) -> list[dict[str, Any]]:
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == event]


def steps_done(run: Path) -> int:
    return len(records(run, "step")) if (run / "metrics.jsonl").exists() else 0


def losses(run: Path) -> list[float]:
    steps = records(run, "step")
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1)), "each step once, in order"
    return [step["train_loss"] for step in steps]


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)
