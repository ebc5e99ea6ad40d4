"""A run in object storage (`s3://…`, whatever `pyarrow.fs` knows), which has no rename, no append and no lock.

The run folder is a mirror on this machine: a checkpoint is written into it as on a disk and then sent, its manifest
last; the driver's own files go along. What the storage holds is what counts, and a mirror may be thrown away.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote

import pyarrow as pa
import pyarrow.fs as pafs

from savant_ray.cluster.disk import DAMAGED, Disk
from savant_ray.cluster.lease import Lease, leased
from savant_ray.cluster.lock import free_name, locked, set_aside
from savant_ray.cluster.paths import joined, parent_and_name
from savant_ray.errors import CheckpointError, SavantError, SettingsError
from savant_ray.reporting.record import METRICS, SAMPLES, last_time
from savant_ray.reporting.run_report import LOG
from savant_ray.training.checkpoint import CONFIG, MANIFEST, is_step_name, step_folders, step_of, verify
from savant_ray.training.original import is_original_name

RECORDS = (METRICS, SAMPLES, LOG, CONFIG)
CHUNK_BYTES = 64 << 20
UNSENT = ".unsent"


class ObjectStorage(Disk):
    """A run in object storage, and its mirror on this machine.

    Raises:
        SettingsError: no URI of a storage that pyarrow knows.
    """

    filesystem: pafs.FileSystem
    _lease: Lease | None = None

    def __init__(self, uri: str, folder: Path) -> None:
        self.folder, self.location = folder, uri
        try:
            self.filesystem, self.path = pafs.FileSystem.from_uri(uri)
        except (pa.ArrowInvalid, OSError) as error:
            raise SettingsError(f"{uri}: no storage that could be used ({error})") from error

    def locate(self, name: str) -> str:
        return joined(self.location, name)

    def steps(self) -> list[str]:
        return _steps(path for path in self._files() if _is_manifest(path) or _is_weights(path))

    def complete_steps(self) -> list[str]:
        return _steps(filter(_is_manifest, self._files()))

    def fetch(self, name: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / name
        if not self._is_mirrored(name):
            with TemporaryDirectory(dir=self.folder, prefix="fetch-") as scratch:
                self._download(name, Path(scratch, name))
                _remove(target)
                Path(scratch, name).rename(target)
        return target

    def fetch_originals(self) -> None:
        for name in filter(is_original_name, self._files()):
            self.fetch(name)

    def remove_unfinished(self) -> None:
        self._remove_begun(keep=set(self.steps()))
        for left in [*self.folder.glob("fetch-*"), *self.folder.glob("step_*.tmp")]:
            shutil.rmtree(left)
        for stale in {folder.name for folder in step_folders(self.folder)} - set(self.complete_steps()):
            shutil.rmtree(self.folder / stale)

    def set_aside(self, name: str) -> str:
        shutil.rmtree(self.folder / name)
        names = {path.partition("/")[0] for path in self._files()}
        target = free_name(name + DAMAGED, names.__contains__)
        self._move(f"{self.path}/{name}", f"{self.path}/{target}")
        return target

    def has_damaged(self) -> bool:
        return any(path.startswith("step_") and DAMAGED in path for path in self._files())

    def keep(self, folder: Path) -> str:
        target = f"{self.path}/{folder.name}"
        try:
            if folder.name in self.complete_steps():  # first of all it is no longer complete
                self.filesystem.delete_file(f"{target}/{MANIFEST}")
            self._remove_begun(keep=set(self.complete_steps()))
            for file in sorted(folder.iterdir(), key=_in_order_of_sending):
                self._upload(file, f"{target}/{file.name}")
        except OSError as error:
            unsent = folder.with_name(folder.name + UNSENT)
            _remove(unsent)
            folder.rename(unsent)
            self._mirror_only(unsent)
            raise OSError(f"{error}. It lies whole in {unsent} of this node") from error
        self._mirror_only(folder)
        return target

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
        return joined(parent_and_name(self.location)[0], quote(target.rpartition("/")[2]))

    @contextmanager
    def in_use(self, say: Callable[[str], None] = print) -> Iterator[None]:
        with locked(self.folder), leased(self.filesystem, self.path, say) as self._lease:
            yield

    def refuse_if_lost(self) -> None:
        if self._lease is not None:
            self._lease.refuse_if_lost()

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
            self.refuse_if_lost()
        except SavantError as lost:  # what lies there is the other one's
            raise OSError("another process trains this run") from lost
        for file in filter(Path.exists, (self.folder / name for name in RECORDS)):
            self._upload(file, f"{self.path}/{file.name}")

    def _mirror_only(self, newest: Path) -> None:
        """Drops the mirror's other checkpoints, those that could not be sent too."""
        for folder in [*step_folders(self.folder), *self.folder.glob(f"step_*{UNSENT}")]:
            if folder != newest:
                shutil.rmtree(folder)

    def _remove_begun(self, keep: set[str]) -> None:
        """Other folders of checkpoints: what an interrupted sending or deleting left."""
        begun = {path.partition("/")[0] for path in self._files() if "/" in path}
        for name in set(filter(is_step_name, begun)) - keep:
            with suppress(FileNotFoundError):  # Ray was deleting it and is through
                self.filesystem.delete_dir(f"{self.path}/{name}")

    def _files(self, path: str | None = None) -> list[str]:
        """What lies there, relative to the run (or to `path`), without hidden files."""
        top = self.path if path is None else path
        infos = self.filesystem.get_file_info(pafs.FileSelector(top, recursive=True, allow_not_found=True))
        names = (info.path[len(top) + 1 :] for info in infos if info.type == pafs.FileType.File)
        return [name for name in names if not name.startswith(".")]

    def _is_mirrored(self, name: str) -> bool:
        """Whether this machine has the checkpoint as it is there, and whole."""
        try:
            verify(self.folder / name)
            here = (self.folder / name / MANIFEST).read_bytes()
            with self.filesystem.open_input_stream(f"{self.path}/{name}/{MANIFEST}") as there:
                return bool(there.read() == here)
        except (CheckpointError, OSError):
            return False

    def _download(self, name: str, target: Path) -> None:
        if is_step_name(name):
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
        for name in reversed(names):
            self.filesystem.delete_file(f"{source}/{name}")
        with suppress(OSError):  # what some storages keep in the place of an empty folder
            self.filesystem.delete_dir(source)


def _steps(paths: Iterable[str]) -> list[str]:
    """The checkpoints that the files belong to, oldest first."""
    names = {path.rpartition("/")[0] for path in paths}
    return sorted(filter(is_step_name, names), key=lambda name: step_of(Path(name)))


def _is_manifest(path: str) -> bool:
    return path.rpartition("/")[2] == MANIFEST


def _is_weights(path: str) -> bool:
    """Whether it is `step_N/step_N.pt`."""
    folder, _, file = path.rpartition("/")
    return file == f"{folder}.pt"


def _in_order_of_sending(file: Path) -> tuple[bool, bool]:
    """The manifest last, the weights before it: without them there is nothing that one would want back."""
    return file.name == MANIFEST, file.suffix == ".pt"


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
