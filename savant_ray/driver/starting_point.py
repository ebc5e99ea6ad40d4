"""Where a launch goes on: the newest whole checkpoint of its run folder, and whether it is this run's.

Runs in the driver before Ray starts. What is damaged is set aside, never deleted; what would train garbage silently
(another model, other data) is refused with the list of differences.
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
    ANY_TEXT,
    RECORDS,
    TOKENIZER,
    checkpoints,
    read_manifest,
    read_settings,
    verify,
)

MUST_AGREE = ("model.", "run.seed", "data.mix_by")
ALLOW = "--allow-changes goes on all the same and keeps what fits; --fresh starts anew and moves this run aside."


def find_start(
    storage: RunStorage,
    say: Callable[[str], None],
    convert: Callable[[Path | None], Path | None] = lambda newest: None,
) -> Path | None:
    """The newest whole checkpoint, on this machine.

    Damaged folders are set aside, and Ray's list of checkpoints is made true. `convert` is given the newest whole
    checkpoint and may write a newer one, made of a file of another program.

    Raises:
        CheckpointError: the folder held checkpoints, and none of them is whole.
        OSError: the storage cannot be read or written.
    """
    storage.remove_unfinished()
    start = newest_intact_checkpoint(storage, say)
    start = convert(start) or start
    if start is None and (storage.has_damaged() or saved_a_checkpoint(storage.folder)):
        raise CheckpointError(
            f"{storage.location} holds a run, but no whole checkpoint of it is left. Bring one back, or start anew with "
            "--fresh: it moves this run aside and loses nothing."
        )
    rebuild_snapshot(storage)
    return start


def records_of(run_folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of the record that lie whole beside the checkpoints, oldest first."""
    for folder in checkpoints(run_folder):
        with suppress(CheckpointError):
            verify(folder, RECORDS)
            yield from read_records(folder / RECORDS)


def refuse_other_settings(start: Path, config: Config) -> None:
    """The checkpoint's model and seed against the settings: the shape of the weights and the order of the data.

    Raises:
        CheckpointError: they differ; all differences are listed.
    """
    differences = [text for name, text in changes_since(start, config).items() if name.startswith(MUST_AGREE)]
    if config.data.learns_tokenizer and TOKENIZER not in read_manifest(start)["files"]:
        learnt = f"data.tokenizer: {config.data.tokenizer} would learn another one than the weights were trained with"
        differences.append(f"{learnt}; give theirs")
    _refuse(start, differences)


def changes_since(start: Path, config: Config) -> dict[str, str]:
    """What has changed since the checkpoint was written: dotted name -> `name: 8, now 10`."""
    return changed_settings(read_settings(start).to_dict(), config.to_dict())


def refuse_other_data(start: Path, config: Config, data_fingerprint: str) -> None:
    """The checkpoint's text against the prepared one.

    Raises:
        CheckpointError: they differ.
    """
    if read_manifest(start)["data_fingerprint"] in (ANY_TEXT, data_fingerprint):
        return
    listed = changes_since(start, config).get("data.sources", "data.sources: a file was added, changed or removed")
    kept = f"the tokenizer stays that of {start.name} (data.tokenizer: {start / TOKENIZER})"
    _refuse(start, [f"{listed}; so a position in the order means another sequence", kept])


def changed_settings(old: dict[str, Any], new: dict[str, Any], section: str = "") -> dict[str, str]:
    """What differs between two `Config.to_dict()`: dotted name -> `name: 8, now 10`."""
    changes: dict[str, str] = {}
    for key in {**old, **new}:
        name, before, now = f"{section}{key}", old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            changes |= changed_settings(before, now, f"{name}.")
        elif before != now:
            changes[name] = f"{name}: {before}, now {now}"
    return changes


def _refuse(start: Path, differences: list[str]) -> None:
    if differences:
        raise CheckpointError(f"{start.name} was trained with something else:\n  " + "\n  ".join([*differences, ALLOW]))
