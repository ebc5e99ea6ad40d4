"""Start-up time: from the command to the first step, against a script whose `TorchTrainer` does nothing.

Both commands alternate, once with their own local Ray and once with a running Ray cluster. `savant --help` is compared with
an empty Python program.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

from savant_ray.benchmarks.registry import Figures, alternate, figure, seconds
from savant_ray.benchmarks.workload import MAIN, run_command, train_command, write_text
from savant_ray.cluster.session import ray_session

ROUNDS = 3
HELP_ROUNDS = 9
EMPTY_JOB = """
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

def train():
    import torch

TorchTrainer(
    train, scaling_config=ScalingConfig(num_workers=1), run_config=RunConfig(name="empty", storage_path=FOLDER)
).fit()
"""
OPTIONS = {
    "run.name": "run",
    "model.vocab_size": 400,
    "model.dim": 32,
    "model.n_heads": 2,
    "model.max_seq_len": 64,
    "training.max_steps": 1,
    "training.compile": False,
    "validation.max_new_tokens": 1,
}


def run() -> Figures:
    """Measure `savant --help`, a start with a local Ray, and a start with a running cluster."""
    figures: Figures = {"start_help": _compare_help()}
    with tempfile.TemporaryDirectory(prefix="start") as folder:
        write_text(Path(folder))
        _first_step(Path(folder), {})  # tokenizes the text, which later starts reuse
        figures["start_local"] = _compare_with_empty_job(Path(folder), {})
        with ray_session():
            import ray

            cluster = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
            figures["start_running_head"] = _compare_with_empty_job(Path(folder), cluster)
    return figures


def _compare_help() -> dict[str, object]:
    python, savant = alternate(
        HELP_ROUNDS,
        lambda: seconds(lambda: run_command([sys.executable, "-c", "pass"])),
        lambda: seconds(lambda: run_command([sys.executable, "-c", MAIN, "--help"])),
    )
    return _figure(python, savant)


def _compare_with_empty_job(folder: Path, variables: dict[str, str]) -> dict[str, object]:
    script = folder / "empty.py"
    script.write_text(EMPTY_JOB.replace("FOLDER", repr(str(folder))))

    def empty() -> float:
        return seconds(lambda: run_command([sys.executable, str(script)], folder, variables))

    return _figure(*alternate(ROUNDS, empty, lambda: _first_step(folder, variables), warm_up=0))


def _figure(reference_times: list[float], savant_times: list[float]) -> dict[str, object]:
    ratios = [b / a for a, b in zip(reference_times, savant_times, strict=True)]
    return figure(ratios, f"{statistics.median(savant_times):.2f} against {statistics.median(reference_times):.2f} s")


def _first_step(folder: Path, variables: dict[str, str]) -> float:
    """Return the seconds from the command to the first step in `metrics.jsonl`."""
    started = time.time()
    run_command(train_command(OPTIONS), folder, variables)
    lines = map(json.loads, (folder / "run/metrics.jsonl").read_text().splitlines())
    first = next(line["time"] for line in lines if line["event"] == "step")
    return datetime.fromisoformat(first).timestamp() - started
