"""Finds the checkpoint that an attempt resumes from, and compares it with the settings and the data.

Runs in the driver, before Ray starts except for `refuse_other_data`, which compares data that Ray has prepared. The
checkpoint of `run.continue_from` is copied into a new run first. Damaged checkpoints are renamed, never deleted. Another
model, or another order of the data, is refused with a list of the differences unless the user allows changes.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from savant_ray.config import Config, TrainingConfig
from savant_ray.errors import CheckpointError, SettingsError
from savant_ray.events import CheckpointSaved, Event
from savant_ray.original.conversion import convert_newest
from savant_ray.reporting.record import read_records, saved_a_checkpoint
from savant_ray.storage.protocol import RunStorage, newest_intact_checkpoint
from savant_ray.storage.ray_snapshot import rebuild_snapshot
from savant_ray.storage.run_storage import fetched
from savant_ray.training.checkpoint import (
    CONFIG,
    NO_FINGERPRINT,
    RECORDS,
    TOKENIZER,
    TOKENIZER_FILES,
    checkpoints,
    find_checkpoint,
    read_checkpoint,
    read_manifest,
    read_settings,
    step_of,
    verify,
)

UNREPORTED_CHANGES = ("run.", "data.", "reporting.")  # sections whose changes between attempts are not printed
MUST_AGREE = ("model.", "run.seed", "data.mix_by")  # sections and settings that must be those of the checkpoint
TEXT_FILES = (CONFIG, *TOKENIZER_FILES)  # of a checkpoint
ADVICE = "--allow-changes resumes anyway and keeps what fits; --fresh starts a new run and moves this one aside."
# A new run would continue from the same checkpoint, and be refused as well.
ADVICE_TO_CONTINUE = "--allow-changes continues anyway and keeps what fits."


def find_start(
    storage: RunStorage,
    config: Config,
    notify: Callable[[str], None],
    emit: Callable[[Event], None],
    allow_changes: bool,
) -> Path | None:
    """Return the local folder of the newest complete checkpoint, downloaded if necessary; None if the run has none.

    Sets damaged checkpoints aside, which `notify` prints, converts a newer file of the original script into a checkpoint,
    and rewrites Ray's list of checkpoints.

    Raises:
        CheckpointError: the run had checkpoints, and none of them is complete.
        CheckpointError, DataError, SettingsError: as `convert_newest`.
        SavantError: another process owns the run.
        OSError: the storage cannot be read or written.
    """
    storage.remove_unfinished()
    newest = newest_intact_checkpoint(storage, notify)
    newest = convert_newest(storage, config, newest, notify, emit, allow_changes) or newest
    if newest is None and (storage.has_damaged() or saved_a_checkpoint(storage.folder)):
        raise CheckpointError(
            f"{storage.location} holds a run, but no complete checkpoint of it. Restore one, or start a new run with "
            "--fresh, which moves this one aside and deletes nothing."
        )
    rebuild_snapshot(storage)
    return newest


@contextmanager
def checkpoint_to_continue_from(
    source: str, config: Config, allow_changes: bool, files: Sequence[str] = ()
) -> Iterator[Path]:
    """Yield the local folder of `source` (`run.continue_from`), whose settings a new run may continue with.

    If `files` is not empty, only these files and the manifest of a URI are downloaded.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged, or has other settings, as in `compare_settings`.
        SettingsError: it has already done `training.max_steps` steps, or is not the URI of a storage.
    """
    try:
        with fetched(source, files) as path:
            folder = find_checkpoint(path)
            if step_of(folder) >= config.training.max_steps:
                raise SettingsError(
                    f"{source} has already done training.max_steps = {config.training.max_steps:,} steps"
                )
            compare_settings(folder, config, allow_changes, notify=lambda _: None)
            yield folder
    except (CheckpointError, SettingsError) as error:
        raise type(error)(f"run.continue_from: {error}") from error


def copy_start(
    storage: RunStorage, config: Config, source: str, emit: Callable[[Event], None], allow_changes: bool
) -> Path:
    """Copy the checkpoint `source` (`run.continue_from`) of another run into a new one; return its folder there.

    The copy has no records: the steps up to it are in the other run.

    Raises:
        CheckpointError, SettingsError: as in `checkpoint_to_continue_from`.
        SavantError: another process owns the run.
        OSError: the storage of the run cannot be written.
    """
    started = time.perf_counter()
    with checkpoint_to_continue_from(source, config, allow_changes) as folder:
        content = read_checkpoint(folder)
        names = [name for name in TEXT_FILES if name in read_manifest(folder)["files"]]
        texts = {name: (folder / name).read_text(encoding="utf-8") for name in names}
    copy = storage.save(content, {**texts, RECORDS: ""})
    rebuild_snapshot(storage)
    emit(
        CheckpointSaved(
            step=content["step"],
            path=storage.locate(copy.name),
            reason=f"copied from {source}",
            seconds=time.perf_counter() - started,
            stall_seconds=0.0,
        )
    )
    return copy


def records_of(run_folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of the record that was saved with each checkpoint, oldest first; skip damaged ones."""
    for folder in checkpoints(run_folder):
        with suppress(CheckpointError):
            verify(folder, RECORDS)
            yield from read_records(folder / RECORDS)


