"""A checkpoint is a folder `step_N`, complete or absent.

    step_500/step_500.pt      weights, optimizer, position (see training/state.py)
    step_500/config.yaml      the settings it was trained with
    step_500/tokenizer.json   the tokenizer it was trained with
    step_500/manifest.json    sizes and SHA-256 of the others; written last

The folder is written as `step_500.tmp` and renamed, so a folder without a manifest is not a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from savant_ray.errors import CheckpointError

MANIFEST = "manifest.json"
CONFIG = "config.yaml"
TOKENIZER = "tokenizer.json"
_FOLDER = re.compile(r"step_(\d+)")


def write_checkpoint(run_folder: Path, content: dict[str, Any], config_yaml: str, tokenizer_json: str) -> Path:
    """Writes `run_folder/step_N` for the content's step N and returns it."""
    folder = run_folder / f"step_{content['step']}"
    aside = folder.with_name(folder.name + ".tmp")
    for stale in (aside, folder):  # a folder of that name is left from a run that died before it was reported
        if stale.exists():
            shutil.rmtree(stale)
    aside.mkdir(parents=True)
    torch.save(content, aside / f"{folder.name}.pt")
    (aside / CONFIG).write_text(config_yaml)
    (aside / TOKENIZER).write_text(tokenizer_json)
    (aside / MANIFEST).write_text(json.dumps(_manifest(aside, content["step"]), indent=1))
    for path in aside.iterdir():
        _sync(path)
    aside.rename(folder)
    _sync(run_folder)
    return folder


def checkpoints(run_folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first, by step number."""
    found = [path for path in run_folder.glob("step_*") if _FOLDER.fullmatch(path.name)]
    return sorted((path for path in found if (path / MANIFEST).is_file()), key=step_of)


def newest_checkpoint(run_folder: Path) -> Path | None:
    """The one with the highest step number, or None in a folder without checkpoints."""
    return max(checkpoints(run_folder), key=step_of, default=None)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder that `path` names: itself, or the newest of a run.

    Raises:
        CheckpointError: there is none.
    """
    if (path / MANIFEST).is_file():
        return path
    newest = newest_checkpoint(path) if path.is_dir() else None
    if newest is None:
        raise CheckpointError(f"{path}: no checkpoint there (looked for {MANIFEST} and step_*/{MANIFEST})")
    return newest


def read_checkpoint(folder: Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """The content of a checkpoint, checked against its manifest. Executes no code from the file.

    Raises:
        CheckpointError: a file is missing, cut short or altered, or the format is of another version.
    """
    for name, expected in json.loads((folder / MANIFEST).read_text())["files"].items():
        _check(folder, name, expected)
    return torch.load(folder / f"{folder.name}.pt", map_location=device, weights_only=True)


def step_of(folder: Path) -> int:
    """500 of `step_500`."""
    match = _FOLDER.fullmatch(folder.name)
    if match is None:
        raise CheckpointError(f"{folder}: not named step_N")
    return int(match.group(1))


def _manifest(folder: Path, step: int) -> dict[str, Any]:
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}
    return {"step": step, "files": files}


def _check(folder: Path, name: str, expected: dict[str, Any]) -> None:
    path = folder / name
    size = path.stat().st_size if path.exists() else 0
    if size != expected["bytes"]:
        raise CheckpointError(f"checkpoint {folder.name}: {name} has {size:,} of {expected['bytes']:,} bytes")
    if _sha256(path) != expected["sha256"]:
        raise CheckpointError(f"checkpoint {folder.name}: {name} is not what was written (SHA-256 differs)")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Asks the operating system to put a file or a folder's entries on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
