"""Conversion of a file of the original script into a savant_ray checkpoint `step_N/`.

Training writes the checkpoint into the run folder, commands write it into a temporary folder.

Weights and moments are those of the file, in fp32 and in savant_ray's parameter order. The schedule continues with the
learning rate of the original's next update. A file does not record which text it was trained on, so the position is
step × effective batch and the data fingerprint is empty (`NO_FINGERPRINT`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from savant_ray.config import Config, TrainingConfig, dump_yaml
from savant_ray.data.tokenizer import Tokenizer, with_tokenizer_settings
from savant_ray.errors import CheckpointError, DataError, SettingsError
from savant_ray.events import CheckpointSaved, Event
from savant_ray.optim.schedule import scheduled_rate
from savant_ray.original.file import MASKS, SCHEDULER, newest_intact, read_file, renumbered
from savant_ray.original.file_settings import FileSettings, complete_settings, parameter_shapes
from savant_ray.original.names import original_files, original_names, original_step
from savant_ray.training.checkpoint import (
    CONFIG,
    FORMAT_VERSION,
    MANIFEST,
    NO_FINGERPRINT,
    TOKENIZER,
    newest_checkpoint,
    read_manifest,
    read_settings,
    step_of,
    write_checkpoint,
)


class RunFolder(Protocol):
    """The part of `storage.protocol.RunStorage` that the conversion needs; `original` must not import `storage`."""

    location: str

    def file_names(self) -> list[str]:
        """Return the names of the files directly in the run folder."""

    def fetch(self, name: str) -> Path:
        """Return the local path of a file of the run."""

    def locate(self, name: str) -> str:
        """Return the path or URI of a checkpoint, for messages."""

    def save(self, content: dict[str, Any], texts: Mapping[str, str]) -> Path:
        """Write a checkpoint and store it, unless another process owns the run; return its local folder."""


def convert_newest(
    storage: RunFolder,
    config: Config,
    newest: Path | None,
    log: Callable[[str], None],
    emit: Callable[[Event], None],
    allow_changes: bool = False,
) -> Path | None:
    """Convert the newest intact file of the original into a checkpoint of the run, if its step is after that of `newest`.

    `newest` is the newest intact savant_ray checkpoint of the run. If it was converted from a file of the original and
    nothing was trained from it, that file is converted again if `config` names a tokenizer, and settings or tokenizer have
    changed. The files are not changed; damaged ones are reported to `log`. With `allow_changes` the settings may differ from
    those of the file.

    Returns:
        The new checkpoint; None if there is nothing to convert.

    Raises:
        CheckpointError: there is no savant_ray checkpoint and all files of the original are damaged, or the file's model
            has other settings; all differences are listed.
        DataError: the tokenizer of the settings cannot be read.
        SettingsError: the tokenizer has more entries than the file's model.
        SavantError: another process owns the run.
        OSError: the storage cannot be read or written; no partial checkpoint remains.
    """
    path = _newest_file(storage, newest, not config.data.trains_tokenizer, log)
    if path is None:
        return None
    started = time.perf_counter()
    content = read_file(path)
    settings = complete_settings(content["model_state_dict"], config.to_dict())
    if newest is not None and content["step"] == step_of(newest):
        if settings.problems or _is_current(newest, settings.config):
            return None  # if there are problems, the caller reports how the settings of `newest` differ
    elif not allow_changes:
        _refuse_other_settings(path, settings)
    names = list(parameter_shapes(settings.config.model))
    checkpoint = to_checkpoint(content, names, config.training.effective_batch)
    folder = storage.save(checkpoint, _texts(settings.config, allow_changes))
    for difference in _hyperparameter_differences(path, content, checkpoint, settings.config.training):
        log(f"note: {difference}")
    emit(
        CheckpointSaved(
            step=content["step"],
            path=storage.locate(folder.name),
            reason=f"converted from {path.name} of the original, which records neither all settings of its model nor the "
            f"position in its text; training continues with {', '.join(settings.not_inferred)} and at sequence "
            f"{checkpoint['savant']['position']:,} of the text, step × effective batch",
            seconds=time.perf_counter() - started,
            stall_seconds=0.0,
        )
    )
    return folder


def find_original(path: Path, log: Callable[[str], None] = lambda _: None) -> Path | None:
    """Return the file of the original at `path`: `path` itself, or the newest intact one in a folder.

    Returns None if the path is or contains a savant_ray checkpoint, or contains no file of the original. Damaged newer
    files are reported to `log`.

    Raises:
        CheckpointError: all files of the original in the folder are damaged.
    """
    if path.is_file():
        return None if (path.parent / MANIFEST).is_file() else path
    if not path.is_dir() or (path / MANIFEST).is_file() or newest_checkpoint(path) is not None:
        return None
    files = original_files(path)
    newest = newest_intact(reversed(files), log)
    if newest is None and files:
        raise CheckpointError(no_intact_file_message(str(path)))
    return newest


@contextmanager
def converted(
    path: Path,
    settings: Mapping[str, Mapping[str, Any]],
    log: Callable[[str], None],
    allow_changes: bool = False,
) -> Iterator[Path]:
    """Convert a file of the original into a checkpoint in a temporary folder that exists within the `with` block.

    The checkpoint contains weights, settings and tokenizer, but no moments. `settings` are nested by section, as in YAML;
    defaults that complete them are reported to `log`. With `allow_changes` the settings are not compared with the file,
    and the checkpoint has no tokenizer.

    Raises:
        CheckpointError: the file is damaged, or its weights are not those of the original's model.
        SettingsError: settings contradict the file, or name no tokenizer, or one with more entries than the file's model;
            all problems are listed.
        DataError: the tokenizer cannot be read.
    """
    content = read_file(path)
    file_settings = complete_settings(content["model_state_dict"], settings)
    texts = {CONFIG: dump_yaml(file_settings.config)}
    if not allow_changes:
        _refuse_incomplete(path, file_settings)
        texts = _texts(file_settings.config)
    if file_settings.assumed:
        log(f"{path.name} does not show all settings of its model; assumed: {', '.join(file_settings.assumed)}")
    content["optimizer_state_dict"] = {"state": {}, "param_groups": []}
    names = list(parameter_shapes(file_settings.config.model))
    checkpoint = to_checkpoint(content, names, file_settings.config.training.effective_batch)
    with TemporaryDirectory(prefix="savant-") as folder:
        yield write_checkpoint(Path(folder), checkpoint, texts)


def to_checkpoint(content: Mapping[str, Any], names: Sequence[str], effective_batch: int) -> dict[str, Any]:
    """Return a file's content (see `read_file`) in the format of savant_ray's checkpoints.

    `names` are the model's parameters in savant_ray's order, to which weights and moments are sorted. The state of an
    optimizer with several groups does not show which moments belong to which parameter; it is returned unchanged, and
    `load_checkpoint` reports that it does not fit. If the original could not load its optimizer, it restarted the schedule,
    which then has counted fewer updates than the step. The result has this smaller count, and `load_checkpoint` reports it.
    """
    weights = {name: weight for name, weight in content["model_state_dict"].items() if name not in MASKS}
    last_epoch = _last_epoch(content)
    return {
        "step": content["step"],
        "model_state_dict": {name: weights[name] for name in in_order(weights, names)},
        "optimizer_state_dict": renumbered(content["optimizer_state_dict"], list(weights), names),
        SCHEDULER: {"last_epoch": min(last_epoch, content["step"])},  # savant_ray writes the step, not step + 1
        "savant": {
            "format_version": FORMAT_VERSION,
            "position": content["step"] * effective_batch,
            "tokens_seen": 0,
            "skipped_micro_batches": 0,
            "skipped_in_a_row": 0,
            "schedule_offset": max(0, last_epoch - content["step"] - 1),
            "data_fingerprint": NO_FINGERPRINT,
        },
    }


def _hyperparameter_differences(
    path: Path, content: Mapping[str, Any], checkpoint: Mapping[str, Any], training: TrainingConfig
) -> Iterator[str]:
    """Yield a message for each hyperparameter in a file that differs from the settings.

    `content` is the content of the file, `checkpoint` that of the checkpoint it was converted into.
    """
    scheduler, groups = content.get(SCHEDULER, {}), content["optimizer_state_dict"]["param_groups"]
    offset = checkpoint["savant"]["schedule_offset"]
    rate = scheduled_rate(content["step"] + 1 + offset, training)
    match scheduler:
        case {"_last_lr": [float(file_rate)], "base_lrs": [float(peak)]} if not _is_close(rate, file_rate):
            yield (
                f"the next update of {path.name} has a learning rate of {file_rate:.3e} in the original, but {rate:.3e} "
                f"with these settings; the original's peak is {peak:g} (training.learning_rate: "
                f"{training.learning_rate:g}), and training.max_steps must be its number of steps"
            )
    match groups:
        case [{"weight_decay": float(decay)}] if not _is_close(decay, training.weight_decay):
            yield f"training.weight_decay: {training.weight_decay:g}, but {path.name} was written with {decay:g}"


def _is_close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-15)


def in_order(weights: Mapping[str, Any], order: Iterable[str]) -> list[str]:
    """Return the names of the weights, sorted by `order`; names that are not in it are last."""
    known = [name for name in order if name in weights]
    return known + [name for name in weights if name not in known]


def _last_epoch(content: Mapping[str, Any]) -> int:
    """Return the number of updates that the file's schedule has counted; without a schedule, its step + 1."""
    last_epoch = content.get(SCHEDULER, {}).get("last_epoch")
    return last_epoch if type(last_epoch) is int and 0 <= last_epoch < 2**63 else int(content["step"]) + 1


