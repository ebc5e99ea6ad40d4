"""Trains a run again and again while interrupting it, and keeps account.

The moments are drawn per window: `site/sitecustomize.py`, which every process of the torture's own Ray head imports,
slows the windows down and says which one a worker is in. What a launch loses is what the record held more than the
place where the next one went on.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
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

STOPS = ("SIGINT", "SIGTERM", "job stop")
KILLS = ("kill -9 a worker", "kill -9 the driver")
MEANS = STOPS + KILLS
WINDOWS = ("start", "accumulation", "update", "validation", "generation", "save", "background write", "handover")
NOT_POSSIBLE = {("kill -9 a worker", "start")}  # there is none yet
SETTINGS = {
    "scaling__num_workers": 2,
    "scaling__max_failures": 1000,
    "checkpoint__every_steps": 7,
    "validation__every_steps": 5,
    "validation__batches": 1,
}
LONGEST_START, MOST_STEPS_BETWEEN = 9.0, 6  # seconds, steps


@dataclass
class Interruption:
    """What was done when, and what it cost."""

    means: str
    window: str
    repeated: int = 0  # steps
    seconds_to_saved: float | None = None  # stops only
    seconds_to_exit: float | None = None


class Launch(Protocol):
    """One start of the command."""

    def ended(self) -> bool: ...
    def interrupt(self, means: str) -> None: ...
    def outcome(self) -> tuple[int | None, str]: ...


class Command:
    """`python jobs/train.py` as a process of ours."""

    def __init__(self, head: Head, folder: Path, python: str, arguments: list[str]) -> None:
        self._printed = folder / f"printed-{time.time()}.log"
        there = environment(RAY_ADDRESS=head.address, RAY_AUTH_MODE="disabled")
        with self._printed.open("w") as out:
            self._process = subprocess.Popen(
                [python, str(ROOT / "jobs/train.py"), *arguments],
                cwd=folder, env=there, stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def ended(self) -> bool:
        return self._process.poll() is not None

    def interrupt(self, means: str) -> None:
        numbers = {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM, "kill -9 the driver": signal.SIGKILL}
        self._process.send_signal(numbers[means])

    def outcome(self) -> tuple[int | None, str]:
        return self._process.wait(), self._printed.read_text()


class Job:
    """The same as a Ray job."""

    def __init__(self, head: Head, folder: Path, python: str, arguments: list[str]) -> None:
        self._client = JobSubmissionClient(head.dashboard)
        variables = {"OMP_NUM_THREADS": "1", "RAY_JOB_STOP_WAIT_TIME_S": "60"}
        command = f"cd {folder} && exec {python} {ROOT / 'jobs/train.py'} {' '.join(arguments)}"
        self._id = self._client.submit_job(entrypoint=command, runtime_env={"env_vars": variables})

    def ended(self) -> bool:
        return self._client.get_job_status(self._id).is_terminal()

    def interrupt(self, means: str) -> None:
        if means == "job stop":
            self._client.stop_job(self._id)
        else:
            raise AssertionError(f"{means} of a job")

    def outcome(self) -> tuple[int | None, str]:
        stopped = self._client.get_job_status(self._id) == JobStatus.STOPPED
        return 75 if stopped else self._client.get_job_info(self._id).driver_exit_code, self._client.get_job_logs(
            self._id
        )


class Torture:
    """Runs on one head; `trained` is what each run that went through left."""

    def __init__(self, head: Head, folder: Path, windows: Path, python: str, max_steps: int = 60) -> None:
        self._head, self._folder, self._windows, self._python = head, folder, windows, python
        self._settings = SETTINGS | {"training__max_steps": max_steps}
        self.done: list[Interruption] = []
        self.trained: list[Path] = []

    def train_straight(self) -> Path:
        """A run that nobody interrupts."""
        self._train("straight", deque(), random.Random(0))
        return self.trained.pop()

    def interrupt(self, pairs: Iterable[tuple[str, str]], chance: random.Random, say: Callable[[str], None]) -> None:
        """Trains runs to their end until these interruptions (means, window) are through."""
        plan = deque(pairs)
        while plan:
            before = len(self.done)
            self._train(f"run{len(self.trained)}", plan, chance)
            say(f"{self.trained[-1].name}: {len(self.done) - before} interruptions, {len(plan)} to go")

    def _train(self, name: str, plan: deque[tuple[str, str]], chance: random.Random) -> None:
        run = self._folder / name
        while True:
            ender = next((means for means, _ in plan if means != "kill -9 a worker"), None)
            kind = Job if ender == "job stop" else Command
            arguments = options(**self._settings | self._places(name))
            launch = kind(self._head, self._folder, self._python, arguments)
            self._disturb(launch, run, plan, chance)
            code, printed = launch.outcome()
            self._expect_no_process_left()
            if code == 0:
                self.trained.append(run)
                return
            assert self.done and code in expected_codes(self.done[-1]), f"{self.done[-1:]} {code}\n{printed}"
            if self.done[-1].means in STOPS and self.done[-1].window != "start":
                assert "run the same command" in printed, printed

    def _places(self, name: str) -> dict[str, str]:
        """Absolute, as a job's relative paths would mean its home folder."""
        folder = str(self._folder)
        return {"run__name": name, "run__storage_path": folder, "data__cache_dir": f"{folder}/cache"}

    def _disturb(self, launch: Launch, run: Path, plan: deque[tuple[str, str]], chance: random.Random) -> None:
        """Until the launch has ended, by itself or by what is planned."""
        while plan and (victim := self._wait_for(launch, run, plan[0][1], chance)) is not None:
            interruption = Interruption(*plan.popleft())
            self.done.append(interruption)
            known = last_step(run)
            if interruption.means == "kill -9 a worker":
                starts = len(of_kind(run, "attempt"))
                os.kill(victim, signal.SIGKILL)
                wait_for(lambda: launch.ended() or len(of_kind(run, "attempt")) > starts)  # noqa: B023
                interruption.repeated = known - of_kind(run, "attempt")[-1]["step"]
                continue
            self._end(launch, run, interruption)
            if interruption.window != "start":  # there nobody trains; what is lost, a kill before it has lost
                interruption.repeated = last_step(run) - newest_step(run)
            return
        wait_for(launch.ended)

    def _end(self, launch: Launch, run: Path, interruption: Interruption) -> None:
        before, started = newest_step(run), time.time()
        launch.interrupt(interruption.means)
        wait_for(launch.ended)
        interruption.seconds_to_exit = time.time() - started
        if interruption.means in STOPS and newest_step(run) > before:
            newest = newest_checkpoint(run)
            assert newest is not None
            interruption.seconds_to_saved = max(0.0, newest.stat().st_mtime - started)

    def _wait_for(self, launch: Launch, run: Path, window: str, chance: random.Random) -> int | None:
        """The process that is in the window now (0: none needed), or None when the launch ended before."""
        if window == "start":
            moment = time.time() + chance.uniform(0.2, LONGEST_START)
            wait_for(lambda: launch.ended() or time.time() > moment)
            return None if launch.ended() else 0
        starts = len(of_kind(run, "attempt"))
        wait_for(lambda: launch.ended() or len(of_kind(run, "attempt")) > starts or self._anybody_in(WINDOWS))
        enough = last_step(run) + chance.randint(0, MOST_STEPS_BETWEEN)
        wait_for(lambda: launch.ended() or last_step(run) >= enough)
        wait_for(lambda: launch.ended() or self._anybody_in((window,)) is not None)
        return None if launch.ended() else self._anybody_in((window,)) or 0

    def _anybody_in(self, windows: tuple[str, ...]) -> int | None:
        for place in self._windows.glob("[0-9]*"):
            if set(place.read_text().splitlines()) & set(windows) and psutil.pid_exists(int(place.name)):
                return int(place.name)
        return None

    def _expect_no_process_left(self) -> None:
        wait_for(lambda: not any(psutil.pid_exists(int(place.name)) for place in self._windows.glob("[0-9]*")), 30)
        shutil.rmtree(self._windows)
        self._windows.mkdir()


