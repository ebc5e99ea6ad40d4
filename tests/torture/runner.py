"""Trains runs, interrupts their attempts, and records what each interruption cost.

Each interruption happens in a chosen window, which is a phase of training. `site/sitecustomize.py`, which every process
of a Ray head of our own imports, slows the windows down and publishes which ones a worker is in. The steps that an
interruption cost are those in the record after the step from which the next attempt continues.
"""

from __future__ import annotations

import os
import random
import shlex
import shutil
import signal
import subprocess
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import psutil
from ray.job_submission import JobStatus, JobSubmissionClient

from savant_ray.reporting.record import METRICS, read_records
from savant_ray.training.checkpoint import newest_checkpoint, step_of
from tests.cluster.conftest import ROOT, Head, environment, options, running_head, wait_for

SIGNALS = {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM, "SIGHUP": signal.SIGHUP}  # to the driver
STOPS = (*SIGNALS, "job stop")
TO_WORKERS = {"kill -9 a worker": signal.SIGKILL, "SIGSTOP a worker": signal.SIGSTOP}  # the attempt goes on by itself
METHODS = (*STOPS, *TO_WORKERS, "kill -9 the driver")
WINDOWS = ("start", "accumulation", "update", "validation", "generation", "save", "background write", "handover")
IMPOSSIBLE = {(method, "start") for method in TO_WORKERS}  # there is no worker yet
WORKERS = (1, 2, 3)  # of an attempt; what a run computes does not depend on their number
SETTINGS = {
    "scaling__resources_per_worker": "{CPU: 0.5}",
    "scaling__max_failures": 1000,
    "scaling__hang_seconds": 10,
    "checkpoint__every_steps": 7,
    "validation__every_steps": 5,
    "validation__batches": 1,
}
MAX_SECONDS_TO_START, MAX_STEPS_BETWEEN = 9.0, 6  # seconds, steps


@dataclass
class Interruption:
    """How and when an attempt was interrupted, and what it cost."""

    method: str
    window: str
    repeated: int = 0  # steps
    seconds_to_saved: float | None = None  # only for `STOPS`
    seconds_to_exit: float | None = None


class Attempt(Protocol):
    """A running attempt at a run."""

    def ended(self) -> bool: ...
    def interrupt(self, method: str) -> None: ...
    def outcome(self) -> tuple[int | None, str]: ...


