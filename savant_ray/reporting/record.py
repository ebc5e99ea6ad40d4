"""`metrics.jsonl` and `samples.jsonl`: each event as one JSON line.

TensorBoard files, trackers, `savant status` and the HTML report are derived from them.

A killed run may leave an incomplete last line, a power failure a range of zero bytes. When the file is next opened, the
incomplete line is removed; damaged lines are removed after a copy of the file was made (`metrics.jsonl.damaged`, `-2`, …). A
run resumed from an earlier step removes the lines of later steps, so that each step is in the record once.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from savant_ray.errors import error_context
from savant_ray.events import (
    AttemptEnded,
    AttemptStarted,
    CheckpointSaved,
    DataPrepared,
    Event,
    LogicScored,
    Notice,
    Rewound,
    RunFailed,
    RunResumed,
    SampleGenerated,
    ValidationDone,
    WorkerHung,
    WorkersLost,
    WorkersStarted,
)
from savant_ray.locations import free_name, replacing
from savant_ray.reporting.tensorboard import TensorBoard

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
DAMAGED_COPY = ".damaged"  # suffix of the copy of a file as it was before damaged lines were removed
VALIDATION_KINDS = {event.kind for event in (ValidationDone, LogicScored, SampleGenerated)}
ATTEMPT_KINDS = {  # kept when the record is reset to an earlier step
    event.kind
    for event in (
        DataPrepared,
        WorkersStarted,
        WorkerHung,
        WorkersLost,
        AttemptStarted,
        AttemptEnded,
        RunResumed,
        Rewound,
        Notice,
        RunFailed,
    )
}


class Follower(Protocol):
    """A reader of the record that follows it during an attempt."""

    def begin(self, record: Path) -> None:
        """Start following `record`, which is only appended to until the next call."""

    def warning(self) -> str:
        """Return a warning for the user once; empty if there is none."""

    def close(self) -> None:
        """Finish at the end of the attempt."""


class Record:
    """Both files of one run, flushed after each event, and the TensorBoard files derived from them."""

    def __init__(self, run_folder: Path, followers: Sequence[Follower] = ()) -> None:
        self._metrics = JsonLines(run_folder / METRICS)
        self._samples = JsonLines(run_folder / SAMPLES)
        self._board, self._followers = TensorBoard(run_folder), followers
        self._reported: set[Path] = set()  # files with a write error that was reported

    def append(self, event: Event) -> None:
        """Append the event to `metrics.jsonl`, a sample also to `samples.jsonl`."""
        self._append(to_line(event))

    def backfill(self, lines: Iterable[dict[str, Any]]) -> None:
        """Append those of `lines` that the record lacks.

        `lines` are what a checkpoint stores: the newest lines of the record, which the driver may not have written before it
        was killed.
        """
        present = {_key(line) for line in read_records(self._metrics.path)}
        for line in lines:
            if line["event"] not in ATTEMPT_KINDS and (key := _key(line)) not in present:
                present.add(key)  # several checkpoints may contain it
                self._append(line)

    def _append(self, line: dict[str, Any]) -> None:
        self._metrics.append(line)
        if line["event"] == SampleGenerated.kind:
            self._samples.append(line)
        self._board.write(line)

    def rewind(self, step: int, repeats_validation: bool) -> None:
        """Remove the lines of later steps, and of the validation of `step` if it is repeated; start the followers."""
        for file in (self._metrics, self._samples):
            file.keep(lambda line: not _is_repeated(line, step, repeats_validation))
        self._board.begin(step, read_records(self._metrics.path))
        self.start_followers()

    def start_followers(self) -> None:
        """Let the followers read the record, which is only appended to until the next call."""
        for follower in self._followers:
            follower.begin(self._metrics.path)

    def warnings(self) -> list[str]:
        """Return new warnings of followers and about files that cannot be written, each once."""
        texts = [text for follower in self._followers if (text := follower.warning())]
        files: list[JsonLines | TensorBoard] = [self._metrics, self._samples, self._board]
        for file in files:
            if not file.error:
                self._reported.discard(file.path)
            elif file.path not in self._reported:
                self._reported.add(file.path)
                texts.append(
                    f"WARNING: {file.path} cannot be written: {file.error}. Training continues; {file.consequence}."
                )
        return texts

    def close(self) -> None:
        """Close the files."""
        files: list[JsonLines | TensorBoard | Follower] = [self._metrics, self._samples, self._board, *self._followers]
        for file in files:
            file.close()


class JsonLines:
    """A file of JSON objects, one per complete line; `error` is the reason if lines cannot be written now."""

    # What happens while there is an `error`; part of the warning about it.
    consequence = "the lines are kept in memory and written when there is room"

    def __init__(self, path: Path) -> None:
        self.path, self.error = path, ""
        _repair(path)
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""

    def append(self, line: dict[str, Any]) -> None:
        """Append a line; lines that cannot be written are kept and written with the next one."""
        self._unwritten += _encoded(json.dumps(line, ensure_ascii=False, allow_nan=False))
        self._write()

    def keep(self, predicate: Callable[[dict[str, Any]], bool]) -> None:
        """Keep only lines that satisfy the predicate: in the file, atomically, and among those that wait for disk space.

        Raises:
            OSError: the storage fails; nothing has changed.
        """
        lines = list(read_records(self.path))
        kept = [line for line in lines if predicate(line)]
        if len(kept) < len(lines):
            _rewrite(self.path, kept)
            self._file.close()
            self._file = self.path.open("ab", buffering=0)
        waiting = self._unwritten.splitlines(keepends=True)
        self._unwritten = b"".join(line for line in waiting if predicate(json.loads(line)))

    def close(self) -> None:
        """Write pending lines and close the file."""
        self._write()
        self._file.close()

    def _write(self) -> None:
        end = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(self._unwritten) == len(self._unwritten):
                self._unwritten, self.error = b"", ""
                return
            self.error = os.strerror(errno.ENOSPC)  # a disk that becomes full writes a part first
        except OSError as error:
            self.error = error.strerror or str(error)
        with suppress(OSError):
            self._file.truncate(end)  # half a line would damage the next one


def to_line(event: Event) -> dict[str, Any]:
    """Return the event as a JSON object with the current time; NaN and infinity, which JSON lacks, become null."""
    fields = event.to_record()
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    line: dict[str, Any] = non_finite_as_none({"event": fields.pop("event"), "time": now, **fields})
    return line


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a record, without a last line that is still being written.

    Raises:
        ValueError: a complete line is not JSON.
    """
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)


