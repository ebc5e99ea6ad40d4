"""The overhead of Ray per step: the training loop in a job against the same loop called directly.

Both read the same token cache. A step is measured from the end of one to the end of the next, so that reading, reporting and
background work count. Ray's own processes take a tenth of a core and slow down worker threads that use all cores;
therefore it is also measured with one thread fewer.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from savant_ray.benchmarks.registry import Figures, alternate, figure
from savant_ray.benchmarks.workload import as_options, run_command, train_command, write_text
from savant_ray.config import Config, load_config
from savant_ray.data.token_cache import TokenCache
from savant_ray.events import Event, StepDone
from savant_ray.training.device import prepare_device
from savant_ray.training.loop import train
from savant_ray.training.state import TrainingState, is_deterministic, micro_batch_size, new_state
from savant_ray.training.step import MicroBatch, micro_batches

ROUNDS = 3
WARM_UP = 5  # steps
SETTINGS = {
    "run.name": "run",
    "model.vocab_size": 400,
    "model.dim": 128,
    "model.n_heads": 2,
    "model.n_loops": 4,
    "model.max_seq_len": 256,
    "training.batch_size": 8,
    "training.accumulation": 2,
    "training.max_steps": 40,
    "training.precision": "fp32",
    "scaling.use_gpu": False,  # the bare loop trains on the CPU
    "validation.every_steps": 1000,
    "validation.max_new_tokens": 1,
    "checkpoint.every_steps": 1000,
}
BARE = "import sys; from savant_ray.benchmarks.under_ray import train_without_ray; train_without_ray(sys.argv[1])"


def run() -> Figures:
    """Measure the step time of the bare loop relative to the job's, and the fraction of the job's time spent on data."""
    cores = os.cpu_count() or 1
    waits: list[float] = []
    with tempfile.TemporaryDirectory(prefix="ray") as temporary:
        folder = Path(temporary)
        write_text(folder, documents=2000)
        figures = {"loop_under_ray": _compare_with_bare_loop(folder, waits, cores)}
        if cores > 1:
            figures["loop_under_ray_core_left"] = _compare_with_bare_loop(folder, waits, cores - 1)
    return {**figures, "data_wait": figure(waits, "fraction of the step time in the job")}


def _compare_with_bare_loop(folder: Path, waits: list[float], threads: int) -> dict[str, Any]:
    variables = {"OMP_NUM_THREADS": str(threads), "SAVANT_SCALING__RESOURCES_PER_WORKER": f"{{CPU: {threads}}}"}
    times = alternate(ROUNDS, lambda: _bare(folder, variables), lambda: _under_ray(folder, waits, variables), warm_up=0)
    bare, job = (1000 * statistics.median(measured) for measured in times)
    detail = f"{bare:.0f} ms a step bare, {job:.0f} in a job, threads: {threads}"
    return figure([bare / job for bare, job in zip(*times, strict=True)], detail)


def _under_ray(folder: Path, waits: list[float], variables: dict[str, str]) -> float:
    run_command(train_command(SETTINGS), folder, variables)
    lines = map(json.loads, (folder / "run/metrics.jsonl").read_text().splitlines())
    steps = [line for line in lines if line["event"] == "step"]
    waits.append(
        sum(step["data_wait_seconds"] for step in steps[WARM_UP:])
        / sum(step["step_seconds"] for step in steps[WARM_UP:])
    )
    return _median_step([datetime.fromisoformat(step["time"]).timestamp() for step in steps])


def _bare(folder: Path, variables: dict[str, str]) -> float:
    if not (folder / "cache").exists():  # the first job creates it
        _under_ray(folder, [], variables)
    run_command([sys.executable, "-c", BARE, str(folder)], folder, variables)
    return _median_step(json.loads((folder / "bare.json").read_text()))


def _median_step(ends: list[float]) -> float:
    """Return the median seconds of a step after the first `WARM_UP` ones."""
    steps: list[float] = np.diff(ends)[WARM_UP:].tolist()
    return statistics.median(steps)


class _Host:
    """A `Host` that records when each step ended and does nothing else."""

    rank = 0

    def __init__(self) -> None:
        self.ends: list[float] = []

    def emit(self, event: Event) -> None:
        """Record the time of a step."""
        if isinstance(event, StepDone):
            self.ends.append(time.time())

    def observe_rank(self, data_wait_seconds: float, memory_gb: float) -> None:
        """Record nothing."""

    def grace_left(self) -> float | None:
        """Return None: no stop is requested."""

    def save(self, state: TrainingState, reason: str) -> None:
        """Save nothing."""

    def finish_saving(self) -> bool:
        """Return True: no save is pending."""
        return True

    def store_file(self, file: Path, name: str) -> str:
        """Store nothing."""
        return name

    def restore(self, state: TrainingState) -> None:
        """Do nothing: there is no checkpoint."""

    def local_batches(self, state: TrainingState) -> Iterator[list[MicroBatch]]:
        """Return no steps."""
        return iter(())

    def validate(self, state: TrainingState) -> bool:
        """Skip validation."""
        return False


def train_without_ray(folder: str) -> None:
    """Train on the job's token cache in this process, with memory settings and micro-batches as in the job."""
    config, device = load_config(as_options(SETTINGS), environment={}), torch.device("cpu")
    (train_cache,) = Path(folder, "cache").glob("savant_dataset_train-*/")
    host = _Host()
    prepare_device(device, config.training.vram_limit_gb, is_deterministic(config, device))
    batches = local_batches(TokenCache.open(str(train_cache)), config, device)
    train(new_state(config, device), config, batches, host)
    Path(folder, "bare.json").write_text(json.dumps(host.ends))


def local_batches(cache: TokenCache, config: Config, device: torch.device) -> Iterator[list[MicroBatch]]:
    """Yield the micro-batches of each step, of the size that a worker uses."""
    n_sequences, size = config.training.effective_batch, micro_batch_size(config, device)
    for step in range(config.training.max_steps):
        rows = np.arange(step * n_sequences, (step + 1) * n_sequences) % cache.n_sequences
        yield micro_batches(cache.take(rows), rows, config, size)