def _texts(config: Config, allow_changes: bool = False) -> dict[str, str]:
    """Return the text files of a checkpoint by name: the settings and, if they name one, the tokenizer.

    Raises:
        DataError: the tokenizer cannot be read.
        SettingsError: it has more entries than the model's vocabulary, unless changes are allowed.
    """
    if config.data.trains_tokenizer:
        return {CONFIG: dump_yaml(config)}
    config, tokenizer = _load_tokenizer(config)
    if not allow_changes and tokenizer.vocab_size > config.model.vocab_size:
        raise SettingsError(
            f"data.tokenizer: {tokenizer.name} has {tokenizer.vocab_size:,} entries, but the file's model has only "
            f"{config.model.vocab_size:,}; give the tokenizer that it was trained with"
        )
    return {CONFIG: dump_yaml(config), **tokenizer.files()}


def _load_tokenizer(config: Config) -> tuple[Config, Tokenizer]:
    """Load the tokenizer that the settings name; return the settings with its special tokens, and the tokenizer.

    Raises:
        DataError: it cannot be read.
    """
    data = config.data
    try:
        tokenizer = Tokenizer.load(data.tokenizer, data.end_of_document, data.add_special_tokens)
    except DataError as error:
        raise DataError(f"data.tokenizer: {error}") from error
    return with_tokenizer_settings(config, tokenizer), tokenizer


