"""`make hangs N=50`: N processes that hang at random moments of a run; each is resolved, or ends with a clear error.

The run starts its own Ray, so that every process of Ray is a child of the driver. Its losses must be those of a run in
which nothing hangs.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from tests.cluster.conftest import ROOT, environment, options, wait_for, with_text
from tests.torture.hang_site.sitecustomize import PLACES
from tests.torture.runner import events, last_step

HANG_SECONDS = 5.0
MAX_SECONDS = 240.0  # until a case is resolved or has ended the attempt; a start and a validation may take 10 limits
MAX_UNRECORDED = 100  # steps of 10 ms
ACTORS = ("Bridge", "TrainController")
HEAD = ("raylet", "gcs_server")
FATAL = tuple(f"stop {name}" for name in ACTORS + HEAD)
RESTARTS = ("stop a worker", "stop all workers", *(f"hang: {place}" for place in PLACES))
HARMLESS = ("stop a worker briefly", "stop the driver briefly", "stop another process", "unread output")
SETTINGS = {
    "training__max_steps": 100_000,
    "training__accumulation": 8,
    "checkpoint__every_steps": 7,
    "validation__every_steps": 5,
    "validation__batches": 1,
    "scaling__num_workers": 2,
    "scaling__resources_per_worker": "{CPU: 1}",
    "scaling__max_failures": 1000,
    "scaling__hang_seconds": HANG_SECONDS,
}


@dataclass
class Case:
    """How a process was made to hang, and what happened then."""

    kind: str
    step: int
    outcome: str = ""
    seconds: float = 0.0


class Run:
    """A run and its current attempt; a reader takes its output unless `unread output` was drawn."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.path = folder, folder / name
        self._requests = folder / "requests"
        self._requests.mkdir(exist_ok=True)
        self.reads = True
        self.has_stopped_process = False  # of its Ray, which is not needed until workers have to start again
        self.process: subprocess.Popen[bytes] | None = None
        self.printed = b""

    def start(self) -> None:
        """Start an attempt and wait for its first step."""
        site = f"{ROOT / 'tests/torture/hang_site'}{os.pathsep}{ROOT}"
        paths = {"run__name": self.path.name}
        self.reads, self.has_stopped_process, self.printed = True, False, b""
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "jobs/train.py"), *options(**SETTINGS | paths)],
            cwd=self.folder,
            env=environment(HANGS=str(self._requests), PYTHONPATH=site),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self.wait_until(lambda: b" loss " in self.printed)  # the record also has the steps of earlier attempts

    def wait_until(self, condition: Callable[[], bool], seconds: float = MAX_SECONDS) -> bool:
        """Wait, reading the output; return False if the attempt has ended before."""

        def met() -> bool:
            self.read()
            return condition() or self.ended

        try:
            wait_for(met, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.printed.decode()}") from error
        return condition()

    def read(self) -> None:
        assert self.process is not None and self.process.stdout is not None
        while self.reads and (part := self.process.stdout.read(1 << 16)):
            self.printed += part

    @property
    def ended(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def restarts(self) -> int:
        """Return how often workers have started so far."""
        return len(events(self.path, "attempt"))

    def request_hang(self, rank: int, place: str) -> None:
        (self._requests / f"{rank}-{place}").touch()

    def processes(self) -> dict[psutil.Process, str]:
        """Return the processes of the run's Ray with their titles."""
        assert self.process is not None
        titles = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.Error):
                titles[process] = " ".join([process.name(), *process.cmdline()[:1]])
        return titles

    def named(self, *parts: str) -> list[psutil.Process]:
        return [process for process, title in self.processes().items() if any(part in title for part in parts)]

    def end(self) -> None:
        """End the attempt so that its last step is saved."""
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        self.wait_until(lambda: False, 120)
        assert self.process.returncode == 75, self.printed.decode()

    def kill(self) -> None:
        if self.process is not None and not self.ended:
            for process in (*self.processes(), self.process):
                with suppress(psutil.Error):
                    process.kill()
            self.process.wait()


