"""The file system through which Ray Train accesses a run; errors of Ray's own bookkeeping do not end the run.

After each reported checkpoint, the checkpoint manager in Ray's controller writes a list of checkpoints (`SNAPSHOT`) and
deletes those beyond `checkpoint.keep`, except `RunStorage.permanent`. If the storage fails at that moment (full, read-only,
unreachable), Ray 2.60 ends the run, although all checkpoints are intact. This file system ignores a failure to write the
list, because `ray_snapshot.py` rebuilds it at the next start. A deletion that fails is retried when Ray deletes the next
checkpoint. Workers write checkpoints without this file system, so errors of saving are still reported. In a run that
another process has taken over, no list is written and no checkpoint is deleted.
"""

from __future__ import annotations

import io
from contextlib import suppress
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from savant_ray.errors import SavantError
from savant_ray.storage.protocol import RunStorage
from savant_ray.storage.ray_snapshot import SNAPSHOT
from savant_ray.training.checkpoint import is_step_name


def tolerant_file_system(filesystem: pafs.FileSystem | None, storage: RunStorage | None = None) -> pafs.FileSystem:
    """Wrap `filesystem` (None: the machine's own) in a `TolerantFileSystem`; the result can be pickled.

    With `storage`, checkpoints are deleted by `RunStorage.delete`, because their names in `filesystem` may differ.
    """
    return pafs.PyFileSystem(TolerantFileSystem(pafs.LocalFileSystem() if filesystem is None else filesystem, storage))


# Deletions that have failed. A variable of the module, because Ray unpickles a new handler for each checkpoint.
_pending_deletions: list[tuple[TolerantFileSystem, str]] = []


class TolerantFileSystem(pafs.FileSystemHandler):  # type: ignore[misc]  # noqa: PLW1641 - pyarrow has no types; not hashed
    """Handler for `pyarrow.fs.PyFileSystem`. Operations without a docstring are passed on to the wrapped file system."""

    def __init__(self, filesystem: pafs.FileSystem, storage: RunStorage | None) -> None:
        self._filesystem, self._storage = filesystem, storage

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TolerantFileSystem) and self._filesystem == other._filesystem

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __reduce__(self) -> tuple[Any, ...]:
        return TolerantFileSystem, (self._filesystem, self._storage)

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        """Return file infos; a checkpoint is always reported as an existing directory.

        Ray requests them before it deletes a checkpoint, and fails if the checkpoint is missing or the storage unreachable.
        """
        return [
            pafs.FileInfo(path, pafs.FileType.Directory)
            if is_step_name(path.rpartition("/")[2])
            else self._filesystem.get_file_info(path)
            for path in paths
        ]

    def open_output_stream(self, path: str, metadata: dict[str, str] | None) -> pa.NativeFile:
        """Open a file; Ray's list of checkpoints is buffered and written on close, where errors are ignored."""
        if path.endswith(f"/{SNAPSHOT}"):
            return pa.PythonFile(_BufferedSnapshot(self._filesystem, path, self._storage), mode="w")
        return self._filesystem.open_output_stream(path, metadata=metadata)

    def get_type_name(self) -> str:
        return f"tolerant+{self._filesystem.type_name}"

    def normalize_path(self, path: str) -> str:
        return str(self._filesystem.normalize_path(path))

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        return list(self._filesystem.get_file_info(selector))

    def create_dir(self, path: str, recursive: bool) -> None:
        self._filesystem.create_dir(path, recursive=recursive)

    def delete_dir(self, path: str) -> None:
        """Delete a directory and retry earlier deletions that failed; raises no OSError."""
        _pending_deletions.append((self, path))
        for pending in _pending_deletions.copy():
            handler, pending_path = pending
            with suppress(OSError):
                with suppress(FileNotFoundError, SavantError):  # deleted already, or another process owns the run
                    handler._delete(pending_path)
                _pending_deletions.remove(pending)

    def _delete(self, path: str) -> None:
        name = path.rpartition("/")[2]
        if self._storage is not None and is_step_name(name):
            if name != self._storage.permanent:
                self._storage.delete(name)
        else:
            self._filesystem.delete_dir(path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self._filesystem.delete_dir_contents(path, missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self) -> None:
        """Raise NotImplementedError: a run never deletes its whole storage."""
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


class _BufferedSnapshot(io.BytesIO):
    """Ray's list of checkpoints, kept in memory until it is closed."""

    def __init__(self, filesystem: pafs.FileSystem, path: str, storage: RunStorage | None) -> None:
        super().__init__()
        self._filesystem, self._path, self._storage = filesystem, path, storage

    def close(self) -> None:
        """Write the list, unless the storage fails or another process owns the run."""
        if self.closed:
            return
        content = self.getvalue()
        super().close()
        with suppress(OSError, SavantError):
            if self._storage is not None:
                self._storage.check_owner()
            with self._filesystem.open_output_stream(self._path) as file:
                file.write(content)
