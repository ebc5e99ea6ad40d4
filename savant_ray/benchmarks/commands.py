"""Whole commands, as a user types them, over a text made on the spot."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def as_options(settings: Mapping[str, object]) -> list[str]:
    """`--name value` for the command line."""
    return [part for name, value in settings.items() for part in (f"--{name}", str(value).lower())]


def run_command(command: list[str], folder: Path | None = None, changes: dict[str, str] | None = None) -> None:
    """Runs it in `folder`, with `changes` to the environment; raises RuntimeError with what it printed if it fails."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(  # noqa: PLW1510 - what it printed is told below
        command, cwd=folder or ROOT, env=kept | {"RAY_AUTH_MODE": "disabled"} | (changes or {}), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}")


def write_text(folder: Path, documents: int = 300) -> None:
    """Training and validation text of numbers, where the defaults look for it."""
    (folder / "dataset").mkdir()
    chance = random.Random(0)
    for name, count in (("train", documents), ("val", 60)):
        texts = (" ".join(str(chance.randint(1, 999)) for _ in range(40)) for _ in range(count))
        text = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"dataset/savant_dataset_{name}.jsonl").write_text(text)
