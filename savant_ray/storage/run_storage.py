"""Selects the storage of a run, and provides checkpoints that are named by a path or URI as local folders.

Such a path or URI may also name a file of the original: a checkpoint `step_N.pt` of the training script that savant_ray
reimplements as a Ray Train job (see `savant_ray/original`).
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

from savant_ray.config import Config
from savant_ray.errors import CheckpointError, SavantError, SettingsError
from savant_ray.locations import (
    checkpoint_path,
    error_text,
    is_uri,
    join_uri,
    parent_and_name,
    runs_below_home,
    split_query,
)
from savant_ray.original.conversion import converted, find_original, no_intact_file_message
from savant_ray.original.file import newest_intact
from savant_ray.original.names import is_original_name, original_names
from savant_ray.storage.lease import Owner
from savant_ray.storage.local import LocalStorage
from savant_ray.storage.object_store import ObjectStorage, step_name
from savant_ray.storage.protocol import RunStorage, newest_checkpoint_name
from savant_ray.training.checkpoint import MANIFEST, find_checkpoint

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run_storage(config: Config, owner: Owner | None = None) -> RunStorage:
    """Return the storage of the run with these settings; workers pass the fencing token of their driver.

    The mirror of a run in `s3://bucket/runs` is the folder `~/savant_runs/s3/bucket/runs/<run.name>`.

    Raises:
        SettingsError: `run.storage_path` is not the URI of a storage that pyarrow supports; or it is a URI, and the user has
            no home folder for the mirror.
    """
    storage: RunStorage
    parent, name = config.run.storage_path, config.run.name
    try:
        if is_uri(parent):
            scheme, _, path = split_query(parent)[0].partition("://")
            mirror = runs_below_home() / scheme / path.strip("/") / name
            storage = ObjectStorage(join_uri(parent, quote(name)), mirror, owner)
        else:
            storage = LocalStorage(Path(parent, name), owner)
    except SettingsError as error:
        raise SettingsError(f"run.storage_path: {error}") from error
    if config.training.last_stable_step:  # not None, and not 0
        storage.permanent = f"step_{config.training.last_stable_step}"
    return storage


@contextmanager
def storage_errors_explained(storage: RunStorage) -> Iterator[None]:
    """Convert errors of object storage (no network, no such bucket, access denied) into a `SavantError`.

    If the disk of this machine is full, the message names the mirror instead of the storage.
    """
    try:
        yield
    except Exception as error:
        # A file system that is written in Python (hf://) may raise errors of any type.
        is_python_file_system = storage.filesystem is not None and storage.filesystem.type_name.startswith("py::")
        if (
            isinstance(error, SavantError)
            or storage.filesystem is None
            or not (isinstance(error, OSError) or is_python_file_system)
        ):
            raise
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise SavantError(f"{storage.folder}, the copy of {storage.location} on this machine: {error}") from error
        raise SavantError(f"run.storage_path: {storage.location} cannot be read or written: {error}") from error


def check_checkpoint_exists(checkpoint: str) -> None:
    """Check that a path or URI is a checkpoint or file of the original, or a run with one; nothing is downloaded.

    Raises:
        CheckpointError: there is none, or its storage cannot be read.
        SettingsError: it is not the URI of a storage that pyarrow supports.
    """
    if is_uri(checkpoint):
        _find_stored(checkpoint, mirror=Path())
    elif find_original(path := Path(checkpoint)) is None:
        find_checkpoint(path)


@contextmanager
def local_checkpoint(
    checkpoint: str,
    files: Sequence[str] = (),
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    with_record: bool = False,
) -> Iterator[Path]:
    """Yield the local path of a savant_ray checkpoint; a URI is downloaded, and a file of the original is converted.

    `settings` (by section, as in YAML) are those that a file of the original does not contain. Defaults that are used for
    missing ones are printed to stderr. `with_record` is that of `fetched`.

    Raises:
        CheckpointError: there is no checkpoint, it cannot be fetched, or the file's weights are not those of the original's
            model.
        SettingsError: it is not the URI of a storage that pyarrow supports; the settings contradict the file, or name no
            tokenizer; or settings are given for a savant_ray checkpoint.
        DataError: the tokenizer that the settings name cannot be read.
    """
    with fetched(checkpoint, files, with_record=with_record) as path:
        original = find_original(path, print_note)
        if original is not None:
            with converted(original, settings or {}, print_note) as folder:
                yield folder
            return
        if settings:
            find_checkpoint(path)  # if there is no checkpoint, its error is more helpful
            names = ", ".join(f"{section}.{name}" for section, values in settings.items() for name in values)
            raise SettingsError(
                f"{names}: given for {checkpoint}, which has settings of its own; only a file of the original needs them"
            )
        yield path


@contextmanager
def initial_checkpoint(config: Config, files: Sequence[str] = (), allow_changes: bool = False) -> Iterator[Path]:
    """Yield the local path of `run.init_from` as a savant_ray checkpoint, as `local_checkpoint` does.

    A file of the original is compared with the settings of the run unless changes are allowed; see `converted`.

    Raises:
        CheckpointError: there is no checkpoint, it cannot be fetched, or the file's weights are not those of the original's
            model.
        SettingsError: `run.init_from` is not set; or the settings contradict the file, or name no tokenizer.
        DataError: the tokenizer that the settings name cannot be read.
    """
    if config.run.init_from is None:
        raise SettingsError("run.init_from: is not set")
    with fetched(config.run.init_from, files) as path:
        original = find_original(path)
        if original is None:
            yield path
            return
        with ExitStack() as stack:
            try:
                folder = stack.enter_context(converted(original, config.to_dict(), print_note, allow_changes))
            except SavantError as error:
                raise type(error)(f"run.init_from: {error}") from error
            yield folder


@contextmanager
def fetched(
    checkpoint: str, files: Sequence[str] = (), with_original: bool = False, with_record: bool = False
) -> Iterator[Path]:
    """Yield the local path of a checkpoint or run; a URI is downloaded into a temporary folder within the `with` block.

    The URI of a run stands for its newest checkpoint or, if it has none, the newest intact file of the original. If
    `files` is not empty, only these files of a checkpoint are downloaded, for callers that need no weights. With
    `with_original`, the run's newest intact file of the original, if any, is downloaded into the same parent
    folder, where `export_original` looks for it; with `with_record`, the record of the run.

    Raises:
        CheckpointError: there is no checkpoint, or it cannot be fetched.
        SettingsError: it is not the URI of a storage that pyarrow supports.
    """
    if not is_uri(checkpoint):
        yield checkpoint_path(checkpoint)
        return
    with TemporaryDirectory(prefix="savant-") as scratch:
        storage, names = _find_stored(checkpoint, mirror=Path(scratch))
        path: Path | None
        try:
            if is_original_name(names[0]):
                path = newest_intact(map(storage.fetch, names), print_note)
            else:
                path = storage.fetch_files(names[0], files) if files else storage.fetch(names[0])
                if with_record:
                    storage.fetch_records()
                if with_original:
                    newest_intact(map(storage.fetch, reversed(original_names(storage.file_names()))), print_note)
        except SavantError:
            raise
        except Exception as error:  # OSError, or any error of a file system that is written in Python (hf://)
            raise CheckpointError(f"{checkpoint}: cannot be fetched ({error_text(error)})") from error
        if path is None:
            raise CheckpointError(no_intact_file_message(checkpoint))
        yield path


def print_note(text: str) -> None:
    """Print a note for the user to stderr, beside the output of a command."""
    print(f"note: {text}", file=sys.stderr)


def _find_stored(uri: str, mirror: Path) -> tuple[ObjectStorage, list[str]]:
    """Return the storage of the run that a URI belongs to, and the names of the candidates that the URI stands for.

    The candidates are one checkpoint, or files of the original, newest first.

    Raises:
        CheckpointError: neither exists, or the storage cannot be read.
        SettingsError: it is not the URI of a storage that pyarrow supports.
    """
    parent, name = parent_and_name(uri)
    requested = step_name(name) or (name if is_original_name(name) else None)
    storage = ObjectStorage(parent if requested else uri, mirror)
    try:
        if requested:
            existing = storage.file_names() if is_original_name(name) else storage.checkpoints()
            names = [requested] if requested in existing else []
        else:
            newest = newest_checkpoint_name(storage)
            names = [newest] if newest else original_names(storage.file_names())[::-1]
    except SavantError:
        raise
    except Exception as error:  # as in `fetched`
        raise CheckpointError(f"{uri}: cannot be read ({error_text(error)})") from error
    if not names:
        raise CheckpointError(f"{uri}: no checkpoint there (looked for {MANIFEST} and step_*/{MANIFEST})")
    return storage, names