def planned(n: int, chance: random.Random) -> Iterator[tuple[str, str]]:
    """`n` pairs of means and window; every window comes once before one comes again, and so does every means."""
    windows: list[str] = []
    means: list[str] = []
    for _ in range(n):
        windows = windows or chance.sample(WINDOWS, len(WINDOWS))
        means = means or chance.sample(MEANS, len(MEANS))
        window = windows.pop()
        possible = [each for each in means if (each, window) not in NOT_POSSIBLE] or list(STOPS)
        chosen = possible[-1]
        if chosen in means:
            means.remove(chosen)
        yield chosen, window


def expected_codes(interruption: Interruption) -> tuple[int | None, ...]:
    """Exit codes of a launch that ended so; before our handlers are there a signal ends Python by itself."""
    if interruption.means == "kill -9 the driver":
        return (-signal.SIGKILL,)
    return (75, 130, -signal.SIGINT, -signal.SIGTERM) if interruption.window == "start" else (75,)


def last_step(run: Path) -> int:
    return max((line["step"] for line in of_kind(run, "step")), default=0)


def of_kind(run: Path, event: str) -> list[dict[str, Any]]:
    """The record's lines so far."""
    path = run / METRICS
    return [line for line in read_records(path) if line["event"] == event] if path.exists() else []


def newest_step(run: Path) -> int:
    newest = newest_checkpoint(run)
    return 0 if newest is None else step_of(newest)


@contextmanager
def tortured_head(windows: Path) -> Iterator[Head]:
    """A head whose processes say in which window they are."""
    windows.mkdir(parents=True, exist_ok=True)
    site = (
        f"{Path(__file__).parent / 'site'}{os.pathsep}{ROOT}"  # this very tree, wherever the package is installed from
    )
    with mock.patch.dict(os.environ, {"TORTURE_WINDOWS": str(windows), "PYTHONPATH": site}), running_head() as head:
        yield head
