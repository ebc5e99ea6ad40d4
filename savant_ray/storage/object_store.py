"""A run in object storage (`s3://…`, any URI that `pyarrow.fs` supports), which has no rename, no append and no lock.

The run folder on this machine is a mirror: a checkpoint is written into it as into a local run and then uploaded, its
manifest last. The driver also uploads its own files (`DRIVER_FILES`). The storage is authoritative: if a mirror is deleted,
only what could not be uploaded is lost (a checkpoint in `step_N.unsent`, the newest lines of the record).

No complete checkpoint is overwritten, because a worker of an earlier owner of the run may still write. The checkpoint
`step_500` is stored in one or more folders with these names:

    step_500      written in epoch 0 of the lease
    step_500.1    written in epoch 1: the run was taken over from a process whose workers may still write
    step_500.1-2  written in epoch 1 while a complete step_500.1 existed

The current one is the complete folder with the highest epoch and, among these, the highest number. A worker writes only
names of its own epoch and deletes only names of its own and earlier epochs, so a superseded worker cannot change the
files of its successor.
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
from savant_ray.locations import free_name, join_uri, parent_and_name
from savant_ray.reporting.record import METRICS, SAMPLES, continues, is_same_run
from savant_ray.reporting.run_report import LOG
from savant_ray.reporting.tensorboard import FOLDER as TENSORBOARD
from savant_ray.storage.lease import Lease, Owner, leased, refuse_if_superseded
from savant_ray.storage.local import DAMAGED
from savant_ray.storage.lock import OLD, locked, set_aside
from savant_ray.storage.protocol import RunStorage
from savant_ray.training.checkpoint import (
    CONFIG,
    MANIFEST,
    in_step_order,
    read_manifest,
    remove_unfinished,
    replace_folder,
    step_folders,
    verify,
)

DRIVER_FILES = (METRICS, SAMPLES, LOG, CONFIG)  # files in the run folder that only the driver writes
CHUNK_BYTES = 64 << 20
UNSENT = ".unsent"  # suffix of a checkpoint in the mirror that could not be uploaded
_STORED = re.compile(r"(step_\d+)(?:\.(\d+))?(?:-(\d+))?")  # checkpoint, epoch, number


class ObjectStorage(RunStorage):
    """A run in object storage, with a mirror in a folder of this machine.

    Raises:
        SettingsError: `uri` is not the URI of a storage that pyarrow supports.
    """

    def __init__(self, uri: str, folder: Path, owner: Owner | None = None) -> None:
        self.folder, self.location, self.owner = folder, uri, owner
        self.filesystem, self.path = file_system(with_short_retries(uri), SettingsError)
        self._lease: Lease | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for other processes, which get the fencing token but not the lease."""
        return {**self.__dict__, "_lease": None}

    def locate(self, name: str) -> str:
        return join_uri(self.location, name)

    def step_folders(self) -> list[str]:
        return _in_step_order(_with_manifest_or_weights(self._list()))

    def checkpoints(self) -> list[str]:
        return _in_step_order(_with_manifest(self._list()))

    def file_names(self) -> list[str]:
        return [path for path in self._list() if "/" not in path]

    def fetch(self, name: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        target, source = self.folder / name, self._stored_name(name)
        if not self._is_mirrored(name, source):
            with TemporaryDirectory(dir=self.folder, prefix="fetch-") as scratch:
                self._download(source, Path(scratch, name))
                if target.is_dir():
                    replace_folder(Path(scratch, name), target)
                else:
                    Path(scratch, name).replace(target)
        return target

    def fetch_files(self, name: str, files: Sequence[str]) -> Path:
        """Download the manifest of a checkpoint and those of `files` that it lists; return the local folder.

        Raises:
            CheckpointError: the manifest was altered.
            OSError: the storage fails, or has not all of these files.
        """
        source, target = self._stored_name(name), self.folder / name
        target.mkdir(parents=True, exist_ok=True)

        def download(file: str) -> None:
            with self.filesystem.open_input_stream(f"{self.path}/{source}/{file}") as stream:
                (target / file).write_bytes(stream.read())

        download(MANIFEST)
        listed = read_manifest(target)["files"]
        for file in files:
            if file in listed:
                download(file)
        return target

    def remove_unfinished(self) -> None:
        self._delete_other_folders(keep=_with_manifest_or_weights(self._list()))
        remove_unfinished(self.folder)
        for unfinished in self.folder.glob("fetch-*"):
            shutil.rmtree(unfinished)
        for name in {folder.name for folder in step_folders(self.folder)} - set(self.checkpoints()):
            shutil.rmtree(self.folder / name)  # the storage no longer has it

    def set_aside(self, name: str) -> str:
        shutil.rmtree(self.folder / name)
        taken = {path.partition("/")[0] for path in self._list()}
        target = free_name(name + DAMAGED, taken.__contains__)
        self._move(f"{self.path}/{self._stored_name(name)}", f"{self.path}/{target}")
        return target

    def has_damaged(self) -> bool:
        return any(path.startswith("step_") and DAMAGED in path for path in self._list())

    def commit(self, folder: Path) -> None:
        try:
            self._upload_checkpoint(folder)
        except (OSError, SavantError) as error:
            unsent = folder.with_name(folder.name + UNSENT)
            replace_folder(folder, unsent)
            self._delete_other_mirrored(unsent)
            raise type(error)(
                f"{str(error).rstrip('.')}. The checkpoint is complete in {unsent} on this node"
            ) from error
        self._delete_other_mirrored(folder)

    def delete(self, name: str) -> None:
        self.check_owner()
        for stored in self._deletable(_stored_folders(self._list())):
            if _parts(stored)[0] == name:
                self._delete_stored(stored)

    def write(self, name: str, text: str) -> None:
        with self.filesystem.open_output_stream(f"{self.path}/{name}") as file:
            file.write(text.encode())

    def store_file(self, file: Path, name: str) -> str:
        self._upload(file, f"{self.path}/{name}")
        return self.locate(name)

    def remove(self, name: str) -> None:
        if name in self._list():
            self.filesystem.delete_file(f"{self.path}/{name}")

    def move_aside(self) -> str | None:
        with self.in_use():
            if self.folder.exists():
                set_aside(self.folder, OLD)
            if not self._list():
                return None
            target = free_name(f"{self.path}{OLD}", lambda path: bool(self._list(path)))
            self._move(self.path, target)
        return join_uri(parent_and_name(self.location)[0], quote(target.rpartition("/")[2]))

    @contextmanager
    def in_use(self, log: Callable[[str], None] = print) -> Iterator[None]:
        with locked(self.folder):
            # Epochs never decrease, even if the lease was deleted.
            min_epoch = max((_parts(stored)[1] for stored in _stored_folders(self._list())), default=0)
            with leased(self.filesystem, self.path, log, min_epoch) as self._lease:
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
        """Download the records, unless the local ones continue them.

        Only the owner of the run uploads records. Local ones without the last stored event are therefore those of an earlier
        owner. Local records of another run with the same name are renamed first: those that begin with another event than
        the stored ones, or, if the storage has none, any.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        stored = [name for name in DRIVER_FILES if name in self._list()]
        with TemporaryDirectory(dir=self.folder, prefix="fetch-") as scratch:
            for name in stored:
                self._download(name, Path(scratch, name))
            record, local_record = Path(scratch, METRICS), self.folder / METRICS
            is_other_run = not is_same_run(record, local_record)
            if is_other_run or not stored:
                for file in filter(Path.exists, (self.folder / name for name in (*DRIVER_FILES, TENSORBOARD))):
                    set_aside(file, OLD)
            if is_other_run or not continues(local_record, record):
                for name in stored:
                    Path(scratch, name).replace(self.folder / name)

    def send_records(self) -> None:
        try:
            self.check_owner()
        except SavantError as superseded:  # the stored records are those of the new owner
            raise OSError("another process trains this run") from superseded
        for file in filter(Path.exists, (self.folder / name for name in DRIVER_FILES)):
            self._upload(file, f"{self.path}/{file.name}")

    def _upload_checkpoint(self, folder: Path) -> None:
        """Upload a checkpoint into a folder that is not complete yet, then delete the folders that it replaces."""
        self.check_owner()
        complete = _with_manifest(self._list())
        self._delete_other_folders(keep=complete)
        epoch = 0 if self.owner is None else self.owner.epoch
        name_and_epoch = (folder.name, epoch)
        numbers = [_parts(stored)[2] for stored in complete if _parts(stored)[:2] == name_and_epoch]
        target = folder.name + (f".{epoch}" if epoch else "") + (f"-{max(numbers) + 1}" if numbers else "")
        for file in sorted(folder.iterdir(), key=_upload_order):
            if file.name == MANIFEST:
                self.check_owner()
            self._upload(file, f"{self.path}/{target}/{file.name}")
        for stored in self._deletable(complete):
            if _parts(stored)[0] == folder.name:
                with suppress(OSError):  # a remaining folder is deleted together with the checkpoint
                    self._delete_stored(stored)

    def _delete_other_mirrored(self, newest: Path) -> None:
        """Delete the mirror's other checkpoints, including those that could not be uploaded."""
        for folder in [*step_folders(self.folder), *self.folder.glob(f"step_*{UNSENT}")]:
            if folder != newest:
                shutil.rmtree(folder, ignore_errors=True)

    def _delete_other_folders(self, keep: set[str]) -> None:
        """Delete the stored folders, except `keep`, that an interrupted upload or deletion left behind."""
        for stored in self._deletable(_stored_folders(self._list()) - keep):
            self._delete_stored(stored)

    def _delete_stored(self, stored: str) -> None:
        """Delete a stored folder, its manifest first, so that an interrupted deletion leaves no valid checkpoint."""
        with suppress(FileNotFoundError):  # it is incomplete, or Ray deleted it first
            self.filesystem.delete_file(f"{self.path}/{stored}/{MANIFEST}")
        with suppress(FileNotFoundError):
            self.filesystem.delete_dir(f"{self.path}/{stored}")

    def _deletable(self, folders: Iterable[str]) -> list[str]:
        """Return the stored folders that belong to this owner's epoch or an earlier one."""
        epoch = 0 if self.owner is None else self.owner.epoch
        return [folder for folder in folders if _parts(folder)[1] <= epoch]

    def _stored_name(self, name: str) -> str:
        """Return the current folder of checkpoint `name` (see the module's docstring), or an incomplete one if it has none.

        A name without a folder, such as that of a file, is returned unchanged.
        """
        files = self._list()
        complete = _with_manifest(files)
        candidates = [stored for stored in _with_manifest_or_weights(files) if _parts(stored)[0] == name]
        return max(candidates, key=lambda stored: (stored in complete, *_parts(stored)[1:]), default=name)

    def _list(self, path: str | None = None) -> list[str]:
        """Return all files below the run (or `path`) as paths relative to it, except hidden files of the run itself."""
        top = self.path if path is None else path
        infos = self.filesystem.get_file_info(pafs.FileSelector(top, recursive=True, allow_not_found=True))
        names = (info.path[len(top) + 1 :] for info in infos if info.type == pafs.FileType.File)
        return [name for name in names if not name.startswith(".")]

    def _is_mirrored(self, name: str, stored: str) -> bool:
        """Return whether the mirror has an intact copy of the stored checkpoint."""
        try:
            verify(self.folder / name)
            manifest = (self.folder / name / MANIFEST).read_bytes()
            with self.filesystem.open_input_stream(f"{self.path}/{stored}/{MANIFEST}") as stream:
                return bool(stream.read() == manifest)
        except (CheckpointError, OSError):
            return False

    def _download(self, name: str, target: Path) -> None:
        if _STORED.fullmatch(name):
            target.mkdir()  # `copy_files` copies the files of a folder, not the folder
        pafs.copy_files(f"{self.path}/{name}", str(target), source_filesystem=self.filesystem, chunk_size=CHUNK_BYTES)

    def _upload(self, file: Path, target: str) -> None:
        # Not `pyarrow.fs.copy_files`: it does not raise an error if a part of the upload is refused (pyarrow 26.0.1).
        # By default the stream would compress files whose names end in .gz once more.
        with file.open("rb") as source, self.filesystem.open_output_stream(target, compression=None) as stream:
            shutil.copyfileobj(source, stream, CHUNK_BYTES)

    def _move(self, source: str, target: str) -> None:
        """Move all files by copying and then deleting them; if this is interrupted, source or target is complete."""
        names = sorted(self._list(source), key=_is_manifest)
        for name in names:
            self.filesystem.copy_file(f"{source}/{name}", f"{target}/{name}")
        self.check_owner()
        for name in reversed(names):
            self.filesystem.delete_file(f"{source}/{name}")
        emptied = [source]
        if source == self.path:  # the run's folder remains, because it contains the lease
            emptied = [f"{source}/{folder}" for folder in {name.partition("/")[0] for name in names if "/" in name}]
        for folder in emptied:
            with suppress(OSError):  # some storages keep a marker of an empty folder
                self.filesystem.delete_dir(folder)


def step_name(stored: str) -> str | None:
    """Return the checkpoint `step_500` of a stored folder (`step_500`, `step_500.1`, …); None for any other name."""
    return _parts(stored)[0] or None


def _in_step_order(folders: Iterable[str]) -> list[str]:
    """Return the checkpoints that are stored in these folders, oldest first."""
    return in_step_order({_parts(folder)[0] for folder in folders})


def _stored_folders(files: Iterable[str]) -> set[str]:
    """Return all stored folders of checkpoints, complete or not."""
    folders = {path.partition("/")[0] for path in files if "/" in path}
    return {folder for folder in folders if _STORED.fullmatch(folder)}


def _with_manifest_or_weights(files: Iterable[str]) -> set[str]:
    """Return the stored folders that have a manifest or weights."""
    files = list(files)
    return _with_manifest(files) | {path.rpartition("/")[0] for path in files if _is_weights(path)}


def _with_manifest(files: Iterable[str]) -> set[str]:
    """Return the stored folders that have a manifest, and thus are complete."""
    folders = {path.rpartition("/")[0] for path in files if _is_manifest(path)}
    return {folder for folder in folders if _STORED.fullmatch(folder)}


def _parts(stored: str) -> tuple[str, int, int]:
    """Return checkpoint, epoch and number of a stored folder: `step_500`, 1, 2 for `step_500.1-2`.

    The checkpoint is "" if the name is not that of a stored folder.
    """
    match = _STORED.fullmatch(stored)
    return (match[1], int(match[2] or 0), int(match[3] or 1)) if match else ("", 0, 1)


def _is_manifest(path: str) -> bool:
    return path.rpartition("/")[2] == MANIFEST


def _is_weights(path: str) -> bool:
    """Return whether a path is the `step_N.pt` of a stored folder."""
    folder, _, file = path.rpartition("/")
    name = _parts(folder)[0]
    return bool(name) and file == f"{name}.pt"


def _upload_order(file: Path) -> tuple[bool, bool]:
    """Return a sort key: the manifest last, the weights before it.

    A folder without weights and manifest is therefore an interrupted upload, which `remove_unfinished` deletes.
    """
    return file.name == MANIFEST, file.suffix == ".pt"
