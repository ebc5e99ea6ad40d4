"""A run in object storage (`s3://…`, whatever `pyarrow.fs` knows), which has no rename, no append and no lock.

The run folder is a mirror on this machine: a checkpoint is written into it as on a disk and then sent, its manifest
last; the driver's own files go along. What the storage holds is what counts, and a mirror may be thrown away.

Nothing there is overwritten, because a worker of an earlier owner of the run may still write: a checkpoint is
`step_500`, after a run was taken over from a process that had not ended it `step_500.1` (the epoch of the lease), and
with a `-2` behind it where there was a complete one of that name. Of several the last one counts. A worker writes names
of its own epoch and deletes names up to it, so one that was superseded reaches none of its successor's.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

import pyarrow.fs as pafs

from savant_ray.data.sources import file_system, with_short_retries
from savant_ray.errors import CheckpointError, SavantError, SettingsError
from savant_ray.locations import join_uri, parent_and_name
from savant_ray.reporting.record import METRICS, SAMPLES, last_time
from savant_ray.reporting.run_report import LOG
from savant_ray.storage.lease import Lease, Owner, leased, refuse_if_superseded
from savant_ray.storage.local import DAMAGED, Disk
from savant_ray.storage.lock import free_name, locked, set_aside
from savant_ray.training.checkpoint import (
    CONFIG,
    MANIFEST,
    remove_left_behind,
    replace_folder,
    step_folders,
    step_of,
    verify,
)

RECORDS = (METRICS, SAMPLES, LOG, CONFIG)
CHUNK_BYTES = 64 << 20
UNSENT = ".unsent"
_STORED = re.compile(r"(step_\d+)(?:\.(\d+))?(?:-(\d+))?")


class ObjectStorage(Disk):
    """A run in object storage, and its mirror on this machine.

    Raises:
        SettingsError: no URI of a storage that pyarrow knows.
    """

    filesystem: pafs.FileSystem
    _lease: Lease | None = None

    def __init__(self, uri: str, folder: Path, owner: Owner | None = None) -> None:
        self.folder, self.location, self.owner = folder, uri, owner
        self.filesystem, self.path = file_system(with_short_retries(uri), SettingsError)

    def __getstate__(self) -> dict[str, Any]:
        """To other processes goes the fencing token, not the lease."""
        return {name: value for name, value in self.__dict__.items() if name != "_lease"}

    def locate(self, name: str) -> str:
        return join_uri(self.location, name)

    def steps(self) -> list[str]:
        return _steps(self._stored(self._files()))

    def complete_steps(self) -> list[str]:
        return _steps(_complete(self._files()))

    def files(self) -> list[str]:
        return [name for name in self._files() if "/" not in name]

    def fetch(self, name: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        target, source = self.folder / name, self._newest_stored(name)
        if not self._is_mirrored(name, source):
            with TemporaryDirectory(dir=self.folder, prefix="fetch-") as scratch:
                self._download(source, Path(scratch, name))
                if target.is_dir():
                    replace_folder(Path(scratch, name), target)
                else:
                    Path(scratch, name).replace(target)
        return target

    def fetch_files(self, name: str, files: Sequence[str]) -> Path:
        """Fetch some files of a checkpoint into its folder on this machine. Raises OSError."""
        source, target = self._newest_stored(name), self.folder / name
        target.mkdir(parents=True, exist_ok=True)
        for file in files:
            with self.filesystem.open_input_stream(f"{self.path}/{source}/{file}") as stream:
                (target / file).write_bytes(stream.read())
        return target

    def remove_unfinished(self) -> None:
        self._remove_begun(keep=self._stored(self._files()))
        remove_left_behind(self.folder)
        for left in self.folder.glob("fetch-*"):
            shutil.rmtree(left)
        for stale in {folder.name for folder in step_folders(self.folder)} - set(self.complete_steps()):
            shutil.rmtree(self.folder / stale)

    def set_aside(self, name: str) -> str:
        shutil.rmtree(self.folder / name)
        names = {path.partition("/")[0] for path in self._files()}
        target = free_name(name + DAMAGED, names.__contains__)
        self._move(f"{self.path}/{self._newest_stored(name)}", f"{self.path}/{target}")
        return target

    def has_damaged(self) -> bool:
        return any(path.startswith("step_") and DAMAGED in path for path in self._files())

    def keep(self, folder: Path) -> str:
        try:
            self._send(folder)
        except (OSError, SavantError) as error:
            unsent = folder.with_name(folder.name + UNSENT)
            replace_folder(folder, unsent)
            self._mirror_only(unsent)
            raise type(error)(f"{error}. It lies whole in {unsent} of this node") from error
        self._mirror_only(folder)
        return f"{self.path}/{folder.name}"

    def delete(self, name: str) -> None:
        self.check_owner()
        for stored in self._own(self._checkpoint_folders(self._files())):
            if _parts(stored)[0] == name:
                self._delete_stored(stored)

    def write(self, name: str, text: str) -> None:
        with self.filesystem.open_output_stream(f"{self.path}/{name}") as file:
            file.write(text.encode())

    def remove(self, name: str) -> None:
        if name in self._files():
            self.filesystem.delete_file(f"{self.path}/{name}")

    def move_aside(self) -> str | None:
        with self.in_use():
            if self.folder.exists():
                set_aside(self.folder, ".old")
            if not self._files():
                return None
            target = free_name(f"{self.path}.old", lambda path: bool(self._files(path)))
            self._move(self.path, target)
        return join_uri(parent_and_name(self.location)[0], quote(target.rpartition("/")[2]))

    @contextmanager
    def in_use(self, say: Callable[[str], None] = print) -> Iterator[None]:
        with locked(self.folder):
            least_epoch = max((_parts(stored)[1] for stored in self._checkpoint_folders(self._files())), default=0)
            with leased(self.filesystem, self.path, say, least_epoch) as self._lease:
                self.owner = self._lease.owner
                yield

    def refuse_if_lost(self) -> None:
        if self._lease is not None:
            self._lease.refuse_if_lost()

    def check_owner(self) -> None:
        if self.owner is not None:
            refuse_if_superseded(self.filesystem, self.path, self.owner)

    def expect_late_writes(self) -> None:
        if self._lease is not None:
            self._lease.workers_may_live = True

    def fetch_records(self) -> None:
        """Takes what another machine has recorded since; what this one has recorded of a run that is gone goes aside."""
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = [name for name in RECORDS if name in self._files()]
        with TemporaryDirectory(dir=self.folder, prefix="fetch-") as scratch:
            for name in kept:
                self._download(name, Path(scratch, name))
            if not kept:
                for file in filter(Path.exists, (self.folder / name for name in RECORDS)):
                    set_aside(file, ".old")
            elif last_time(Path(scratch, METRICS)) > last_time(self.folder / METRICS):
                for name in kept:
                    Path(scratch, name).replace(self.folder / name)

    def send_records(self) -> None:
        try:
            self.check_owner()
        except SavantError as lost:  # what lies there is the other one's
            raise OSError("another process trains this run") from lost
        for file in filter(Path.exists, (self.folder / name for name in RECORDS)):
            self._upload(file, f"{self.path}/{file.name}")

    def _send(self, folder: Path) -> None:
        """Uploads under a name that holds nothing complete; what it takes the place of is deleted when it is."""
        self.check_owner()
        complete = _complete(self._files())
        self._remove_begun(keep=complete)
        epoch = 0 if self.owner is None else self.owner.epoch
        numbers = [number for *stored, number in map(_parts, complete) if stored == [folder.name, epoch]]
        target = folder.name + (f".{epoch}" if epoch else "") + (f"-{max(numbers) + 1}" if numbers else "")
        for file in sorted(folder.iterdir(), key=_in_order_of_sending):
            if file.name == MANIFEST:
                self.check_owner()
            self._upload(file, f"{self.path}/{target}/{file.name}")
        for stored in self._own(complete):
            if _parts(stored)[0] == folder.name:
                with suppress(OSError):  # deleted when the step is
                    self._delete_stored(stored)

    def _mirror_only(self, newest: Path) -> None:
        """Drops the mirror's other checkpoints, those that could not be sent too."""
        for folder in [*step_folders(self.folder), *self.folder.glob(f"step_*{UNSENT}")]:
            if folder != newest:
                shutil.rmtree(folder, ignore_errors=True)

    def _remove_begun(self, keep: set[str]) -> None:
        """Other folders of checkpoints: what an interrupted sending or deleting left."""
        for stored in self._own(self._checkpoint_folders(self._files()) - keep):
            self._delete_stored(stored)

    def _delete_stored(self, stored: str) -> None:
        """The manifest first: what is deleted in part is no checkpoint."""
        for delete, path in ((self.filesystem.delete_file, f"/{MANIFEST}"), (self.filesystem.delete_dir, "")):
            with suppress(FileNotFoundError):  # Ray was deleting it and is through
                delete(f"{self.path}/{stored}{path}")

    def _own(self, stored: Iterable[str]) -> list[str]:
        """Those that this owner may delete: none of a later one."""
        epoch = 0 if self.owner is None else self.owner.epoch
        return [each for each in stored if _parts(each)[1] <= epoch]

    def _checkpoint_folders(self, files: Iterable[str]) -> set[str]:
        folders = {path.partition("/")[0] for path in files if "/" in path}
        return {folder for folder in folders if _STORED.fullmatch(folder)}

    def _stored(self, files: Iterable[str]) -> set[str]:
        """The folders that hold a manifest or weights."""
        files = list(files)
        return _complete(files) | {path.rpartition("/")[0] for path in files if _is_weights(path)}

    def _newest_stored(self, name: str) -> str:
        """The folder or file there that is meant by `step_N`: complete, of the last owner, the last replacement."""
        files = self._files()
        complete = _complete(files)
        meant = [stored for stored in self._stored(files) if _parts(stored)[0] == name]
        return max(meant, key=lambda stored: (stored in complete, *_parts(stored)[1:]), default=name)

    def _files(self, path: str | None = None) -> list[str]:
        """What lies there, relative to the run (or to `path`), without hidden files."""
        top = self.path if path is None else path
        infos = self.filesystem.get_file_info(pafs.FileSelector(top, recursive=True, allow_not_found=True))
        names = (info.path[len(top) + 1 :] for info in infos if info.type == pafs.FileType.File)
        return [name for name in names if not name.startswith(".")]

    def _is_mirrored(self, name: str, stored: str) -> bool:
        """Whether this machine has the checkpoint as it is there, and whole."""
        try:
            verify(self.folder / name)
            here = (self.folder / name / MANIFEST).read_bytes()
            with self.filesystem.open_input_stream(f"{self.path}/{stored}/{MANIFEST}") as there:
                return bool(there.read() == here)
        except (CheckpointError, OSError):
            return False

    def _download(self, name: str, target: Path) -> None:
        if _STORED.fullmatch(name):
            target.mkdir()
        pafs.copy_files(f"{self.path}/{name}", str(target), source_filesystem=self.filesystem, chunk_size=CHUNK_BYTES)

    def _upload(self, file: Path, target: str) -> None:
        pafs.copy_files(  # threads of their own can lose parts of an upload: apache/arrow#32372
            str(file), target, destination_filesystem=self.filesystem, chunk_size=CHUNK_BYTES, use_threads=False
        )

    def _move(self, source: str, target: str) -> None:
        """File by file: object storage renames nothing else. Whenever it is cut short, one of the two is whole."""
        names = sorted(self._files(source), key=_is_manifest)
        for name in names:
            self.filesystem.copy_file(f"{source}/{name}", f"{target}/{name}")
        self.check_owner()
        for name in reversed(names):
            self.filesystem.delete_file(f"{source}/{name}")
        emptied = {name.partition("/")[0] for name in names if "/" in name} if source == self.path else {""}
        for folder in emptied:
            with suppress(OSError):  # what some storages keep in the place of an empty folder; the lease stays
                self.filesystem.delete_dir(f"{source}/{folder}".rstrip("/"))