class Command:
    """An attempt as the process `python jobs/train.py`."""

    def __init__(self, head: Head, folder: Path, python: str, arguments: list[str]) -> None:
        self._printed = folder / f"printed-{time.time()}.log"
        env = environment(RAY_ADDRESS=head.address, RAY_AUTH_MODE="disabled")
        with self._printed.open("w") as out:
            self._process = subprocess.Popen(
                [python, str(ROOT / "jobs/train.py"), *arguments],
                cwd=folder, env=env, stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def ended(self) -> bool:
        return self._process.poll() is not None

    def interrupt(self, method: str) -> None:
        self._process.send_signal((SIGNALS | {"kill -9 the driver": signal.SIGKILL})[method])

    def outcome(self) -> tuple[int | None, str]:
        return self._process.wait(), self._printed.read_text()


class Job:
    """An attempt as a Ray job."""

    def __init__(self, head: Head, folder: Path, python: str, arguments: list[str]) -> None:
        self._client = JobSubmissionClient(head.dashboard)
        variables = {"OMP_NUM_THREADS": "1", "RAY_JOB_STOP_WAIT_TIME_S": "60"}
        command = (
            f"cd {shlex.quote(str(folder))} && exec {shlex.join([python, str(ROOT / 'jobs/train.py'), *arguments])}"
        )
        self._id = self._client.submit_job(entrypoint=command, runtime_env={"env_vars": variables})

    def ended(self) -> bool:
        return self._client.get_job_status(self._id).is_terminal()

    def interrupt(self, method: str) -> None:
        if method == "job stop":
            self._client.stop_job(self._id)
        else:
            raise AssertionError(f"{method} of a job")

    def outcome(self) -> tuple[int | None, str]:
        stopped = self._client.get_job_status(self._id) == JobStatus.STOPPED
        return 75 if stopped else self._client.get_job_info(self._id).driver_exit_code, self._client.get_job_logs(
            self._id
        )


class Torture:
    """Runs on one Ray head: `done` are their interruptions, `trained` the folders of the completed runs."""

    def __init__(self, head: Head, folder: Path, windows: Path, python: str, max_steps: int = 60) -> None:
        self._head, self._folder, self._windows, self._python = head, folder, windows, python
        self._settings = SETTINGS | {"training__max_steps": max_steps}
        self.done: list[Interruption] = []
        self.trained: list[Path] = []

    def train_uninterrupted(self) -> Path:
        """Train a run with one worker and without interruptions; return its folder."""
        self._train("uninterrupted", deque(), random.Random(0), workers=(1,))
        return self.trained.pop()

    def interrupt(self, pairs: Iterable[tuple[str, str]], chance: random.Random) -> Iterator[Path]:
        """Train runs to completion until all these interruptions (method, window) have happened; yield their folders."""
        plan = deque(pairs)
        while plan:
            self._train(f"run{len(self.trained)}", plan, chance)
            yield self.trained[-1]

    def _train(
        self, name: str, plan: deque[tuple[str, str]], chance: random.Random, workers: Sequence[int] = WORKERS
    ) -> None:
        """Train a run to completion; each attempt has a random one of these numbers of workers."""
        run = self._folder / name
        while True:
            ending = next((method for method, _ in plan if method not in TO_WORKERS), None)
            kind = Job if ending == "job stop" else Command
            n_workers = {"scaling__num_workers": chance.choice(workers)}
            arguments = options(**self._settings | n_workers | self._absolute_paths(name))
            attempt = kind(self._head, self._folder, self._python, arguments)
            self._interrupt_as_planned(attempt, run, plan, chance)
            code, printed = attempt.outcome()
            self._assert_no_process_left()
            if code == 0:
                self.trained.append(run)
                return
            assert self.done and code in expected_codes(self.done[-1]), f"{self.done[-1:]} {code}\n{printed}"
            if self.done[-1].method in STOPS and self.done[-1].window != "start":
                assert "run the same command" in printed, printed

    def _absolute_paths(self, name: str) -> dict[str, str]:
        """Return path settings; relative ones would be relative to the home folder of a Ray job."""
        folder = str(self._folder)
        return {"run__name": name, "run__storage_path": folder, "data__cache_dir": f"{folder}/cache"}

    def _interrupt_as_planned(
        self, attempt: Attempt, run: Path, plan: deque[tuple[str, str]], chance: random.Random
    ) -> None:
        """Interrupt the attempt as planned, until it has ended."""
        while plan and (worker := self._wait_for(attempt, run, plan[0][1], chance)) is not None:
            interruption = Interruption(*plan.popleft())
            self.done.append(interruption)
            last_recorded = last_step(run)
            if interruption.method in TO_WORKERS:
                attempts = len(events(run, "attempt"))
                os.kill(worker, TO_WORKERS[interruption.method])
                wait_for(lambda: attempt.ended() or len(events(run, "attempt")) > attempts)  # noqa: B023
                interruption.repeated = last_recorded - events(run, "attempt")[-1]["step"]
                continue
            self._end(attempt, run, interruption)
            if interruption.window != "start":  # no step is trained in it, and a lost one is that of an earlier kill
                interruption.repeated = last_step(run) - newest_step(run)
            return
        wait_for(attempt.ended)

    def _end(self, attempt: Attempt, run: Path, interruption: Interruption) -> None:
        before, started = newest_step(run), time.time()
        attempt.interrupt(interruption.method)
        wait_for(attempt.ended)
        interruption.seconds_to_exit = time.time() - started
        if interruption.method in STOPS and newest_step(run) > before:
            newest = newest_checkpoint(run)
            assert newest is not None
            interruption.seconds_to_saved = max(0.0, newest.stat().st_mtime - started)

    def _wait_for(self, attempt: Attempt, run: Path, window: str, chance: random.Random) -> int | None:
        """Wait for the window; return the process in it (0 for `start`), or None if the attempt ended before."""
        if window == "start":
            moment = time.time() + chance.uniform(0.2, MAX_SECONDS_TO_START)
            wait_for(lambda: attempt.ended() or time.time() > moment)
            return None if attempt.ended() else 0
        attempts = len(events(run, "attempt"))
        wait_for(lambda: attempt.ended() or len(events(run, "attempt")) > attempts or self._process_in(WINDOWS))
        target_step = last_step(run) + chance.randint(0, MAX_STEPS_BETWEEN)
        wait_for(lambda: attempt.ended() or last_step(run) >= target_step)
        wait_for(lambda: attempt.ended() or self._process_in((window,)) is not None)
        return None if attempt.ended() else self._process_in((window,)) or 0

    def _process_in(self, windows: tuple[str, ...]) -> int | None:
        for file in self._windows.glob("[0-9]*"):
            if set(file.read_text().splitlines()) & set(windows) and psutil.pid_exists(int(file.name)):
                return int(file.name)
        return None

    def _assert_no_process_left(self) -> None:
        wait_for(lambda: not any(psutil.pid_exists(int(file.name)) for file in self._windows.glob("[0-9]*")), 30)
        shutil.rmtree(self._windows)
        self._windows.mkdir()


def random_plan(n: int, chance: random.Random) -> Iterator[tuple[str, str]]:
    """Yield `n` pairs of method and window; all windows occur before one is repeated, and all methods as well."""
    windows: list[str] = []
    methods: list[str] = []
    for _ in range(n):
        windows = windows or chance.sample(WINDOWS, len(WINDOWS))
        methods = methods or chance.sample(METHODS, len(METHODS))
        window = windows.pop()
        possible = [method for method in methods if (method, window) not in IMPOSSIBLE] or list(STOPS)
        chosen = possible[-1]
        if chosen in methods:
            methods.remove(chosen)
        yield chosen, window


def expected_codes(interruption: Interruption) -> tuple[int | None, ...]:
    """Return the exit codes after an interruption; until our handlers are installed, a signal ends Python itself."""
    if interruption.method == "kill -9 the driver":
        return (-signal.SIGKILL,)
    return (75, 130, *(-number for number in SIGNALS.values())) if interruption.window == "start" else (75,)


def last_step(run: Path) -> int:
    return max((line["step"] for line in events(run, "step")), default=0)


def events(run: Path, event: str) -> list[dict[str, Any]]:
    """Return the lines of an event in the run's record so far."""
    path = run / METRICS
    return [line for line in read_records(path) if line["event"] == event] if path.exists() else []


def newest_step(run: Path) -> int:
    newest = newest_checkpoint(run)
    return 0 if newest is None else step_of(newest)


@contextmanager
def head_with_windows(windows: Path) -> Iterator[Head]:
    """Run a Ray head whose processes publish their current windows in the folder `windows`."""
    windows.mkdir(parents=True, exist_ok=True)
    site = f"{Path(__file__).parent / 'site'}{os.pathsep}{ROOT}"  # this checkout, even if another one is installed
    with mock.patch.dict(os.environ, {"TORTURE_WINDOWS": str(windows), "PYTHONPATH": site}), running_head() as head:
        yield head
