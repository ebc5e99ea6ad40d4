"""A file of the original becomes a checkpoint `step_N/` of ours: in the run folder for training, aside for commands.

Weights and moments are the file's, in fp32 and in our order; the schedule goes on with the rate that the original's next
update would have. A file says nothing of the text that it has read, so the position in it is step × effective batch and
the data fingerprint is empty (`ANY_TEXT`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from savant_ray.config import Config, TrainingConfig, dump_yaml
from savant_ray.data.tokenizer import Tokenizer, with_tokenizer_settings
from savant_ray.errors import CheckpointError, DataError, SettingsError
from savant_ray.events import CheckpointSaved, Event
from savant_ray.optim.schedule import learning_rate
from savant_ray.original.file import MASKS, SCHEDULER, newest_whole, read_file, renumbered
from savant_ray.original.file_settings import FileSettings, complete_settings, parameter_shapes
from savant_ray.original.names import is_original_name, original_files, original_step
from savant_ray.training.checkpoint import (
    ANY_TEXT,
    CONFIG,
    FORMAT_VERSION,
    MANIFEST,
    TOKENIZER,
    newest_checkpoint,
    read_manifest,
    read_settings,
    step_of,
    write_checkpoint,
)


class RunFolder(Protocol):
    """Where a run is kept: what is needed here of `cluster.disk.Disk`."""

    folder: Path
    location: str

    def files(self) -> list[str]:
        """Return the names of what lies directly in the run folder."""

    def fetch(self, name: str) -> Path:
        """Return a file of the run on this machine."""

    def locate(self, name: str) -> str:
        """Return a checkpoint's path or URI, for people."""

    def check_owner(self) -> None:
        """Raise SavantError if another process has taken the run over."""

    def keep(self, folder: Path) -> str:
        """Take over a checkpoint that was just written into `folder`."""


def convert_newest(
    storage: RunFolder,
    config: Config,
    newest: Path | None,
    say: Callable[[str], None],
    emit: Callable[[Event], None],
    allow_changes: bool = False,
) -> Path | None:
    """Convert the newest whole file of the original into a checkpoint of the run, if there is one after `newest`.

    `newest` is the newest whole checkpoint of ours. If that was itself converted for other settings and nothing was
    trained from it, it is converted anew. Damaged files are reported and stay where they are, as the converted one does.

    Returns:
        The new checkpoint, None if there is nothing to convert.

    Raises:
        CheckpointError: there is no checkpoint of ours and all files of the original are damaged, or the file is not that
            of a model with these settings; all differences are listed.
        DataError: the tokenizer of the settings cannot be read.
        SettingsError: it has more entries than the file's model.
        SavantError: another process has taken the run over.
        OSError: the storage cannot be read or written; nothing is left behind.
    """
    path = _newest_file(storage, newest, not config.data.learns_tokenizer, say)
    if path is None:
        return None
    started = time.perf_counter()
    content = read_file(path)
    settings = complete_settings(content["model_state_dict"], config.to_dict())
    if newest is not None and content["step"] == step_of(newest):
        if settings.problems or _is_conversion_with(newest, settings.config):  # an ordinary resume, or refused as such
            return None
    elif not allow_changes:
        _refuse_other_settings(path, settings)
    names = list(parameter_shapes(settings.config.model))
    checkpoint = to_checkpoint(content, names, config.training.effective_batch)
    storage.check_owner()
    folder = write_checkpoint(storage.folder, checkpoint, _texts(settings.config, allow_changes), storage.check_owner)
    storage.keep(folder)
    for difference in _other_hyperparameters(path, content, checkpoint, settings.config.training):
        say(f"note: {difference}")
    emit(
        CheckpointSaved(
            step=content["step"],
            path=storage.locate(folder.name),
            reason=f"converted from {path.name} of the original, which shows neither all settings of its model nor what "
            f"text it has read: continues with {', '.join(settings.not_shown)} and with the text at sequence "
            f"{checkpoint['savant']['position']:,}, step × effective batch",
            seconds=time.perf_counter() - started,
            stall_seconds=0.0,
        )
    )
    return folder


def find_original(path: Path, say: Callable[[str], None] = lambda _: None) -> Path | None:
    """Return the file of the original that is meant by a path: itself, or the newest whole one of a folder.

    None if the path is or holds a checkpoint of ours, or nothing of the kind.

    Raises:
        CheckpointError: the folder has only damaged ones.
    """
    if path.is_file():
        return None if (path.parent / MANIFEST).is_file() else path
    if not path.is_dir() or (path / MANIFEST).is_file() or newest_checkpoint(path) is not None:
        return None
    files = original_files(path)
    newest = newest_whole(reversed(files), say)
    if newest is None and files:
        raise CheckpointError(_none_whole(str(path)))
    return newest


