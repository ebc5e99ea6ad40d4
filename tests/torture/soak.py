"""`make soak`: 80,000 tiny steps, during which memory, open files and the time of a step must not grow."""

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
SECONDS_BETWEEN_SAMPLES = 5.0
MAX_SLOWDOWN, MAX_GROWTH = 1.5, 1.1  # factors; other work on the machine and memory that is paged in late are no leak
TOLERATED_MIB, TOLERATED_FILES = 30.0, 10
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
class Sample:
    """Memory and open files of one process at one time."""

    time: float
    process: str
    mib: float
    open_files: int


def sample(job: psutil.Process) -> list[Sample]:
    """Return samples of the driver and of all processes of Ray that it started."""
    now, samples = time.time(), []
    for process in [job, *job.children(recursive=True)]:
        try:
            name = "driver" if process.pid == job.pid else process.name().split("(")[0]
            samples.append(Sample(now, name, process.memory_info().rss / 2**20, process.num_fds()))
        except psutil.Error:  # ended in between
            continue
    return samples


def main(steps: int) -> None:
    """Run the job and print the figures of each tenth of it; fail if one of them has grown."""
    with tempfile.TemporaryDirectory(prefix="soak") as scratch:
        folder = with_text(Path(scratch))
        command = [sys.executable, str(ROOT / "jobs/train.py"), *options(**SETTINGS | {"training__max_steps": steps})]
        with (folder / "printed").open("w") as out:
            job = subprocess.Popen(command, cwd=folder, env=environment(), stdout=out, stderr=subprocess.STDOUT)
        samples: list[Sample] = []
        while job.poll() is None:
            samples += sample(psutil.Process(job.pid))
            time.sleep(SECONDS_BETWEEN_SAMPLES)
        assert job.returncode == 0, (folder / "printed").read_text()
        seconds = [line["step_seconds"] for line in read_records(folder / "tiny" / METRICS) if line["event"] == "step"]
    assert len(seconds) == steps
    Console(width=120).print(step_times(seconds), resources(samples))
    problems = [*slowdown(seconds), *growth(samples)]
    assert not problems, "\n".join(problems)


def slowdown(seconds: Sequence[float]) -> Iterator[str]:
    """Yield a message if the median step of the second half is slower than that of the second tenth.

    The first tenth is not used, because libraries warm up in it.
    """
    tenth = len(seconds) // PARTS
    early, late = statistics.median(seconds[tenth : 2 * tenth]), statistics.median(seconds[len(seconds) // 2 :])
    if late > early * MAX_SLOWDOWN:
        yield f"steps take {1000 * late:.2f} ms, {1000 * early:.2f} ms at the beginning"


def growth(samples: Sequence[Sample]) -> Iterator[str]:
    """Yield a message for each process with more memory or open files at the end than after a fifth of the time."""
    first, last = samples[0].time, samples[-1].time
    for name in sorted({sample.process for sample in samples}):
        early, late = (_largest_near(samples, name, first + fraction * (last - first)) for fraction in (0.2, 1.0))
        if early is None or late is None:
            continue
        if late.mib > early.mib * MAX_GROWTH + TOLERATED_MIB:
            yield f"{name} holds {late.mib:.0f} MiB, {early.mib:.0f} MiB after a fifth of the time"
        if late.open_files > early.open_files + TOLERATED_FILES:
            yield f"{name} has {late.open_files} open files, {early.open_files} after a fifth of the time"


def step_times(seconds: Sequence[float]) -> Table:
    """Return the median and slowest step of each part, in milliseconds."""
    table = Table("steps", "median ms", "slowest ms")
    length = len(seconds) // PARTS
    for start in range(0, length * PARTS, length):
        part = [1000 * value for value in seconds[start : start + length]]
        table.add_row(f"{start + 1:,} to {start + length:,}", f"{statistics.median(part):.2f}", f"{max(part):.0f}")
    return table


def resources(samples: Sequence[Sample]) -> Table:
    """Return memory and open files of the largest process of each name after 10, 50 and 100 % of the time."""
    first, last = samples[0].time, samples[-1].time
    moments = [first + fraction * (last - first) for fraction in (0.1, 0.5, 1.0)]
    table = Table(
        "process", *(f"{unit} at {percent}" for unit in ("MiB", "files") for percent in ("10 %", "50 %", "100 %"))
    )
    for name in sorted({sample.process for sample in samples}):
        largest = [_largest_near(samples, name, moment) for moment in moments]
        if None not in largest:
            row = [sample for sample in largest if sample is not None]
            table.add_row(name, *(f"{sample.mib:.0f}" for sample in row), *(str(sample.open_files) for sample in row))
    return table


def _largest_near(samples: Sequence[Sample], name: str, moment: float) -> Sample | None:
    near = [s for s in samples if s.process == name and abs(s.time - moment) < 2 * SECONDS_BETWEEN_SAMPLES]
    return max(near, key=lambda sample: sample.mib, default=None)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else STEPS)
