"""The file system that Ray Train is given: what Ray writes there for itself must not end a run.

With each checkpoint Ray's controller writes a list of them and deletes those that are too many; a storage that refuses
just then (full, read-only, not reached) ends the whole run, although every checkpoint is whole and the list is made anew
at each launch (`snapshot.py`). Here the list is given up and the old checkpoint stays until another one is saved. Whoever
writes a checkpoint is told by the storage itself (`saving.py`). A run that another process has taken over is left alone.
"""

from __future__ import annotations

import io
from contextlib import suppress
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from savant_ray.errors import SavantError
from savant_ray.storage.local import Disk
from savant_ray.storage.ray_snapshot import SNAPSHOT
from savant_ray.training.checkpoint import is_step_name


def forgiving(filesystem: pafs.FileSystem | None, storage: Disk | None = None) -> pafs.FileSystem:
    """The file system, or this machine's own, as Ray should see it; it can be sent to other processes.

    With `storage` checkpoints are deleted by it, under the names that they have there.
    """
    return pafs.PyFileSystem(_Forgiving(pafs.LocalFileSystem() if filesystem is None else filesystem, storage))


# Of this process: each checkpoint has a file system object of its own.
_undeleted: list[tuple[_Forgiving, str]] = []


class _Forgiving(pafs.FileSystemHandler):  # type: ignore[misc]  # noqa: PLW1641 - pyarrow has no types; in no set
    """All else is the file system's own."""

    def __init__(self, filesystem: pafs.FileSystem, storage: Disk | None) -> None:
        self._filesystem, self._storage = filesystem, storage

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Forgiving) and self._filesystem == other._filesystem

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __reduce__(self) -> tuple[Any, ...]:
        return _Forgiving, (self._filesystem, self._storage)

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        """Ray asks this of a checkpoint when it is about to delete it, and fails if it is gone or nobody answers."""
        return [
            pafs.FileInfo(path, pafs.FileType.Directory)
            if is_step_name(path.rpartition("/")[2])
            else self._filesystem.get_file_info(path)
            for path in paths
        ]

    def open_output_stream(self, path: str, metadata: dict[str, str] | None) -> pa.NativeFile:
        """Ray's list is kept until it is closed, then written if that can be done."""
        if path.endswith(f"/{SNAPSHOT}"):
            return pa.PythonFile(_WrittenAtTheEnd(self._filesystem, path, self._storage), mode="w")
        return self._filesystem.open_output_stream(path, metadata=metadata)

    def get_type_name(self) -> str:
        return f"forgiving+{self._filesystem.type_name}"

    def normalize_path(self, path: str) -> str:
        return str(self._filesystem.normalize_path(path))

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        return list(self._filesystem.get_file_info(selector))

    def create_dir(self, path: str, recursive: bool) -> None:
        self._filesystem.create_dir(path, recursive=recursive)

    def delete_dir(self, path: str) -> None:
        """Also tries again what could not be deleted before."""
        _undeleted.append((self, path))
        for entry in _undeleted.copy():
            handler, each = entry
            with suppress(OSError):
                with suppress(FileNotFoundError, SavantError):  # gone already, or no longer this run's to delete
                    handler._delete(each)
                _undeleted.remove(entry)

    def _delete(self, path: str) -> None:
        name = path.rpartition("/")[2]
        if self._storage is not None and is_step_name(name):
            self._storage.delete(name)
        else:
            self._filesystem.delete_dir(path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self._filesystem.delete_dir_contents(path, missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError

    def delete_file(self, path: str) -> None:
        self._filesystem.delete_file(path)

    def move(self, source: str, target: str) -> None:
        self._filesystem.move(source, target)

    def copy_file(self, source: str, target: str) -> None:
        self._filesystem.copy_file(source, target)

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return self._filesystem.open_input_stream(path)

    def open_input_file(self, path: str) -> pa.NativeFile:
        return self._filesystem.open_input_file(path)

    def open_append_stream(self, path: str, metadata: dict[str, str] | None) -> pa.NativeFile:
        return self._filesystem.open_append_stream(path, metadata=metadata)


class _WrittenAtTheEnd(io.BytesIO):
    def __init__(self, filesystem: pafs.FileSystem, path: str, storage: Disk | None) -> None:
        super().__init__()
        self._filesystem, self._path, self._storage = filesystem, path, storage

    def close(self) -> None:
        """Writes what was collected; a list that cannot be written is made anew when the run is started again."""
        if self.closed:
            return
        content = self.getvalue()
        super().close()
        with suppress(OSError, SavantError):
            if self._storage is not None:
                self._storage.check_owner()
            with self._filesystem.open_output_stream(self._path) as file:
                file.write(content)
