"""Names of files of the original script, `step_N.pt`. Imports no torch, so that `savant runs` starts quickly."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from savant_ray.errors import CheckpointError

MANIFEST = "manifest.json"  # that of `training/checkpoint.py`, which imports torch
_FILE = re.compile(r"step_(\d+)\.pt")


def is_original_name(name: str) -> bool:
    """Return whether `name` is the name of a file of the original, `step_N.pt`."""
    return _FILE.fullmatch(name) is not None


def original_step(name: str) -> int:
    """Return N of `step_N.pt`.

    Raises:
        CheckpointError: the file has another name.
    """
    match = _FILE.fullmatch(name)
    if match is None:
        raise CheckpointError(f"{name}: not named step_N.pt")
    return int(match[1])


def original_names(names: Iterable[str]) -> list[str]:
    """Return the names of files of the original among `names`, oldest first: by step number."""
    return sorted(filter(is_original_name, names), key=original_step)


def original_files(folder: Path) -> list[Path]:
    """Return the files of the original directly in a folder, intact or not, oldest first.

    A subfolder with such a name is included, because it is to be reported as damaged. `step_5/step_5.pt`,
    `step_5.damaged/step_5.pt` and files beside a manifest, as in a renamed copy of a checkpoint, are not included: they are
    the weights of a savant_ray checkpoint.
    """
    if any(folder.glob(MANIFEST)):  # unlike is_file(), without an error if the folder may not be searched
        return []
    weights_name = f"{folder.absolute().name.partition('.')[0]}.pt"
    names = original_names(path.name for path in folder.glob("step_*.pt"))
    return [folder / name for name in names if name != weights_name]


def newest_by_name(path: Path) -> tuple[int, Path] | None:
    """Return step and path of the newest file of the original at `path`, a file or folder; None if there is none."""
    files = [path] if path.is_file() and is_original_name(path.name) else original_files(path)
    return (original_step(files[-1].name), files[-1]) if files else None
