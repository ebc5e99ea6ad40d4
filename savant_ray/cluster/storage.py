"""Where the run of some settings is kept, and a checkpoint wherever it is."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote

from savant_ray.cluster.disk import Disk
from savant_ray.cluster.lease import Owner
from savant_ray.cluster.object_storage import ObjectStorage, step_name
from savant_ray.cluster.paths import joined, parent_and_name, run_folder
from savant_ray.config import Config
from savant_ray.errors import CheckpointError, SavantError, SettingsError
from savant_ray.locations import checkpoint_path, is_uri, why
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
        uri = joined(config.run.storage_path, quote(config.run.name))
        return ObjectStorage(uri, run_folder(config), owner)
    except SettingsError as error:
        raise SettingsError(f"run.storage_path: {error}") from error


def refuse_missing(checkpoint: str) -> None:
    """Looks whether a path or URI names a checkpoint or a run with one; of a URI only the names are listed.

    Raises:
        CheckpointError: there is none, or its storage cannot be read.
        SettingsError: no URI of a storage that pyarrow knows.
    """
    if is_uri(checkpoint):
        _stored(checkpoint, Path())
    else:
        find_checkpoint(Path(checkpoint))


@contextmanager
def on_this_machine(checkpoint: str, files: Sequence[str] = ()) -> Iterator[Path]:
    """A path as it is; of a URI of a run or a `step_N` a copy of the (newest) checkpoint, for the time of a `with` block.

    With `files` only these are copied, for what needs no weights.

    Raises:
        CheckpointError: there is none, or it cannot be fetched.
        SettingsError: no URI of a storage that pyarrow knows.
    """
    if not is_uri(checkpoint):
        yield checkpoint_path(checkpoint)
        return
    with TemporaryDirectory(prefix="savant-") as scratch:
        storage, name = _stored(checkpoint, Path(scratch))
        try:
            folder = storage.fetch_files(name, files) if files else storage.fetch(name)
        except SavantError:
            raise
        except Exception as error:  # OSError, or anything of a file system that is written in Python (hf://)
            raise CheckpointError(f"{checkpoint}: cannot be fetched ({why(error)})") from error
        yield folder


def _stored(uri: str, folder: Path) -> tuple[ObjectStorage, str]:
    """The storage of the run, with its mirror in `folder`, and the name of the checkpoint that is meant."""
    parent, name = parent_and_name(uri)
    asked = step_name(name)
    storage = ObjectStorage(parent if asked else uri, folder)
    try:
        complete = storage.complete_steps()
    except SavantError:
        raise
    except Exception as error:  # as in `on_this_machine`
        raise CheckpointError(f"{uri}: cannot be read ({why(error)})") from error
    if not complete or asked not in (None, *complete):
        raise CheckpointError(f"{uri}: no checkpoint there (looked for {MANIFEST} and step_*/{MANIFEST})")
    return storage, asked or complete[-1]


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
