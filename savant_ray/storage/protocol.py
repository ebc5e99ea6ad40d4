"""The interface of a run's storage, and the choice of the checkpoint that a run continues from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import pyarrow.fs as pafs

from savant_ray.errors import CheckpointError
from savant_ray.storage.lease import Owner
from savant_ray.training.checkpoint import newest_of, verify, write_checkpoint


class RunStorage(Protocol):
    """Where the checkpoints and records of one run are stored.

    Checkpoints are addressed by name, `step_500`. Methods that read or write raise OSError if the storage fails.
    """

    folder: Path
    """The run folder on this machine; of object storage, its mirror."""
    location: str
    """Path or URI of the run, for messages."""
    path: str
    """Path of the run in `filesystem`."""
    filesystem: pafs.FileSystem | None
    """File system for Ray; None for the machine's own."""
    permanent: str | None = None
    """Name of a checkpoint that is kept beside the newest ones: the last before the decay of `training.schedule: wsd`."""
    owner: Owner | None
    """Fencing token of the process that may write; if None, `check_owner` does nothing."""

    def locate(self, name: str) -> str:
        """Return the path or URI of a checkpoint, for messages."""

    def step_folders(self) -> list[str]:
        """Return the names of the checkpoints, oldest first, including incomplete ones without a manifest.

        Object storage omits those that have neither manifest nor weights.
        """

    def checkpoints(self) -> list[str]:
        """Return the names of the checkpoints that have a manifest, oldest first."""

    def file_names(self) -> list[str]:
        """Return the names of the files directly in the run folder; for a local run also the names of its subfolders."""

    def fetch(self, name: str) -> Path:
        """Return the local path of a checkpoint or file, downloading it if necessary."""

    def remove_unfinished(self) -> None:
        """Remove files and folders that an interrupted process did not finish writing."""

    def set_aside(self, name: str) -> str:
        """Rename a damaged checkpoint and return its new name."""

    def has_damaged(self) -> bool:
        """Return whether the run contains checkpoints that `set_aside` has renamed."""

    def save(self, content: dict[str, Any], texts: Mapping[str, str]) -> Path:
        """Write a checkpoint, as `write_checkpoint` does, and store it; return its local folder.

        Raises:
            SavantError: another process owns the run.
            OSError: the storage failed.
        """
        self.check_owner()
        folder = write_checkpoint(self.folder, content, texts, self.check_owner)
        self.commit(folder)
        return folder

    def commit(self, folder: Path) -> None:
        """Store a checkpoint that was written into `folder`, a subfolder of `self.folder`."""

    def delete(self, name: str) -> None:
        """Delete a checkpoint.

        Raises:
            SavantError: another process owns the run.
        """

    def write(self, name: str, text: str) -> None:
        """Write a small file atomically."""

    def store_file(self, file: Path, name: str) -> str:
        """Copy a file of this machine into the run as `name`, such as `profile/rank0`; return its path or URI."""

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""

    def move_aside(self) -> str | None:
        """Rename the run and return its new location; None if there is no run.

        Raises:
            SavantError: another process trains this run.
        """

    def in_use(self, log: Callable[[str], None] = print) -> AbstractContextManager[None]:
        """Lock the run within a `with` block; `log` receives messages about waiting for another owner.

        Raises:
            SavantError: another process trains this run.
        """

    def refuse_if_lost(self) -> None:
        """Raise SavantError if the run was taken over after `in_use` locked it; does not access the storage."""

    def check_owner(self) -> None:
        """Read who owns the run.

        Workers call this before they write; `save`, `delete` and uploads of checkpoints and records include it.

        Raises:
            SavantError: another process owns the run.
        """

    def expect_late_writes(self) -> None:
        """Record that workers may still write after this process exits, so that the next owner writes other folders."""

    def fetch_records(self) -> None:
        """Download the driver's own files (record, samples, log, settings)."""

    def send_records(self) -> None:
        """Upload the driver's own files."""


def newest_checkpoint_name(storage: RunStorage) -> str | None:
    """Return the name of the newest checkpoint that has a manifest; None if there is none. Raises OSError.

    Its files are not verified; see `newest_intact_checkpoint`.
    """
    return newest_of(storage.checkpoints())


def newest_intact_checkpoint(storage: RunStorage, log: Callable[[str], None]) -> Path | None:
    """Return the local path of the newest checkpoint whose files are intact; None if there is none.

    Newer checkpoints that are damaged are set aside, with a message to `log`. A folder without a manifest is a damaged
    checkpoint here: the user learns why the run continues from an earlier one.

    Raises:
        OSError: the storage cannot be read or written.
    """
    # Listed again after each damaged one: object storage may have an older folder of the same step (object_store.py).
    while name := newest_of(storage.step_folders()):
        folder = storage.fetch(name)
        try:
            verify(folder)
        except CheckpointError as damage:
            log(f"{damage}; set aside as {storage.set_aside(name)}")
        else:
            return folder
    return None