def is_same_run(record: Path, other: Path) -> bool:
    """Return whether two records begin with the same event; True if one is missing or has no events."""
    first, other_first = (_first_event(_lines(path)) for path in (record, other))
    return not first or not other_first or first == other_first


def continues(record: Path, other: Path) -> bool:
    """Return whether a record contains the last event of another one of the same run, or that one has no events.

    Times are not compared, because they may be those of different machines.
    """
    lines = _lines(record)
    last = _first_event(reversed(_lines(other)))
    return not last or last in lines


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines() if path.exists() else []


def _first_event(lines: Iterable[bytes]) -> bytes:
    return next((line for line in lines if parse_event(line) is not None), b"")


def saved_a_checkpoint(run_folder: Path) -> bool:
    """Return whether the run's record contains a checkpoint."""
    path = run_folder / METRICS
    return path.exists() and any(line["event"] == CheckpointSaved.kind for line in read_records(path))


def has_sample(run_folder: Path, step: int) -> bool:
    """Return whether the record has the sample of that step, which is the last event of a validation."""
    path = run_folder / SAMPLES
    return path.exists() and any(line["step"] == step for line in read_records(path))


def has_finished(run_folder: Path, step: int) -> bool:
    """Return whether the newest attempt finished training after that step, including its last validation."""
    path = run_folder / METRICS
    kinds = (AttemptStarted.kind, AttemptEnded.kind)
    attempts = (line for line in read_records(path) if line["event"] in kinds) if path.exists() else ()
    last = next(iter(deque(attempts, maxlen=1)), {"event": AttemptStarted.kind})
    return last["event"] == AttemptEnded.kind and bool(last.get("finished")) and last.get("step") == step


def _key(line: dict[str, Any]) -> tuple[Any, ...]:
    """Return what identifies an event; in one step, each rank may skip several micro-batches."""
    return line["event"], line.get("step"), line.get("rank"), str(line.get("positions"))


def _is_repeated(line: dict[str, Any], step: int, repeats_validation: bool) -> bool:
    if line["event"] in ATTEMPT_KINDS:
        return False
    return line["step"] > step or (repeats_validation and line["step"] == step and line["event"] in VALIDATION_KINDS)


def _repair(path: Path) -> None:
    """Remove an incomplete last line and damaged lines; keep a copy of a file with damaged lines."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        complete = sum(len(line) for line in file if line.endswith(b"\n"))
        file.truncate(complete)
    with path.open("rb") as file:
        lines = [parse_event(line) for line in file]
    if None in lines:
        shutil.copy2(path, free_name(f"{path}{DAMAGED_COPY}", os.path.exists))
        _rewrite(path, [line for line in lines if line is not None])


def parse_event(line: bytes) -> dict[str, Any] | None:
    """Return the JSON object of a line, or None if it is not an event."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and _is_event(value) else None


def intact_events(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the events of a record without damaged lines."""
    with path.open("rb") as file:
        yield from (event for line in file if (event := parse_event(line)) is not None)


def _is_event(line: dict[str, Any]) -> bool:
    """Return whether a line has a kind, a valid time, and a step unless its kind is about an attempt."""
    kind = line.get("event")
    if not isinstance(kind, str) or not _is_time(line.get("time")):
        return False
    return type(line.get("step", 0 if kind in ATTEMPT_KINDS else None)) is int


def _is_time(text: Any) -> bool:
    try:
        return datetime.fromisoformat(text).tzinfo is not None
    except (TypeError, ValueError):
        return False


def _rewrite(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    with error_context(f"writing {path}"), replacing(path, temporary), temporary.open("wb") as file:
        file.writelines(_encoded(json.dumps(line, ensure_ascii=False)) for line in lines)
        file.flush()
        os.fsync(file.fileno())


def _encoded(line: str) -> bytes:
    """Encode a line; an unpaired surrogate, which UTF-8 cannot represent, stays a JSON escape."""
    return line.encode(errors="backslashreplace") + b"\n"


def non_finite_as_none(value: Any) -> Any:
    """Return plain values with None in place of NaN and infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {key: non_finite_as_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [non_finite_as_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
