"""Where the run of some settings is kept, and a checkpoint wherever it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote

from savant_ray.cluster.disk import Disk
from savant_ray.cluster.object_storage import ObjectStorage
from savant_ray.cluster.paths import joined, parent_and_name, run_folder
from savant_ray.config import Config
from savant_ray.data.sources import is_uri
from savant_ray.errors import CheckpointError, SavantError, SettingsError
from savant_ray.training.checkpoint import MANIFEST, is_step_name


def run_storage(config: Config) -> Disk:
    """Where the run of these settings is kept.

    Raises:
        SettingsError: `run.storage_path` is no URI of a storage that pyarrow knows.
    """
    if not is_uri(config.run.storage_path):
        return Disk(run_folder(config))
    try:
        return ObjectStorage(joined(config.run.storage_path, quote(config.run.name)), run_folder(config))
    except SettingsError as error:
        raise SettingsError(f"run.storage_path: {error}") from error


@contextmanager
def on_this_machine(checkpoint: str) -> Iterator[Path]:
    """A path as it is; of a URI of a run or a `step_N` a copy of the (newest) checkpoint, for the time of a `with` block.

    Raises:
        CheckpointError: there is none, or it cannot be fetched.
        SettingsError: no URI of a storage that pyarrow knows.
    """
    if not is_uri(checkpoint):
        yield Path(checkpoint)
        return
    parent, name = parent_and_name(checkpoint)
    with TemporaryDirectory(prefix="savant-") as scratch:
        storage = ObjectStorage(parent if is_step_name(name) else checkpoint, Path(scratch))
        try:
            there = storage.complete_steps()
            wanted = name if is_step_name(name) else there[-1] if there else ""
            if wanted not in there:
                raise CheckpointError(
                    f"{checkpoint}: no checkpoint there (looked for {MANIFEST} and step_*/{MANIFEST})"
                )
            folder = storage.fetch(wanted)
        except OSError as error:
            raise CheckpointError(f"{checkpoint}: cannot be fetched ({error})") from error
        yield folder


@contextmanager
def storage_errors_explained(storage: Disk) -> Iterator[None]:
    """Turns what object storage raises (no network, no such bucket, no right to it) into a `SavantError`."""
    try:
        yield
    except OSError as error:
        if storage.filesystem is None:
            raise
        raise SavantError(f"run.storage_path: {storage.location} cannot be read or written: {error}") from error
