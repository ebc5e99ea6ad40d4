"""A run in a folder that every node reaches under the same path, such as NFS or, on a single node, a local disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from savant_ray.errors import SavantError
from savant_ray.storage.lease import Owner
from savant_ray.storage.lock import OLD, locked, owner_token, set_aside
from savant_ray.storage.protocol import RunStorage
from savant_ray.training.checkpoint import checkpoints, delete_folder, remove_unfinished, step_folders

DAMAGED = ".damaged"


class LocalStorage(RunStorage):
    """A run folder. Its lock is a lock of the operating system; its records need no upload."""

    filesystem = None

    def __init__(self, folder: Path, owner: Owner | None = None) -> None:
        self.folder, self.location, self.path = folder, str(folder), str(folder)
        self.owner = owner

    def locate(self, name: str) -> str:
        return str(self.folder / name)

    def step_folders(self) -> list[str]:
        return [folder.name for folder in step_folders(self.folder)]

    def checkpoints(self) -> list[str]:
        return [folder.name for folder in checkpoints(self.folder)]

    def file_names(self) -> list[str]:
        return [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []

    def fetch(self, name: str) -> Path:
        return self.folder / name

    def remove_unfinished(self) -> None:
        remove_unfinished(self.folder)

    def set_aside(self, name: str) -> str:
        return set_aside(self.folder / name, DAMAGED).name

    def has_damaged(self) -> bool:
        return any(self.folder.glob(f"step_*{DAMAGED}*"))

    def commit(self, folder: Path) -> None:
        """Do nothing: the checkpoint is in the run folder."""

    def delete(self, name: str) -> None:
        self.check_owner()
        delete_folder(self.folder / name)

    def write(self, name: str, text: str) -> None:
        temporary = self.folder / f"{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.folder / name)

    def store_file(self, file: Path, name: str) -> str:
        target = self.folder / name
        target.parent.mkdir(exist_ok=True)
        temporary = target.with_name(f"{target.name}.tmp")
        shutil.copyfile(file, temporary)
        temporary.replace(target)
        return str(target)

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def move_aside(self) -> str | None:
        if not self.folder.exists():
            return None
        with self.in_use():
            return str(set_aside(self.folder, OLD))

    @contextmanager
    def in_use(self, log: Callable[[str], None] = print) -> Iterator[None]:
        with locked(self.folder) as token:
            self.owner = Owner(token)
            yield

    def refuse_if_lost(self) -> None:
        """Do nothing: a lock of the operating system cannot be taken over while this process holds it."""

    def check_owner(self) -> None:
        if self.owner is not None and owner_token(self.folder) not in (self.owner.token, None):
            raise SavantError(
                f"{self.folder}: another process trains this run now; this one has stopped and saves nothing"
            )

    def expect_late_writes(self) -> None:
        """Do nothing: workers compare the owner's token before they write, so late writes of theirs are refused."""

    def fetch_records(self) -> None:
        """Do nothing: the records are in the run folder."""

    def send_records(self) -> None:
        """Do nothing: the records are in the run folder."""
