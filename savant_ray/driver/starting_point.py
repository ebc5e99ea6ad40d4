"""Finds the checkpoint that an attempt resumes from, and compares it with the settings and the data.

Runs in the driver before Ray starts. Damaged checkpoints are renamed, never deleted. Settings and data with which the
weights would be useless (another model, another order of the data) are refused with a list of the differences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from savant_ray.config import Config
from savant_ray.errors import CheckpointError
from savant_ray.reporting.record import read_records, saved_a_checkpoint
from savant_ray.storage.protocol import RunStorage, newest_intact_checkpoint
from savant_ray.storage.ray_snapshot import rebuild_snapshot
from savant_ray.training.checkpoint import (
    NO_FINGERPRINT,
    RECORDS,
    TOKENIZER,
    checkpoints,
    read_manifest,
    read_settings,
    verify,
)

UNREPORTED_CHANGES = ("run.", "data.", "reporting.")  # sections whose changes between attempts are not printed
MUST_AGREE = ("model.", "run.seed", "data.mix_by")  # sections and settings that must be those of the checkpoint
ADVICE = "--allow-changes resumes anyway and keeps what fits; --fresh starts a new run and moves this one aside."


def find_start(
    storage: RunStorage,
    notify: Callable[[str], None],
    convert: Callable[[Path | None], Path | None] = lambda newest: None,
) -> Path | None:
    """Return the local folder of the newest complete checkpoint, downloaded if necessary; None if the run has none.

    Sets damaged checkpoints aside, which `notify` prints, and rewrites Ray's list of checkpoints. `convert` is called with
    the newest complete checkpoint and may return a newer one that it converts from a file of the original program.

    Raises:
        CheckpointError: the run had checkpoints, and none of them is complete.
        OSError: the storage cannot be read or written.
    """
    storage.remove_unfinished()
    start = newest_intact_checkpoint(storage, notify)
    start = convert(start) or start
    if start is None and (storage.has_damaged() or saved_a_checkpoint(storage.folder)):
        raise CheckpointError(
            f"{storage.location} holds a run, but no complete checkpoint of it. Restore one, or start a new run with "
            "--fresh, which moves this one aside and deletes nothing."
        )
    rebuild_snapshot(storage)
    return start


def records_of(run_folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of the record that was saved with each checkpoint, oldest first; skip damaged ones."""
    for folder in checkpoints(run_folder):
        with suppress(CheckpointError):
            verify(folder, RECORDS)
            yield from read_records(folder / RECORDS)


def compare_settings(start: Path, config: Config, allow_changes: bool, notify: Callable[[str], None]) -> None:
    """Report the settings that changed since the checkpoint was written.

    Raises:
        CheckpointError: model, seed or `data.mix_by` are not those of the checkpoint, or a new tokenizer would be trained,
            and `allow_changes` is False; the message lists all differences.
    """
    changes = changes_since(start, config)
    if not allow_changes:
        _refuse_other_settings(start, config, changes)
    reported = [text for name, text in changes.items() if not name.startswith(UNREPORTED_CHANGES)]
    if reported:
        notify(f"changed since {start.name}: {'; '.join(reported)}")
    if "training.max_steps" in changes:
        notify("from here on the learning rate follows the schedule of the new length")


def _refuse_other_settings(start: Path, config: Config, changes: dict[str, str]) -> None:
    differences = [text for name, text in changes.items() if name.startswith(MUST_AGREE)]
    if config.data.trains_tokenizer and TOKENIZER not in read_manifest(start)["files"]:
        differences.append(
            f"data.tokenizer: {config.data.tokenizer} would train a new tokenizer, and {start.name} has none; set it to the "
            "tokenizer that the weights were trained with"
        )
    _raise_if_different(start, differences)


def changes_since(start: Path, config: Config) -> dict[str, str]:
    """Return the settings that changed since the checkpoint was written, as `changed_settings` does."""
    return changed_settings(read_settings(start).to_dict(), config.to_dict())


def refuse_other_data(start: Path, config: Config, data_fingerprint: str) -> None:
    """Check that text, mixture and tokenizer are those that the checkpoint was trained with.

    Raises:
        CheckpointError: they differ.
    """
    if read_manifest(start)["data_fingerprint"] in (NO_FINGERPRINT, data_fingerprint):
        return
    change = changes_since(start, config).get("data.sources", "data.sources: a file was added, changed or removed")
    # Not a difference: `choose_tokenizer` kept the checkpoint's tokenizer, which the user may not expect with other text.
    note = f"the tokenizer remains that of {start.name} (data.tokenizer: {start / TOKENIZER})"
    _raise_if_different(start, [f"{change}; so the same position in the data order is another sequence", note])


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


def _raise_if_different(start: Path, differences: list[str]) -> None:
    if differences:
        raise CheckpointError(
            f"{start.name} was trained with other settings or data:\n  " + "\n  ".join([*differences, ADVICE])
        )
