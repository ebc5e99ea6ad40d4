"""`make soak`: 80,000 tiny steps; memory, open files and the time of a step have to stay where they were."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from savant_ray.reporting.record import METRICS, read_records
from tests.cluster.conftest import ROOT, environment, options, with_text

STEPS = 80_000
PARTS = 10
SECONDS_BETWEEN_LOOKS = 5.0
MOST_SLOWER, MOST_LARGER = 1.5, 1.1  # times; other work on the machine, and pages that come late, are no leak
SPARE_MIB, SPARE_FILES = 30.0, 10
SETTINGS = {
    "model__dim": 8,
    "model__n_loops": 1,
    "model__max_seq_len": 16,
    "training__batch_size": 2,
    "training__accumulation": 1,
    "training__learning_rate": 1e-3,
    "validation__every_steps": 2000,
    "checkpoint__every_steps": 1000,
}


@dataclass(frozen=True)
class Look:
    """At one process, at one time."""

    time: float
    process: str
    mib: float
    open_files: int


def look(job: psutil.Process) -> list[Look]:
    """At the driver and at everything of Ray's that it started."""
    now, looks = time.time(), []
    for process in [job, *job.children(recursive=True)]:
        try:
            name = "driver" if process.pid == job.pid else process.name().split("(")[0]
            looks.append(Look(now, name, process.memory_info().rss / 2**20, process.num_fds()))
        except psutil.Error:  # ended in between
            continue
    return looks


def main(steps: int) -> None:
    """Runs the soak and prints what each tenth of it looked like."""
    with tempfile.TemporaryDirectory(prefix="soak") as scratch:
        folder = with_text(Path(scratch))
        command = [sys.executable, str(ROOT / "jobs/train.py"), *options(**SETTINGS | {"training__max_steps": steps})]
        with (folder / "printed").open("w") as out:
            job = subprocess.Popen(command, cwd=folder, env=environment(), stdout=out, stderr=subprocess.STDOUT)
        looks: list[Look] = []
        while job.poll() is None:
            looks += look(psutil.Process(job.pid))
            time.sleep(SECONDS_BETWEEN_LOOKS)
        assert job.returncode == 0, (folder / "printed").read_text()
        seconds = [line["step_seconds"] for line in read_records(folder / "tiny" / METRICS) if line["event"] == "step"]
    assert len(seconds) == steps
    Console(width=120).print(step_times(seconds), resources(looks))
    complaints = [*slower(seconds), *grown(looks)]
    assert not complaints, "\n".join(complaints)


def slower(seconds: Sequence[float]) -> Iterator[str]:
    """Says when the last half's median step took longer than the second tenth's; in the first one, libraries warm up."""
    tenth = len(seconds) // PARTS
    early, late = statistics.median(seconds[tenth : 2 * tenth]), statistics.median(seconds[len(seconds) // 2 :])
    if late > early * MOST_SLOWER:
        yield f"steps take {1000 * late:.2f} ms, {1000 * early:.2f} ms at the beginning"


def grown(looks: Sequence[Look]) -> Iterator[str]:
    """Says which processes hold more at the end than after a fifth of the time."""
    first, last = looks[0].time, looks[-1].time
    for name in sorted({each.process for each in looks}):
        early, late = (_near(looks, name, first + share * (last - first)) for share in (0.2, 1.0))
        if early is None or late is None:
            continue
        if late.mib > early.mib * MOST_LARGER + SPARE_MIB:
            yield f"{name} holds {late.mib:.0f} MiB, {early.mib:.0f} MiB after a fifth of the time"
        if late.open_files > early.open_files + SPARE_FILES:
            yield f"{name} has {late.open_files} open files, {early.open_files} after a fifth of the time"


def step_times(seconds: Sequence[float]) -> Table:
    """Median and slowest step of each part, milliseconds."""
    table = Table("steps", "median ms", "slowest ms")
    length = len(seconds) // PARTS
    for start in range(0, length * PARTS, length):
        part = [1000 * value for value in seconds[start : start + length]]
        table.add_row(f"{start + 1:,} to {start + length:,}", f"{statistics.median(part):.2f}", f"{max(part):.0f}")
    return table


def resources(looks: Sequence[Look]) -> Table:
    """The largest of each kind of process at a tenth, half and all of the time."""
    first, last = looks[0].time, looks[-1].time
    moments = [first + share * (last - first) for share in (0.1, 0.5, 1.0)]
    table = Table(
        "process", *(f"{what} at {share}" for what in ("MiB", "files") for share in ("10 %", "50 %", "100 %"))
    )
    for name in sorted({each.process for each in looks}):
        nearest = [_near(looks, name, moment) for moment in moments]
        if None not in nearest:
            known = [each for each in nearest if each is not None]
            table.add_row(name, *(f"{each.mib:.0f}" for each in known), *(str(each.open_files) for each in known))
    return table


def _near(looks: Sequence[Look], name: str, moment: float) -> Look | None:
    near = [each for each in looks if each.process == name and abs(each.time - moment) < 2 * SECONDS_BETWEEN_LOOKS]
    return max(near, key=lambda each: each.mib, default=None)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else STEPS)
