"""Checks without Ray or a GPU: whether a run is finished, its inputs exist, and its disk has enough space."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

from savant_ray.config import Config
from savant_ray.data.source_files import path_list
from savant_ray.errors import SavantError, SettingsError
from savant_ray.locations import decoded_uri, is_uri, split_query
from savant_ray.model.transformer import n_parameters
from savant_ray.reporting.record import has_finished, has_sample
from savant_ray.reporting.wording import byte_size, generate_command
from savant_ray.storage.local import DAMAGED
from savant_ray.storage.protocol import RunStorage
from savant_ray.storage.run_storage import check_checkpoint_exists
from savant_ray.training.checkpoint import step_of

BYTES_PER_PARAMETER = 12  # of a checkpoint: an fp32 weight and two fp32 moments (Muon has one, so this is enough)


def finished_message(config: Config, storage: RunStorage, newest: Path) -> str | None:
    """Return a message if the run has nothing left to do, else None.

    A run that was stopped during its last validation is not finished: the validation is repeated.
    """
    folder, step = storage.location, step_of(newest)
    if step < config.training.max_steps:
        return None
    if step > config.training.max_steps:
        return (
            f"{folder} is already at step {step:,}, beyond training.max_steps = {config.training.max_steps:,}; "
            f"raise it above {step:,} to continue training, or: {generate_command(folder)}"
        )
    # The last validation ends with a sample. If the prompt fills the whole sequence, there is none; then the record has to
    # contain the `end` event of this step.
    if not has_sample(storage.folder, step) and not has_finished(storage.folder, step):
        return None
    if config.training.last_stable_step is None:
        longer = "raise training.max_steps to continue training"
    else:
        longer = "to train longer, begin a new run"
        if storage.permanent is not None:
            longer += f" with run.continue_from: {storage.locate(storage.permanent)}"
    return f"{folder} has done its {step:,} steps; {longer}, or: {generate_command(folder)}"


def check_before_start(config: Config, storage: RunStorage, fresh: bool = False, resumes: bool = False) -> None:
    """Check where the run starts and the free disk space; with `fresh`, an older run will be moved aside afterwards.

    A run that `resumes` does not need the checkpoint that it once started from, which may have been deleted.

    Raises:
        SettingsError: `run.init_from` or `run.continue_from` is no usable URI, or the disk is too small for the checkpoints.
        CheckpointError: `run.init_from` or `run.continue_from` names no checkpoint.
    """
    for name, checkpoint in () if resumes else _starting_checkpoints(config):
        try:
            check_checkpoint_exists(checkpoint)
        except SavantError as error:
            raise type(error)(f"{name}: {error}") from error
    # A `checkpoint.keep` above the number of checkpoints keeps all.
    keep = min(config.checkpoint.keep, math.ceil(config.training.max_steps / config.checkpoint.every_steps))
    keep += storage.permanent is not None
    keep = keep if storage.filesystem is None else 1  # of a run in object storage, this machine keeps only the newest
    check_disk(storage.folder, checkpoint_bytes(config), keep, fresh)


def refuse_own_checkpoint_as_start(config: Config, storage: RunStorage, newest: Path) -> None:
    """Check that a run that resumes from `newest` is not to start from one of its own checkpoints: it would ignore that.

    Raises:
        SettingsError: `run.init_from` or `run.continue_from` is the run or one of its checkpoints.
    """
    for name, checkpoint in _starting_checkpoints(config):
        place = _place_in(storage.location, checkpoint)
        if place is not None and (not place or place.startswith("step_")):  # others may be what it has started from
            raise SettingsError(
                f"{name}: {checkpoint} lies in the run itself, which would resume from {newest.name} instead; give the new "
                "run another run.name"
            )


def refuse_inputs_in_the_run(config: Config, storage: RunStorage) -> None:
    """Check that `--fresh` does not move aside anything that the new run needs.

    Raises:
        SettingsError: the checkpoint that it starts from, the tokenizer or text lies in the folder of the run.
    """
    inputs = [*_starting_checkpoints(config), ("data.tokenizer", config.data.tokenizer)]
    inputs += [("data.validation", path) for path in path_list(config.data.held_out.path)]
    for number, source in enumerate(config.data.sources):
        inputs += [(f"data.sources[{number}].path", path) for path in path_list(source.path)]
    for setting, path in inputs:
        if _place_in(storage.location, path) is not None:
            raise SettingsError(
                f"{setting}: {path} lies in the run that --fresh would move aside; give the new run another run.name"
            )


def _starting_checkpoints(config: Config) -> list[tuple[str, str]]:
    """Return name and value of the settings that name a checkpoint from which a new run starts, if they are set."""
    settings = {"run.init_from": config.run.init_from, "run.continue_from": config.run.continue_from}
    return [(name, checkpoint) for name, checkpoint in settings.items() if checkpoint is not None]


def _place_in(run: str, path: str) -> str | None:
    """Return a path or URI relative to that of the run, "" for the run itself; None if it does not lie in the run."""
    if is_uri(path) != is_uri(run):
        return None
    if is_uri(path):
        path, run = (f"{decoded_uri(split_query(uri)[0]).rstrip('/')}/" for uri in (path, run))
        return path.removeprefix(run) if path.startswith(run) else None
    real_path, real_run = Path(os.path.realpath(path)), os.path.realpath(run)
    if not Path(path).is_absolute() or not real_path.is_relative_to(real_run):
        return None
    return "/".join(real_path.relative_to(real_run).parts)


def checkpoint_bytes(config: Config) -> int:
    """Return the size of one checkpoint in bytes."""
    average_bytes = 0 if config.training.ema_decay is None else 4
    return (BYTES_PER_PARAMETER + average_bytes) * n_parameters(config.model)


def check_disk(folder: Path, bytes_per_checkpoint: int, keep: int, fresh: bool = False) -> None:
    """Check the free space for `keep` checkpoints and the one being written, less those that are in the folder already.

    Damaged checkpoints are never deleted. With `fresh`, all existing ones are moved aside and continue to occupy the disk.

    Raises:
        SettingsError: there is not enough space.
    """
    files = [] if fresh else [file for file in folder.glob("step_*/*") if DAMAGED not in file.parent.name]
    freed = sum(file.stat().st_size for file in files if file.is_file())
    needed = max(0, bytes_per_checkpoint * (keep + 1) - freed)
    existing_parent = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing_parent).free
    if free < needed:
        raise SettingsError(
            f"run.storage_path: {folder} has {byte_size(free)} free, {keep + 1} checkpoints of "
            f"{byte_size(bytes_per_checkpoint)} need {byte_size(needed)} more; free some space, lower checkpoint.keep, "
            "or choose another run.storage_path"
        )
