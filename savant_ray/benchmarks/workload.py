"""Used by several benchmarks: device, model size, peak FLOP/s, and running commands on generated text."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from savant_ray.config import ModelConfig
from savant_ray.training.device import supported_precision
from savant_ray.training.efficiency import Peak

ROOT = Path(__file__).resolve().parents[2]
MAX_SECONDS = 1.0  # of a matrix product
MAIN = "import sys; from savant_ray.cli import main; sys.exit(main())"  # the command `savant`, even if not installed


def benchmark_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def benchmark_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which the device computes `training.precision: bf16`."""
    return torch.bfloat16 if supported_precision("bf16", device)[0] == "bf16" else torch.float32


def model_config(device: torch.device) -> ModelConfig:
    """Return the default model, on a CPU with half its dimension."""
    return ModelConfig() if device.type == "cuda" else ModelConfig(dim=512, n_heads=8)


def peak_flops_per_second(device: torch.device) -> float:
    """Measure the FLOP/s of the fastest large matrix product in the benchmark dtype."""
    peak = Peak(supported_precision("bf16", device)[0], device)
    peak.measure(MAX_SECONDS)
    return peak.flops_per_second


def as_options(settings: Mapping[str, object]) -> list[str]:
    """Return settings as command-line options `--name value`."""
    return [part for name, value in settings.items() for part in (f"--{name}", str(value).lower())]


def train_command(settings: Mapping[str, object]) -> list[str]:
    """Return the command that trains a new run with these settings."""
    return [sys.executable, "-c", MAIN, "train", "--fresh", *as_options(settings)]


def run_command(command: list[str], folder: Path | None = None, variables: dict[str, str] | None = None) -> None:
    """Run a command in `folder` (default: `ROOT`) with `variables` added to the environment.

    With `ROOT` in PYTHONPATH, the command imports this package even if it is not installed.

    Raises:
        RuntimeError: the command failed; the message contains its output.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    inherited["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(  # noqa: PLW1510 - the error below contains the output
        command, cwd=folder or ROOT, env=inherited | {"RAY_AUTH_MODE": "disabled"} | (variables or {}), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}")


def write_text(folder: Path, documents: int = 300) -> None:
    """Write training and validation text of random numbers to the default paths under `folder`."""
    (folder / "dataset").mkdir()
    generator = random.Random(0)
    for name, count in (("train", documents), ("val", 60)):
        texts = (" ".join(str(generator.randint(1, 999)) for _ in range(40)) for _ in range(count))
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"dataset/savant_dataset_{name}.jsonl").write_text(lines)
