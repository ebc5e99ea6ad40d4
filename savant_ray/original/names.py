"""How files of the original are named, `step_X.pt`. Imports no torch, so that `savant runs` starts quickly."""

from __future__ import annotations

import re
from pathlib import Path

from savant_ray.errors import CheckpointError

_FILE = re.compile(r"step_(\d+)\.pt")


def original_files(folder: Path) -> list[Path]:
    """Return the files of the original that lie directly in a folder, whole or not, oldest first, by step number.

    A folder of that name counts too: it stands where a checkpoint should be. `step_5/step_5.pt` does not, nor does
    `step_5.damaged/step_5.pt`: they belong to a checkpoint of ours.
    """
    own = folder.absolute().name.partition(".")[0]
    found = (path for path in folder.glob("step_*.pt") if is_original_name(path.name) and path.stem != own)
    return sorted(found, key=lambda path: original_step(path.name))


def newest_by_name(path: Path) -> tuple[int, Path] | None:
    """Return step and path of the newest file of the original that a path means: itself, or in this folder."""
    files = [path] if path.is_file() and is_original_name(path.name) else original_files(path)
    return (original_step(files[-1].name), files[-1]) if files else None


def is_original_name(name: str) -> bool:
    """Return whether a file of that name is the original's."""
    return _FILE.fullmatch(name) is not None


def original_step(name: str) -> int:
    """Return 500 for `step_500.pt`.

    Raises:
        CheckpointError: a file of the original has another name.
    """
    match = _FILE.fullmatch(name)
    if match is None:
        raise CheckpointError(f"{name}: not named step_N.pt")
    return int(match.group(1))