@contextmanager
def converted(
    path: Path,
    settings: Mapping[str, Mapping[str, Any]],
    note: Callable[[str], None],
    allow_changes: bool = False,
) -> Iterator[Path]:
    """Convert a file of the original into a checkpoint in a temporary folder, for the time of a `with` block.

    It holds weights, settings and tokenizer, no moments. `settings` are given by section, as in YAML; what had to be
    assumed beside them is handed to `note`. With `allow_changes` the settings are not compared with the file, and the
    checkpoint has no tokenizer.

    Raises:
        CheckpointError: the file is damaged, or not one of the original's model.
        SettingsError: settings contradict the file, or no tokenizer is named; everything is listed. Or the tokenizer has
            more entries than the file's model.
        DataError: the tokenizer cannot be read.
    """
    content = read_file(path)
    file_settings = complete_settings(content["model_state_dict"], settings)
    texts = {CONFIG: dump_yaml(file_settings.config)}
    if not allow_changes:
        _refuse_incomplete(path, file_settings)
        texts = _texts(file_settings.config)
    if file_settings.assumed:
        note(f"{path.name} does not show all settings of its model; assumed: {', '.join(file_settings.assumed)}")
    content["optimizer_state_dict"] = {"state": {}, "param_groups": []}
    names = list(parameter_shapes(file_settings.config.model))
    checkpoint = to_checkpoint(content, names, file_settings.config.training.effective_batch)
    with TemporaryDirectory(prefix="savant-") as folder:
        yield write_checkpoint(Path(folder), checkpoint, texts)


def to_checkpoint(content: Mapping[str, Any], names: Sequence[str], effective_batch: int) -> dict[str, Any]:
    """Return a file's content (see `read_file`) as that of a checkpoint of ours.

    `names` are the model's parameters in our order, by which weights and moments are arranged. An optimizer of several
    groups does not say which moments are whose; it is left as it is, and `load_checkpoint` tells that it does not fit. A
    schedule that is behind the step, because the original could not load its optimizer and began anew, is left behind,
    and `load_checkpoint` reports it.
    """
    weights = {name: weight for name, weight in content["model_state_dict"].items() if name not in MASKS}
    last_epoch = _last_epoch(content)
    return {
        "step": content["step"],
        "model_state_dict": {name: weights[name] for name in sorted(weights, key=_place(names))},
        "optimizer_state_dict": renumbered(content["optimizer_state_dict"], list(weights), names),
        SCHEDULER: {"last_epoch": min(last_epoch, content["step"])},
        "savant": {
            "format_version": FORMAT_VERSION,
            "position": content["step"] * effective_batch,
            "tokens_seen": 0,
            "skipped_micro_batches": 0,
            "skipped_in_a_row": 0,
            "schedule_offset": max(0, last_epoch - content["step"] - 1),
            "data_fingerprint": ANY_TEXT,
        },
    }


def _other_hyperparameters(
    path: Path, content: Mapping[str, Any], checkpoint: Mapping[str, Any], training: TrainingConfig
) -> Iterator[str]:
    """Yield a sentence for each hyperparameter that a file holds and that differs from the settings.

    `content` is the file's, `checkpoint` what it was converted into.
    """
    scheduler, groups = content.get(SCHEDULER, {}), content["optimizer_state_dict"]["param_groups"]
    offset = checkpoint["savant"]["schedule_offset"]
    rate = learning_rate(
        content["step"] + 1 + offset, training.learning_rate, training.warmup_steps, training.max_steps
    )
    match scheduler:
        case {"_last_lr": [float(file_rate)], "base_lrs": [float(peak)]} if not _is_close(rate, file_rate):
            yield (
                f"the next update of {path.name} has a learning rate of {file_rate:.3e} in the original, {rate:.3e} with "
                f"these settings; the original's peak is {peak:g} (training.learning_rate: {training.learning_rate:g}), its "
                "number of steps is training.max_steps"
            )
    match groups:
        case [{"weight_decay": float(decay)}] if not _is_close(decay, training.weight_decay):
            yield f"training.weight_decay: {training.weight_decay:g}, but {path.name} was written with {decay:g}"


def _is_close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-15)


def _place(names: Sequence[str]) -> Callable[[str], int]:
    """Return a key for sorting in the order of `names`; others come last."""
    places = {name: place for place, name in enumerate(names)}
    return lambda name: places.get(name, len(places))


def _last_epoch(content: Mapping[str, Any]) -> int:
    """Return the updates that the file's schedule has counted; of a file without a schedule, those up to its step."""
    last_epoch = content.get(SCHEDULER, {}).get("last_epoch")
    return last_epoch if type(last_epoch) is int and 0 <= last_epoch < 2**63 else int(content["step"]) + 1