def compare_settings(checkpoint: Path, config: Config, allow_changes: bool, notify: Callable[[str], None]) -> None:
    """Report the settings that changed since the checkpoint was written.

    Raises:
        CheckpointError: model, seed, `data.mix_by` or `training.schedule` are not those of the checkpoint, or a new
            tokenizer would be trained, or with the schedule `wsd` the checkpoint's steps would have had other learning
            rates, and `allow_changes` is False; the message lists all differences.
    """
    old = read_settings(checkpoint)
    changes = changed_settings(old.to_dict(), config.to_dict())
    if not allow_changes:
        _refuse_other_settings(checkpoint, config, changes, old.training)
    reported = [text for name, text in changes.items() if not name.startswith(UNREPORTED_CHANGES)]
    if reported:
        notify(f"changed since {checkpoint.name}: {'; '.join(reported)}")
    if "training.max_steps" in changes:
        last_stable_step = config.training.last_stable_step
        follows = "follows the schedule of the new length"
        notify(
            f"from here on the learning rate {follows}"
            if last_stable_step is None
            else f"the learning rate {follows}: it falls after step {last_stable_step:,}"
        )


def _refuse_other_settings(
    checkpoint: Path, config: Config, changes: dict[str, str], old_training: TrainingConfig
) -> None:
    differences = [text for name, text in changes.items() if name.startswith(MUST_AGREE)]
    if config.data.trains_tokenizer and TOKENIZER not in read_manifest(checkpoint)["files"]:
        differences.append(
            f"data.tokenizer: {config.data.tokenizer} would train a new tokenizer, and {checkpoint.name} has none; set it "
            "to the tokenizer that the weights were trained with"
        )
    differences += other_learning_rates(old_training, config.training, step_of(checkpoint))
    _raise_if_different(checkpoint, config, differences)


def other_learning_rates(old: TrainingConfig, new: TrainingConfig, step: int) -> list[str]:
    """Describe each change due to which steps up to `step` would have had other learning rates, relative to the peak.

    With schedule wsd a run of more steps is the same run up to the decay, which a change would make untrue. A cosine
    depends on `training.max_steps` in all steps, and may change.
    """
    if old.schedule != new.schedule:
        return [f"training.schedule: {old.schedule}, now {new.schedule}"]
    if old.last_stable_step is None or new.last_stable_step is None:
        return []
    differences = []
    if old.n_warmup_steps != new.n_warmup_steps:
        differences.append(
            f"the warm-up had {old.n_warmup_steps:,} steps, now {new.n_warmup_steps:,}; training.warmup_steps: "
            f"{old.n_warmup_steps} keeps it"
        )
    old_decay, new_decay = (old.last_stable_step, old.max_steps), (new.last_stable_step, new.max_steps)
    if old_decay != new_decay and min(old.last_stable_step, new.last_stable_step) < step:
        if old.last_stable_step == 0:
            advice = "to train longer, begin a new run"
        elif old.last_stable_step < step:
            advice = (
                f"to train longer, begin a new run with run.continue_from: …/step_{old.last_stable_step}, or earlier"
            )
        else:
            advice = f"with {shortest_length(step, new.decay_fraction)} it falls from step {step:,} on"
        differences.append(
            f"the learning rate fell from step {old_decay[0]:,} to {old_decay[1]:,}, now from {new_decay[0]:,} to "
            f"{new_decay[1]:,}; {advice}"
        )
    return differences


def shortest_length(last_stable_step: int, decay_fraction: float) -> str:
    """Return the setting with which a decay of this fraction begins after `last_stable_step`, not before."""
    if decay_fraction == 1:
        return "a training.decay_fraction below 1"
    first = math.floor((last_stable_step - 0.5) / (1 - decay_fraction))
    lengths = (
        TrainingConfig(max_steps=n, schedule="wsd", decay_fraction=decay_fraction)
        for n in itertools.count(max(1, first))
    )
    shortest = next(settings for settings in lengths if (settings.last_stable_step or 0) >= last_stable_step)
    return f"training.max_steps: {shortest.max_steps}"


def refuse_other_data(checkpoint: Path, config: Config, data_fingerprint: str) -> None:
    """Check that text, mixture and tokenizer are those that the checkpoint was trained with.

    Raises:
        CheckpointError: they differ.
    """
    if read_manifest(checkpoint)["data_fingerprint"] in (NO_FINGERPRINT, data_fingerprint):
        return
    change = changed_settings(read_settings(checkpoint).to_dict(), config.to_dict()).get(
        "data.sources",
        "data.sources: a file was added, changed or removed, or a setting of data changes what is read, such as "
        "data.deduplicate or data.validation",
    )
    # Not a difference: `choose_tokenizer` kept the checkpoint's tokenizer, which the user may not expect with other text.
    note = f"the tokenizer remains that of {checkpoint.name} (data.tokenizer: {checkpoint / TOKENIZER})"
    consequence = "so the same position in the data order is another sequence"
    _raise_if_different(checkpoint, config, [f"{change}; {consequence}", note])


def changed_settings(old: dict[str, Any], new: dict[str, Any], section: str = "") -> dict[str, str]:
    """Return the differences between two `Config.to_dict()`: dotted name -> text such as `training.max_steps: 8, now 10`."""
    changes: dict[str, str] = {}
    for key in {**old, **new}:
        name, before, now = f"{section}{key}", old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            changes |= changed_settings(before, now, f"{name}.")
        elif before != now:
            changes[name] = f"{name}: {before}, now {now}"
    return changes


def _raise_if_different(checkpoint: Path, config: Config, differences: list[str]) -> None:
    if differences:
        advice = ADVICE if config.run.continue_from is None else ADVICE_TO_CONTINUE
        raise CheckpointError(
            f"{checkpoint.name} was trained with other settings or data:\n  " + "\n  ".join([*differences, advice])
        )