def perform(case: Case, run: Run, chance: random.Random) -> None:
    """Make a process hang; wait until training goes on, or the attempt has ended with an error; restart it then."""
    assert run.process is not None
    restarts, started = run.restarts(), time.monotonic()
    expected = "goes on"
    if case.kind in FATAL:
        expected = "error"
        run.named(case.kind.removeprefix("stop "))[0].suspend()
    elif case.kind in RESTARTS:
        expected = "restart"
        workers = run.named("RayTrainWorker")
        if case.kind == "stop a worker":
            chance.choice(workers).suspend()
        elif case.kind == "stop all workers":
            for worker in workers:
                worker.suspend()
        else:
            run.request_hang(chance.randrange(2), case.kind.removeprefix("hang: "))
            if case.kind == "hang: start":  # of the next workers
                workers[0].kill()
    elif case.kind == "stop another process":
        skipped = ("RayTrainWorker", *ACTORS, *HEAD)
        others = [p for p, title in run.processes().items() if not any(part in title for part in skipped)]
        chance.choice(others).suspend()
        run.has_stopped_process = True
    elif case.kind == "unread output":
        run.reads = False
    else:
        process = (
            psutil.Process(run.process.pid) if "driver" in case.kind else chance.choice(run.named("RayTrainWorker"))
        )
        process.suspend()
        time.sleep(chance.uniform(0.5, HANG_SECONDS / 2))
        process.resume()
    step = last_step(run.path)
    if expected == "restart":
        run.wait_until(lambda: run.restarts() > restarts)
        expected = "error" if run.ended and run.has_stopped_process else expected
    elif expected == "error":
        run.wait_until(lambda: False)
    else:
        run.wait_until(lambda: last_step(run.path) >= step + 3)
    case.seconds = time.monotonic() - started
    run.reads = True
    run.read()
    printed = run.printed.decode()
    if expected == "error":
        assert run.process.returncode == 1, f"{case} {run.process.returncode}\n{printed}"
        message = printed[printed.index("error: ") :]
        name = case.kind.removeprefix("stop ") if case.kind in FATAL else "ray::"
        assert name in message and "stopped" in message and "same command again" in message, printed
        assert "Traceback" not in printed
        case.outcome = f"error: {message.splitlines()[0].removeprefix('error: ')}"
        run.start()
        return
    assert not run.ended, f"{case}\n{printed}"
    assert case.seconds < MAX_SECONDS and (expected == "restart" or run.restarts() == restarts), f"{case}\n{printed}"
    case.outcome = "training went on"
    if expected == "restart":
        hang = events(run.path, "hang")[-1]
        assert case.kind != "hang: start" or hang["activity"] == "starting", f"{case}\n{printed}"
        case.outcome = f"worker {hang['rank']} killed: {hang['activity']}, {hang['process'].rpartition(', ')[2]}"


def random_kinds(n: int, chance: random.Random) -> Iterator[str]:
    """Yield `n` kinds; all occur before one is repeated."""
    kinds: list[str] = []
    for _ in range(n):
        kinds = kinds or chance.sample(RESTARTS + HARMLESS + FATAL, len(RESTARTS + HARMLESS + FATAL))
        yield kinds.pop()


def run_cases(kinds: Iterator[str], folder: Path, chance: random.Random, log: Callable[[str], None]) -> list[Case]:
    """Perform the cases one after the other in one run, and compare its losses with those of a run without them."""
    cases = []
    with run_in(folder, "hangs") as run:
        for kind in kinds:
            target = last_step(run.path) + chance.randint(1, 8)
            assert run.wait_until(lambda: last_step(run.path) >= target), run.printed.decode()  # noqa: B023
            case = Case(kind, last_step(run.path))
            perform(case, run, chance)
            cases.append(case)
            log(f"{case.kind} at step {case.step}: {case.outcome} after {case.seconds:.0f} s")
        run.end()
    n = last_step(run.path)
    with run_in(folder, "quiet") as compared:
        assert compared.wait_until(lambda: last_step(compared.path) >= n, 600)
        compared.end()
    recorded, expected = losses(run.path), losses(compared.path)
    different = {step: (loss, expected[step]) for step, loss in recorded.items() if loss != expected[step]}
    missing = [step for step in range(1, n + 1) if step not in recorded]
    assert not different, different
    # After the driver has read the bridge for the last time, workers take further steps until they are killed.
    assert len(missing) <= MAX_UNRECORDED * sum(case.kind in FATAL for case in cases), missing
    return cases


@contextmanager
def run_in(folder: Path, name: str) -> Iterator[Run]:
    """Start a run within a `with` block; kill what is left of it at the end, also processes that were stopped."""
    run = Run(folder, name)
    try:
        run.start()
        yield run
    finally:
        run.kill()


def losses(run: Path) -> dict[int, float]:
    """Return the losses of a run by step."""
    return {line["step"]: line["train_loss"] for line in events(run, "step")}


if __name__ == "__main__":
    n, seed = (int(argument) for argument in [*sys.argv[1:], "50", "0"][:2])
    console, chance = Console(width=140), random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="hangs") as scratch:
        cases = run_cases(random_kinds(n, chance), with_text(Path(scratch)), chance, console.print)
    table = Table("what hangs", "cases", "outcome", "seconds", title="each resolved, or ended with an error")
    for kind in dict.fromkeys(case.kind for case in sorted(cases, key=lambda case: case.kind)):
        of_kind = [case for case in cases if case.kind == kind]
        seconds = f"{min(c.seconds for c in of_kind):.0f} to {max(c.seconds for c in of_kind):.0f}"
        table.add_row(kind, str(len(of_kind)), of_kind[0].outcome, seconds)
    console.print(table, f"{len(cases)} cases; all losses equal those of a run in which nothing hung")
