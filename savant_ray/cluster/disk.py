"""A run in a folder that every node reaches under the same path: a local disk, NFS."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.fs as pafs

from savant_ray.cluster.lock import locked, move_run_aside, set_aside
from savant_ray.training.checkpoint import checkpoints, step_folders

DAMAGED = ".damaged"


class Disk:
    """A run folder that every node reaches under the same path."""

    filesystem: pafs.FileSystem | None = None  # for Ray: None is a path of the machine's own

    def __init__(self, folder: Path) -> None:
        self.folder, self.location, self.path = folder, str(folder), str(folder)

    def locate(self, name: str) -> str:
        """A checkpoint's path or URI, for people."""
        return str(self.folder / name)

    def steps(self) -> list[str]:
        """Names of the checkpoints, whole or not, oldest first."""
        return [folder.name for folder in step_folders(self.folder)]

    def complete_steps(self) -> list[str]:
        """Names of the checkpoints that have a manifest, oldest first."""
        return [folder.name for folder in checkpoints(self.folder)]

    def fetch(self, name: str) -> Path:
        """The checkpoint as a folder on this machine; raises OSError."""
        return self.folder / name

    def fetch_originals(self) -> None:
        """Brings the original's files here."""

    def remove_unfinished(self) -> None:
        """What a run left that died while writing."""
        for unfinished in self.folder.glob("step_*.tmp"):
            shutil.rmtree(unfinished)

    def set_aside(self, name: str) -> str:
        """Renames a damaged checkpoint; returns its new name."""
        return set_aside(self.folder / name, DAMAGED).name

    def has_damaged(self) -> bool:
        """Whether a damaged checkpoint lies here."""
        return any(self.folder.glob(f"step_*{DAMAGED}*"))

    def keep(self, folder: Path) -> str:
        """Takes over a checkpoint that was just written into `folder`; its path for Ray. Raises OSError."""
        return str(folder)

    def write(self, name: str, text: str) -> None:
        """A small file, complete or as it was."""
        aside = self.folder / f"{name}.tmp"
        aside.write_text(text, encoding="utf-8")
        aside.replace(self.folder / name)

    def remove(self, name: str) -> None:
        """A file, if it is there."""
        (self.folder / name).unlink(missing_ok=True)

    def move_aside(self) -> str | None:
        """Renames the whole run; returns where it is now, None if there was none."""
        moved = move_run_aside(self.folder)
        return None if moved is None else str(moved)

    @contextmanager
    def in_use(self, say: Callable[[str], None] = print) -> Iterator[None]:
        """Locks the run for the time of a `with` block; raises SavantError where another process trains it."""
        with locked(self.folder):
            yield

    def refuse_if_lost(self) -> None:
        """Raises SavantError where another process could take the run over while this one has it in use, and did."""

    def fetch_records(self) -> None:
        """Brings the driver's own files here."""

    def send_records(self) -> None:
        """Brings the driver's own files to where the run is kept. Raises OSError."""
