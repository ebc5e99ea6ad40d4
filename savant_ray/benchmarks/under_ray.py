"""What Ray costs a step: the loop in a job's worker against the same loop called directly, whole commands in turn.

Both read the same token cache. A step lasts from the end of one to the end of the next, so that reading, telling and
whatever runs beside it count. Ray's own processes take a tenth of a core; where the worker's threads have all cores, they
wait for each other meanwhile, so the same is measured with a thread less as well.
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

from savant_ray.benchmarks.commands import ROOT, as_options, run_command, write_text
from savant_ray.benchmarks.rounds import Figures, figure, in_turn
from savant_ray.config import Config, load_config
from savant_ray.data.token_cache import TokenCache
from savant_ray.events import Event, StepDone
from savant_ray.training.loop import train
from savant_ray.training.micro_batch import MicroBatch
from savant_ray.training.state import TrainingState, new_state

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
    "validation.every_steps": 1000,
    "validation.max_new_tokens": 1,
    "checkpoint.every_steps": 1000,
}
BARE = "import sys; from savant_ray.benchmarks.under_ray import bare; bare(sys.argv[1])"


def run() -> Figures:
    """The bare loop's time of a step over the job's, and the share of the job's time that is waiting for data."""
    cores = os.cpu_count() or 1
    waits: list[float] = []
    with tempfile.TemporaryDirectory(prefix="ray") as here:
        folder = Path(here)
        write_text(folder, documents=2000)
        figures = {"loop_under_ray": _against_bare(folder, waits, cores)}
        if cores > 1:
            figures["loop_under_ray_core_left"] = _against_bare(folder, waits, cores - 1)
    return {**figures, "data_wait": figure(waits, "share of a step's time in the job")}


def _against_bare(folder: Path, waits: list[float], threads: int) -> dict[str, Any]:
    there = {"OMP_NUM_THREADS": str(threads), "SAVANT_SCALING__RESOURCES_PER_WORKER": f"{{CPU: {threads}}}"}
    times = in_turn(ROUNDS, lambda: _bare(folder, there), lambda: _under_ray(folder, waits, there), warm_up=0)
    bare, job = (1000 * statistics.median(of_one) for of_one in times)
    detail = f"{bare:.0f} ms a step bare, {job:.0f} in a job, threads: {threads}"
    return figure([bare / job for bare, job in zip(*times, strict=True)], detail)


def _under_ray(folder: Path, waits: list[float], changes: dict[str, str]) -> float:
    run_command([sys.executable, str(ROOT / "jobs/train.py"), "--fresh", *as_options(SETTINGS)], folder, changes)
    lines = map(json.loads, (folder / "run/metrics.jsonl").read_text().splitlines())
    steps = [line for line in lines if line["event"] == "step"]
    waits.append(
        sum(step["data_wait_seconds"] for step in steps[WARM_UP:])
        / sum(step["step_seconds"] for step in steps[WARM_UP:])
    )
    return _between([datetime.fromisoformat(step["time"]).timestamp() for step in steps])


def _bare(folder: Path, changes: dict[str, str]) -> float:
    if not (folder / "cache").exists():  # made by the first job
        _under_ray(folder, [], changes)
    run_command([sys.executable, "-c", BARE, str(folder)], folder, changes)
    return _between(json.loads((folder / "bare.json").read_text()))


def _between(ends: list[float]) -> float:
    """The median step, the first of them left out."""
    steps: list[float] = np.diff(ends)[WARM_UP:].tolist()
    return statistics.median(steps)


class _Host:
    """Nobody; remembers when each step ended."""

    rank = 0

    def __init__(self) -> None:
        self.ends: list[float] = []

    def emit(self, event: Event) -> None:
        """Looks at the clock."""
        if isinstance(event, StepDone):
            self.ends.append(time.time())

    def grace_left(self) -> float | None:
        """Nobody wishes to stop."""

    def save(self, state: TrainingState, reason: str) -> None:
        """Keeps nothing."""

    def finish_saving(self) -> bool:
        """Has nothing to wait for."""
        return True

    def validate(self, state: TrainingState) -> bool:
        """Not here."""
        return False


def bare(folder: str) -> None:
    """Trains as many steps on the job's token cache, in this process."""
    config = load_config(as_options(SETTINGS), environment={})
    (train_cache,) = Path(folder, "cache").glob("savant_dataset_train-*/")
    host = _Host()
    train(new_state(config, torch.device("cpu")), config, _shares(TokenCache.open(str(train_cache)), config), host)
    Path(folder, "bare.json").write_text(json.dumps(host.ends))


def _shares(cache: TokenCache, config: Config) -> Iterator[list[MicroBatch]]:
    settings, size = config.training, config.training.batch_size
    for step in range(settings.max_steps):
        share = []
        for micro_batch in range(settings.accumulation):
            first = step * settings.effective_batch + micro_batch * size
            rows = np.arange(first, first + size) % cache.n_sequences
            taken = cache.take(rows)
            tokens, ids = torch.from_numpy(taken.tokens.copy()), torch.from_numpy(taken.document_ids.copy())
            share.append(MicroBatch(tokens, ids, tuple(rows.tolist())))
        yield share
