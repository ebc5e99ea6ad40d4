"""`make preemptions`: what four preemptions of a run cost, announced and not.

The schedule is a quarter of that of Ray's nightly test of checkpoints before a preemption (ray-project/ray, pull request
65047): 1,600 steps, a checkpoint every 400 steps, four preemptions. There 8 GPUs repeat 517 steps (32 %) with periodic
checkpoints, and 91 (6 %) with checkpoints just before a preemption. Here 2 workers with one core each, on a node of their
own, train a tiny model; the preemptions come at the steps at which Ray's run saved.
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from savant_ray.reporting.record import METRICS
from tests.cluster.conftest import records, start_job, with_text
from tests.cluster.nodes import Nodes, running_nodes
from tests.torture.promises import assert_same_run

STEPS, EVERY = 400, 100
PREEMPTED_AT = (174, 217, 349, 387)
DEADLINE_SECONDS = 30  # between the announcement and the end of the node
POLL_SECONDS = 0.05
SETTINGS: dict[str, Any] = {
    "training__max_steps": STEPS,
    "training__batch_size": 2,
    "training__accumulation": 16,  # 13 steps take longer than the announcement of the last preemption
    "checkpoint__every_steps": EVERY,
    "validation__every_steps": STEPS,
    "validation__batches": 1,
    "scaling__num_workers": 2,
    "scaling__resources_per_worker": "{CPU: 1}",
    "scaling__max_failures": 100,
}


@dataclass
class Preemption:
    """What one preemption cost."""

    at: int  # the last step before workers started again
    repeated: int  # steps
    seconds_to_workers: float  # until the workers had started again
    seconds_to_next_step: float  # until the first step that had not been taken before


class Run:
    """A run on a cluster, of which an attempt is running."""

    def __init__(self, nodes: Nodes, folder: Path, name: str) -> None:
        self._nodes, self._folder, self._name = nodes, folder, name
        self.path = folder / name
        self._workers = [nodes.add(), nodes.add()]
        self._start()

    def _start(self) -> None:
        self._job: subprocess.Popen[str] = start_job(
            self._nodes.head, self._folder, **SETTINGS | {"run__name": self._name}
        )

    def _continue(self) -> None:
        """Wait until the attempt has stopped, and start the same command again, as a supervisor does."""
        printed, _ = self._job.communicate(timeout=120)
        assert self._job.returncode == 75, printed
        self._start()

    def drain(self) -> None:
        """Announce the end of a node; replace it after the attempt has stopped."""
        leaving = self._workers.pop(0)
        self._nodes.drain(leaving, int((time.time() + DEADLINE_SECONDS) * 1000))
        self._job.wait(timeout=4 * DEADLINE_SECONDS)
        self._nodes.kill(leaving)
        self._workers.append(self._nodes.add())
        self._continue()

    def terminate(self) -> None:
        """Send SIGTERM to the driver, as an orchestrator does before it moves a container."""
        self._job.send_signal(signal.SIGTERM)
        self._continue()

    def kill(self) -> None:
        """End a node without an announcement, and replace it."""
        self._nodes.kill(self._workers.pop(0))
        self._workers.append(self._nodes.add())

    def preempt(self, at: int, how: Callable[[Run], None]) -> Preemption:
        """Wait for a step, preempt the run by `how`, and wait until it goes on."""
        self._wait(lambda: self.last_step() >= at)
        n_attempts, started = len(records(self.path, "attempt")), time.monotonic()
        how(self)
        reached = self.last_step()
        while len(records(self.path, "attempt")) == n_attempts:
            reached = max(reached, self.last_step())
            self._wait(lambda: True)
        seconds_to_workers = time.monotonic() - started
        self._wait(
            lambda: self.last_step() > min(reached, STEPS - 1)
        )  # the last step may have been taken, but not saved
        attempt = records(self.path, "attempt")[-1]
        return Preemption(reached, reached - attempt["step"], seconds_to_workers, time.monotonic() - started)

    def finish(self) -> None:
        printed, _ = self._job.communicate(timeout=280)
        assert self._job.returncode == 0, printed
        for node in self._workers:
            self._nodes.kill(node)

    def last_step(self) -> int:
        """Return the newest step of the record; reads only its end."""
        if not (self.path / METRICS).exists():
            return 0
        with (self.path / METRICS).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 20_000))
            lines = file.read().rpartition(b"\n")[0].splitlines()[1:]
        return max((line["step"] for line in map(json.loads, lines) if line["event"] == "step"), default=0)

    def _wait(self, condition: Callable[[], bool]) -> None:
        time.sleep(POLL_SECONDS)
        while not condition():
            assert self._job.poll() in (None, 75), self._job.communicate()[0]
            time.sleep(POLL_SECONDS)


KINDS: dict[str, Callable[[Run], None]] = {
    "announced: a node is drained": Run.drain,
    "announced: SIGTERM": Run.terminate,
    "not announced: a node is killed": Run.kill,
}


def table(costs: dict[str, list[Preemption]], seconds: dict[str, float]) -> Table:
    """Return what the preemptions of each kind cost."""
    table = Table("preemptions", "steps repeated", "s to workers", "s to the next new step", "s of the run")
    for name, preemptions in costs.items():
        repeated = [preemption.repeated for preemption in preemptions]
        workers = [preemption.seconds_to_workers for preemption in preemptions]
        next_step = [preemption.seconds_to_next_step for preemption in preemptions]
        total = f"{sum(repeated)} ({', '.join(map(str, repeated))})" if repeated else "0"
        table.add_row(name, total, _median(workers), _median(next_step), f"{seconds[name]:.0f}")
    return table


def assert_each_step_once(path: Path) -> None:
    """Check the steps of a record, and print where they are not the expected ones."""
    steps = [line["step"] for line in records(path, "step")]
    jumps = [(before, after) for before, after in pairwise(steps) if after != before + 1]
    assert steps == list(range(1, STEPS + 1)), f"{path.name}: {len(steps)} steps, jumps (from, to): {jumps}"


def _median(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({max(values):.1f})" if values else ""


def main(chosen: list[str]) -> None:
    """Train one run without preemptions, and one with each chosen kind; all must be equal in the end."""
    console = Console(width=120)
    costs: dict[str, list[Preemption]] = {}
    seconds: dict[str, float] = {}
    runs: list[Path] = []
    with tempfile.TemporaryDirectory(prefix="preemptions") as scratch, running_nodes() as nodes:
        folder = with_text(Path(scratch))
        for number, (name, how) in enumerate([("none", None), *KINDS.items()]):
            if how is not None and chosen and not any(word in name for word in chosen):
                continue
            started = time.monotonic()
            run = Run(nodes, folder, f"run{number}")
            costs[name] = []
            for at in () if how is None else PREEMPTED_AT:
                costs[name].append(run.preempt(at, how))
                console.print(name, costs[name][-1])
            run.finish()
            seconds[name] = time.monotonic() - started
            runs.append(run.path)
        console.print(table(costs, seconds))
        for path in runs:
            assert_each_step_once(path)
        for path in runs[1:]:
            assert_same_run(runs[0], path)
        for name, preemptions in costs.items():
            assert not (name.startswith("announced") and any(each.repeated for each in preemptions)), name
            assert all(each.repeated <= EVERY for each in preemptions), name


if __name__ == "__main__":
    main(sys.argv[1:])