def _newest_file(
    storage: RunFolder, newest: Path | None, may_convert_again: bool, log: Callable[[str], None]
) -> Path | None:
    """Return the newest intact file of the original whose step is after that of `newest`.

    With `may_convert_again`, a file with the step of `newest` is included if `newest` was converted from such a file.

    Raises:
        CheckpointError: there is no savant_ray checkpoint, and all files of the original are damaged.
    """
    min_step = 0
    if newest is not None:
        min_step = step_of(newest) if may_convert_again and _was_converted(newest) else step_of(newest) + 1
    files = storage.file_names()
    names = [name for name in reversed(original_names(files)) if original_step(name) >= min_step]
    if newest is None and not names and (others := sorted(name for name in files if name.endswith(".pt"))):
        log(
            f"note: {', '.join(others)}: not used, because files of the original have names of the form step_N.pt, where N "
            "is the step"
        )
    path = newest_intact(map(storage.fetch, names), log)
    if path is None and names and newest is None:
        advice = "Restore one, or start a new run with --fresh, which renames this folder and deletes nothing."
        raise CheckpointError(f"{no_intact_file_message(storage.location)}. {advice}")
    return path


def _was_converted(checkpoint: Path) -> bool:
    """Return whether a checkpoint was converted from a file of the original and nothing was trained from it."""
    return bool(read_manifest(checkpoint)["data_fingerprint"] == NO_FINGERPRINT)


def _is_current(checkpoint: Path, config: Config) -> bool:
    """Return whether converting the file again with these settings would give the same checkpoint."""
    if not (checkpoint / TOKENIZER).is_file():
        return False
    old = read_settings(checkpoint)
    new, tokenizer = _load_tokenizer(config)
    return (
        old.model == new.model
        and (old.run.seed, old.training.effective_batch) == (new.run.seed, new.training.effective_batch)
        and (old.data.end_of_document, old.data.add_special_tokens)
        == (new.data.end_of_document, new.data.add_special_tokens)
        and Tokenizer.load(checkpoint).files() == tokenizer.files()
    )


def _refuse_other_settings(path: Path, settings: FileSettings) -> None:
    """Refuse to continue training with settings that differ from those of the file.

    Raises:
        CheckpointError: settings differ, or no tokenizer is named, so that a new one would be trained.
    """
    problems, data = list(settings.problems), settings.config.data
    if data.trains_tokenizer:
        problems.append(
            f"data.tokenizer: {data.tokenizer} would train a new tokenizer; give the one that the file was trained with"
        )
    if problems:
        advice = "--allow-changes continues anyway and keeps what fits; --fresh starts a new run and renames this one."
        raise CheckpointError(f"{path.name} was trained with other settings:\n  " + "\n  ".join([*problems, advice]))


def _refuse_incomplete(path: Path, settings: FileSettings) -> None:
    """Raise CheckpointError or SettingsError if the file cannot be used with these settings, or no tokenizer is named."""
    problems = list(settings.problems)
    is_settings_error = bool(settings.contradictions) or settings.config.data.trains_tokenizer
    if settings.config.data.trains_tokenizer:
        problems.append(
            "data.tokenizer: a file of the original contains no tokenizer; give --data.tokenizer FILE, FOLDER or NAME"
        )
    if problems:
        kind = SettingsError if is_settings_error else CheckpointError
        raise kind(f"{path}, a file of the original, does not match the settings:\n  " + "\n  ".join(problems))


def no_intact_file_message(folder: str) -> str:
    """Return the error for a folder or URI whose files of the original are all damaged."""
    return f"{folder}: contains files of the original, but none that is intact"
