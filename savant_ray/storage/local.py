"""A run in a folder that every node reaches under the same path: a local disk, NFS."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.fs as pafs

from savant_ray.errors import SavantError
from savant_ray.storage.lease import Owner
from savant_ray.storage.lock import locked, move_run_aside, owner_token, set_aside
from savant_ray.training.checkpoint import checkpoints, delete_folder, remove_left_behind, step_folders

DAMAGED = ".damaged"


class Disk:
    """A run folder that every node reaches under the same path."""

    filesystem: pafs.FileSystem | None = None  # for Ray: None is a path of the machine's own

    def __init__(self, folder: Path, owner: Owner | None = None) -> None:
        self.folder, self.location, self.path = folder, str(folder), str(folder)
        self.owner = owner  # of who may write; None: nobody looks

    def locate(self, name: str) -> str:
        """A checkpoint's path or URI, for people."""
        return str(self.folder / name)

    def steps(self) -> list[str]:
        """Names of the checkpoints, whole or not, oldest first."""
        return [folder.name for folder in step_folders(self.folder)]

    def complete_steps(self) -> list[str]:
        """Names of the checkpoints that have a manifest, oldest first."""
        return [folder.name for folder in checkpoints(self.folder)]

    def files(self) -> list[str]:
        """Return the names of what lies directly in the run folder."""
        return [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []

    def fetch(self, name: str) -> Path:
        """A checkpoint, or a file of the run, on this machine; raises OSError."""
        return self.folder / name

    def remove_unfinished(self) -> None:
        """What a run left that died while writing."""
        remove_left_behind(self.folder)

    def set_aside(self, name: str) -> str:
        """Renames a damaged checkpoint; returns its new name."""
        return set_aside(self.folder / name, DAMAGED).name

    def has_damaged(self) -> bool:
        """Whether a damaged checkpoint lies here."""
        return any(self.folder.glob(f"step_*{DAMAGED}*"))

    def keep(self, folder: Path) -> str:
        """Takes over a checkpoint that was just written into `folder`; its path for Ray. Raises OSError."""
        return str(folder)

    def delete(self, name: str) -> None:
        """Deletes a checkpoint that is one too many.

        Raises:
            SavantError: another process has taken the run over.
            OSError: the storage refuses.
        """
        self.check_owner()
        delete_folder(self.folder / name)

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
        with locked(self.folder) as token:
            self.owner = Owner(token)
            yield

    def refuse_if_lost(self) -> None:
        """Raises SavantError where another process could take the run over while this one has it in use, and did."""

    def check_owner(self) -> None:
        """Reads who owns the run; before anything that others see is written or deleted, in driver and workers.

        Raises:
            SavantError: another process does, so its files must be left alone.
            OSError: the storage is not reached.
        """
        if self.owner is not None and owner_token(self.folder) not in (self.owner.token, None):
            raise SavantError(
                f"{self.folder}: another process trains this run now; this one has stopped and saves nothing"
            )

    def expect_late_writes(self) -> None:
        """Notes that workers may still write when this process has ended, so that the next owner uses other names."""

    def fetch_records(self) -> None:
        """Brings the driver's own files here."""

    def send_records(self) -> None:
        """Brings the driver's own files to where the run is kept. Raises OSError."""
