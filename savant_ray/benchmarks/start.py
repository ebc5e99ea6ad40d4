"""From the command to the first step, against a script that does nothing but fit an empty `TorchTrainer`.

Whole commands in turn: with a Ray of their own, and against a head that runs already. And how long `savant --help` takes
against a Python that does nothing.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

from savant_ray.benchmarks.commands import ROOT, as_options, run_command, write_text
from savant_ray.benchmarks.rounds import Figures, figure, in_turn, seconds
from savant_ray.cluster.session import ray_session

ROUNDS = 3
EMPTY_JOB = """
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

def train():
    import torch

TorchTrainer(
    train, scaling_config=ScalingConfig(num_workers=1), run_config=RunConfig(name="empty", storage_path=FOLDER)
).fit()
"""
HELP = "from savant_ray.cli import main; main(['--help'])"
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
    """Three ratios."""
    figures: Figures = {"start_help": _help()}
    with tempfile.TemporaryDirectory(prefix="start") as folder:
        write_text(Path(folder))
        _first_step(Path(folder), {})  # the text is tokenised once
        figures["start_local"] = _against_empty(Path(folder), {})
        with ray_session():
            import ray

            there = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
            figures["start_running_head"] = _against_empty(Path(folder), there)
    return figures


def _help() -> dict[str, object]:
    python, savant = in_turn(
        9,
        lambda: seconds(lambda: run_command([sys.executable, "-c", "pass"])),
        lambda: seconds(lambda: run_command([sys.executable, "-c", HELP])),
    )
    return _figure(python, savant)


def _against_empty(folder: Path, changes: dict[str, str]) -> dict[str, object]:
    script = folder / "empty.py"
    script.write_text(EMPTY_JOB.replace("FOLDER", repr(str(folder))))

    def empty() -> float:
        return seconds(lambda: run_command([sys.executable, str(script)], folder, changes))

    return _figure(*in_turn(ROUNDS, empty, lambda: _first_step(folder, changes), warm_up=0))


def _figure(plain: list[float], ours: list[float]) -> dict[str, object]:
    ratios = [mine / other for mine, other in zip(ours, plain, strict=True)]
    return figure(ratios, f"{statistics.median(ours):.2f} against {statistics.median(plain):.2f} s")


def _first_step(folder: Path, changes: dict[str, str]) -> float:
    """Seconds until the record holds a step."""
    started = time.time()
    run_command([sys.executable, str(ROOT / "jobs/train.py"), "--fresh", *as_options(OPTIONS)], folder, changes)
    lines = map(json.loads, (folder / "run/metrics.jsonl").read_text().splitlines())
    first = next(line["time"] for line in lines if line["event"] == "step")
    return datetime.fromisoformat(first).timestamp() - started
