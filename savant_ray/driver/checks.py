"""What is refused before Ray starts, in the user's words."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from savant_ray.config import Config
from savant_ray.errors import SavantError, SettingsError
from savant_ray.locations import decoded_uri, is_uri, split_query
from savant_ray.model.transformer import n_parameters
from savant_ray.reporting.record import has_finished, has_sample
from savant_ray.reporting.wording import byte_size, generate_command
from savant_ray.storage.protocol import RunStorage
from savant_ray.storage.run_storage import check_checkpoint_exists
from savant_ray.training.checkpoint import step_of

BYTES_PER_PARAMETER = 12  # of a checkpoint: fp32 weight and two moments


def is_finished(config: Config, storage: RunStorage, newest: Path) -> str | None:
    """Why there is nothing to do; a last validation that a stop cut short is still to be made up for."""
    folder, step = storage.location, step_of(newest)
    if step < config.training.max_steps:
        return None
    if step > config.training.max_steps:
        return (
            f"{folder} is at step {step:,} already, beyond training.max_steps = {config.training.max_steps:,}; "
            f"raise it above {step:,} to go on, or: {generate_command(folder)}"
        )
    # Some find no room for a sample.
    if not has_sample(storage.folder, step) and not has_finished(storage.folder, step):
        return None
    return f"{folder} has done its {step:,} steps; raise training.max_steps to go on, or: {generate_command(folder)}"


def check_before_start(config: Config, storage: RunStorage, fresh: bool = False) -> None:
    """Everything that needs no GPU and no Ray; `fresh`: an older run is still there and will be moved aside.

    Raises:
        SettingsError: the storage cannot be written, or the disk is too small for the checkpoints.
        CheckpointError: `run.init_from` names no checkpoint.
    """
    if config.run.init_from is not None:
        try:
            check_checkpoint_exists(config.run.init_from)
        except SavantError as error:
            raise type(error)(f"run.init_from: {error}") from error
    keep = config.checkpoint.keep if storage.filesystem is None else 1
    check_disk(storage.folder, checkpoint_bytes(config), keep, fresh)


def refuse_inputs_in_the_run(config: Config, storage: RunStorage) -> None:
    """Look for what `--fresh` would move aside although the new run needs it.

    Raises:
        SettingsError: `run.init_from`, the tokenizer or text lies in the folder of the run.
    """
    named = [("run.init_from", config.run.init_from), ("data.tokenizer", config.data.tokenizer)]
    named += [("data.validation", path) for path in _listed(config.data.validation)]
    for number, source in enumerate(config.data.sources):
        named += [(f"data.sources[{number}].path", path) for path in _listed(source.path)]
    for setting, path in named:
        if path is not None and _lies_in(path, storage.location):
            raise SettingsError(
                f"{setting}: {path} lies in the run that --fresh would move aside; give the new run another run.name"
            )


def _listed(path: str | list[str]) -> list[str]:
    return [path] if isinstance(path, str) else path


def _lies_in(path: str, run: str) -> bool:
    if is_uri(path) != is_uri(run):
        return False
    if is_uri(path):
        path, run = (decoded_uri(split_query(uri)[0]) for uri in (path, run))
        return f"{path.rstrip('/')}/".startswith(f"{run.rstrip('/')}/")
    return Path(path).is_absolute() and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(run))


def checkpoint_bytes(config: Config) -> int:
    """How large one checkpoint will be."""
    return BYTES_PER_PARAMETER * n_parameters(config.model)


def check_disk(folder: Path, one_checkpoint: int, keep: int, fresh: bool = False) -> None:
    """Look for room for the checkpoints that are kept and the one being written, less what lies there already.

    `fresh`: what lies there will be moved aside, and so takes its room beside them.

    Raises:
        SettingsError: there is too little.
    """
    existing = 0 if fresh else sum(f.stat().st_size for f in folder.glob("step_*/*") if f.is_file())
    needed = max(0, one_checkpoint * (keep + 1) - existing)
    disk = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(disk).free
    if free < needed:
        raise SettingsError(
            f"run.storage_path: {folder} has {byte_size(free)} free, {keep + 1} checkpoints of "
            f"{byte_size(one_checkpoint)} need {byte_size(needed)} more; make room, lower checkpoint.keep, "
            "or choose another run.storage_path"
        )
