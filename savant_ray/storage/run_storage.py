"""Where the run of some settings is kept, and a checkpoint wherever it is."""

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
from savant_ray.locations import checkpoint_path, is_uri, join_uri, parent_and_name, why
from savant_ray.original.conversion import converted, find_original
from savant_ray.original.file import newest_whole
from savant_ray.original.names import is_original_name, original_step
from savant_ray.storage.lease import Owner
from savant_ray.storage.local import Disk
from savant_ray.storage.object_store import ObjectStorage, step_name
from savant_ray.storage.paths import run_folder
from savant_ray.training.checkpoint import MANIFEST, find_checkpoint

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run_storage(config: Config, owner: Owner | None = None) -> Disk:
    """Where the run of these settings is kept; for a worker with the fencing token of its driver.

    Raises:
        SettingsError: `run.storage_path` is no URI of a storage that pyarrow knows.
    """
    if not is_uri(config.run.storage_path):
        return Disk(run_folder(config), owner)
    try:
        uri = join_uri(config.run.storage_path, quote(config.run.name))
        return ObjectStorage(uri, run_folder(config), owner)
    except SettingsError as error:
        raise SettingsError(f"run.storage_path: {error}") from error


def refuse_missing(checkpoint: str) -> None:
    """Looks whether a path or URI names a checkpoint, a run with one or a file of the original; a URI is only listed.

    Raises:
        CheckpointError: there is none, or its storage cannot be read.
        SettingsError: no URI of a storage that pyarrow knows.
    """
    if is_uri(checkpoint):
        _stored(checkpoint, Path())
    elif find_original(path := Path(checkpoint)) is None:
        find_checkpoint(path)


@contextmanager
def on_this_machine(
    checkpoint: str, files: Sequence[str] = (), settings: Mapping[str, Mapping[str, Any]] | None = None
) -> Iterator[Path]:
    """Yield the path of a checkpoint of ours: what `fetched` yields, or what a file of the original is converted into.

    `settings` (by section, as in YAML) are those that a user gave for a file of the original; what had to be assumed
    beside them is printed to stderr.

    Raises:
        CheckpointError: there is none, it cannot be fetched, or is no file of the original's model.
        SettingsError: no URI of a storage that pyarrow knows; the settings contradict the file, or name no tokenizer; or
            settings are given for a checkpoint of ours.
    """
    with fetched(checkpoint, files) as path:
        original = find_original(path, print_note)
        if original is not None:
            with converted(original, settings or {}, print_note) as folder:
                yield folder
            return
        if settings:
            names = ", ".join(f"{section}.{name}" for section, values in settings.items() for name in values)
            raise SettingsError(
                f"{names}: given for {checkpoint}, which has settings of its own; only a file of the original needs them"
            )
        yield path


@contextmanager
def initial_checkpoint(config: Config, files: Sequence[str] = (), allow_changes: bool = False) -> Iterator[Path]:
    """Yield the path of `run.init_from` as a checkpoint of ours, as `on_this_machine` does.

    A file of the original is compared with the settings of the run unless changes are allowed; see `converted`.

    Raises:
        CheckpointError: there is none, it cannot be fetched, or is no file of the original's model.
        SettingsError: `run.init_from` is not set; or the settings contradict the file, or name no tokenizer.
    """
    if config.run.init_from is None:
        raise SettingsError("run.init_from: is not set")
    with fetched(config.run.init_from, files) as path:
        original = find_original(path)
        if original is None:
            yield path
            return
        with ExitStack() as held:
            try:
                folder = held.enter_context(converted(original, config.to_dict(), print_note, allow_changes))
            except SavantError as error:
                raise type(error)(f"run.init_from: {error}") from error
            yield folder


@contextmanager
def fetched(checkpoint: str, files: Sequence[str] = ()) -> Iterator[Path]:
    """Yield a path as it is, of a URI a copy for the time of a `with` block.

    A URI of a run means its newest checkpoint or, if it has none, the newest whole file of the original. With `files`
    only these are copied of a checkpoint, for what needs no weights.

    Raises:
        CheckpointError: there is none, or it cannot be fetched.
        SettingsError: no URI of a storage that pyarrow knows.
    """
    if not is_uri(checkpoint):
        yield checkpoint_path(checkpoint)
        return
    with TemporaryDirectory(prefix="savant-") as scratch:
        storage, names = _stored(checkpoint, Path(scratch))
        try:
            path: Path | None
            if is_original_name(names[0]):
                path = newest_whole(map(storage.fetch, names), print_note)
            else:
                path = storage.fetch_files(names[0], files) if files else storage.fetch(names[0])
        except SavantError:
            raise
        except Exception as error:  # OSError, or anything of a file system that is written in Python (hf://)
            raise CheckpointError(f"{checkpoint}: cannot be fetched ({why(error)})") from error
        if path is None:
            raise CheckpointError(f"{checkpoint}: holds files of the original, but none that is whole")
        yield path


def print_note(text: str) -> None:
    """Print what a user should know beside the output of a command to stderr."""
    print(f"note: {text}", file=sys.stderr)


def _stored(uri: str, folder: Path) -> tuple[ObjectStorage, list[str]]:
    """Return the storage of the run, with its mirror in `folder`, and what is meant there.

    That is the name of a checkpoint, or those of files of the original, the newest first.
    """
    parent, name = parent_and_name(uri)
    asked = step_name(name) or (name if is_original_name(name) else None)
    storage = ObjectStorage(parent if asked else uri, folder)
    try:
        complete, files = storage.complete_steps(), storage.files()
    except SavantError:
        raise
    except Exception as error:  # as in `fetched`
        raise CheckpointError(f"{uri}: cannot be read ({why(error)})") from error
    originals = sorted(filter(is_original_name, files), key=original_step, reverse=True)
    meant = [name for name in (*complete, *originals) if name == asked] if asked else complete[-1:] or originals
    if not meant:
        raise CheckpointError(f"{uri}: no checkpoint there (looked for {MANIFEST} and step_*/{MANIFEST})")
    return storage, meant


@contextmanager
def storage_errors_explained(storage: Disk) -> Iterator[None]:
    """Turns what object storage raises (no network, no such bucket, no right to it) into a `SavantError`.

    A full disk of this machine, where the run has its mirror, is told as such.
    """
    try:
        yield
    except Exception as error:
        is_in_python = storage.filesystem is not None and storage.filesystem.type_name.startswith("py::")  # hf://
        if (
            isinstance(error, SavantError)
            or storage.filesystem is None
            or not (isinstance(error, OSError) or is_in_python)
        ):
            raise
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise SavantError(f"{storage.folder}, the copy of {storage.location} on this machine: {error}") from error
        raise SavantError(f"run.storage_path: {storage.location} cannot be read or written: {error}") from error