def _texts(config: Config, allow_changes: bool = False) -> dict[str, str]:
    """Return the texts of a checkpoint: settings, and the tokenizer that they name, if any.

    Raises:
        DataError: the tokenizer cannot be read.
        SettingsError: it has more entries than the model's vocabulary, unless changes are allowed.
    """
    if config.data.learns_tokenizer:
        return {CONFIG: dump_yaml(config)}
    config, tokenizer = _load_tokenizer(config)
    if not allow_changes and tokenizer.vocab_size > config.model.vocab_size:
        raise SettingsError(
            f"data.tokenizer: {tokenizer.name} has {tokenizer.vocab_size:,} entries, the file's model only "
            f"{config.model.vocab_size:,}; give the tokenizer that it was trained with"
        )
    return {CONFIG: dump_yaml(config), TOKENIZER: tokenizer.to_json()}


def _load_tokenizer(config: Config) -> tuple[Config, Tokenizer]:
    """Load the tokenizer that the settings name; also return the settings with what follows from it.

    Raises:
        DataError: it cannot be read.
    """
    data = config.data
    try:
        tokenizer = Tokenizer.load(data.tokenizer, data.end_of_document, data.add_special_tokens)
    except DataError as error:
        raise DataError(f"data.tokenizer: {error}") from error
    return with_tokenizer_settings(config, tokenizer), tokenizer


def _newest_file(storage: RunFolder, newest: Path | None, may_repeat: bool, say: Callable[[str], None]) -> Path | None:
    """Return the newest whole file of the original of a step after `newest`.

    Of the same step if `newest` was itself made of such a file and `may_repeat`.

    Raises:
        CheckpointError: there is no checkpoint of ours, and all files of the original are damaged.
    """
    least = 0
    if newest is not None:
        least = step_of(newest) if may_repeat and _was_converted(newest) else step_of(newest) + 1
    files = storage.files()
    names = [name for name in files if is_original_name(name) and original_step(name) >= least]
    names.sort(key=original_step, reverse=True)
    if newest is None and not names and (others := sorted(name for name in files if name.endswith(".pt"))):
        say(
            f"note: {', '.join(others)}: not used, because files of the original are named step_N.pt, N being their step"
        )
    path = newest_whole((storage.fetch(name) for name in names), say)
    if path is None and names and newest is None:
        advice = "Bring one back, or start anew with --fresh: it moves this folder aside and loses nothing."
        raise CheckpointError(f"{_none_whole(storage.location)}. {advice}")
    return path


def _was_converted(checkpoint: Path) -> bool:
    """Return whether a checkpoint of ours was made of a file of the original."""
    return bool(read_manifest(checkpoint)["data_fingerprint"] == ANY_TEXT)


def _is_conversion_with(checkpoint: Path, config: Config) -> bool:
    """Return whether a converted checkpoint is what a conversion with these settings would give."""
    if not (checkpoint / TOKENIZER).is_file():
        return False
    old = read_settings(checkpoint)
    new, tokenizer = _load_tokenizer(config)
    return (
        old.model == new.model
        and (old.run.seed, old.training.effective_batch) == (new.run.seed, new.training.effective_batch)
        and (old.data.end_of_document, old.data.add_special_tokens)
        == (new.data.end_of_document, new.data.add_special_tokens)
        and (checkpoint / TOKENIZER).read_text(encoding="utf-8") == tokenizer.to_json()
    )


def _refuse_other_settings(path: Path, settings: FileSettings) -> None:
    """Refuse to train on with settings that are not those of the file.

    Raises:
        CheckpointError: some are not, or no tokenizer is named, so that another one would be learnt.
    """
    problems, data = list(settings.problems), settings.config.data
    if data.learns_tokenizer:
        learnt = f"data.tokenizer: {data.tokenizer} would learn another one than the file was trained with"
        problems.append(f"{learnt}; give its own")
    if problems:
        allow = (
            "--allow-changes goes on all the same and keeps what fits; --fresh starts anew and moves this run aside."
        )
        raise CheckpointError(f"{path.name} was trained with something else:\n  " + "\n  ".join([*problems, allow]))


def _refuse_incomplete(path: Path, settings: FileSettings) -> None:
    problems = list(settings.problems)
    if settings.config.data.learns_tokenizer:
        problems.append(
            "data.tokenizer: a file of the original holds no tokenizer; give --data.tokenizer FILE, FOLDER or NAME"
        )
    if problems:
        kind = SettingsError if len(problems) > len(settings.misfits) else CheckpointError
        raise kind(f"{path}, a file of the original, does not go with the settings:\n  " + "\n  ".join(problems))


def _none_whole(folder: str) -> str:
    return f"{folder} holds files of the original, but none that is whole"