def step_name(stored: str) -> str | None:
    """`step_500` for each folder that holds it: `step_500`, `step_500.1`, `step_500.1-2`; None for other names."""
    return _parts(stored)[0] or None


def _steps(stored: Iterable[str]) -> list[str]:
    """The checkpoints that are stored in these folders, oldest first."""
    return sorted({_parts(each)[0] for each in stored}, key=lambda name: step_of(Path(name)))


def _complete(files: Iterable[str]) -> set[str]:
    """The folders with a manifest."""
    folders = {path.rpartition("/")[0] for path in files if _is_manifest(path)}
    return {folder for folder in folders if _STORED.fullmatch(folder)}


def _parts(stored: str) -> tuple[str, int, int]:
    """Checkpoint, epoch and number of a stored folder: `step_500.1-2` -> `step_500`, 1, 2."""
    match = _STORED.fullmatch(stored)
    return (match[1], int(match[2] or 0), int(match[3] or 1)) if match else ("", 0, 1)


def _is_manifest(path: str) -> bool:
    return path.rpartition("/")[2] == MANIFEST


def _is_weights(path: str) -> bool:
    """Whether it is the `step_N.pt` of a stored folder."""
    folder, _, file = path.rpartition("/")
    name = _parts(folder)[0]
    return bool(name) and file == f"{name}.pt"


def _in_order_of_sending(file: Path) -> tuple[bool, bool]:
    """The manifest last, the weights before it: without them there is nothing that one would want back."""
    return file.name == MANIFEST, file.suffix == ".pt"
