"""`metrics.jsonl` and `samples.jsonl`: every event as one JSON line, from which all else derives, TensorBoard's files too.

A run that is killed may leave half a line, a power cut a stretch of zeros: at the next opening such lines go, and with
them into `metrics.jsonl.damaged` a copy of the file as it was. A run that goes on from an earlier step drops what was
recorded after it, so that each step is in the record once.
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

from savant_ray.errors import doing
from savant_ray.events import (
    AttemptEnded,
    AttemptStarted,
    CheckpointSaved,
    DataPrepared,
    Event,
    LogicScored,
    Notice,
    RunFailed,
    RunResumed,
    SampleGenerated,
    ValidationDone,
    WorkersLost,
    WorkersStarted,
)
from savant_ray.reporting.tensorboard import TensorBoard

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
OF_A_VALIDATION = {event.kind for event in (ValidationDone, LogicScored, SampleGenerated)}
ABOUT_A_LAUNCH = {  # what happened even if the steps after it are gone
    event.kind
    for event in (
        *(DataPrepared, WorkersStarted, WorkersLost, AttemptStarted, AttemptEnded),
        *(RunResumed, Notice, RunFailed),
    )
}


class Follower(Protocol):
    """Whoever reads the record while it grows."""

    def begin(self, record: Path) -> None:
        """The record stands where the run goes on from; until this is called again it only grows."""

    def complaint(self) -> str:
        """What the user should hear, once; empty if there is nothing."""

    def close(self) -> None:
        """The launch is over."""


class Record:
    """The two files of one run, flushed with each event, and what TensorBoard shows of them."""

    def __init__(self, run_folder: Path, followers: Sequence[Follower] = ()) -> None:
        self._metrics = JsonLines(run_folder / METRICS)
        self._samples = JsonLines(run_folder / SAMPLES)
        self._board, self._followers = TensorBoard(run_folder), followers
        self._refused: set[Path] = set()  # files whose refusal was reported

    def append(self, event: Event) -> None:
        """Writes one line, a sample to both files."""
        self._append(to_line(event))

    def fill(self, lines: Iterable[dict[str, Any]]) -> None:
        """Adds what workers kept beside a checkpoint and the file lacks: its driver died before it heard of it."""
        there = {(line["event"], line.get("step")) for line in read_records(self._metrics.path)}
        for line in lines:
            if line["event"] not in ABOUT_A_LAUNCH and (line["event"], line["step"]) not in there:
                self._append(line)

    def _append(self, line: dict[str, Any]) -> None:
        self._metrics.append(line)
        if line["event"] == SampleGenerated.kind:
            self._samples.append(line)
        self._board.write(line)

    def go_back_to(self, step: int, validates: bool) -> None:
        """Forgets what is about to happen again: all after `step`, and its own validation if `validates`."""
        for file in (self._metrics, self._samples):
            file.keep(lambda line: not _happens_again(line, step, validates))
        self._board.begin(step, read_records(self._metrics.path))
        for follower in self._followers:
            follower.begin(self._metrics.path)

    def complaints(self) -> list[str]:
        """Of the followers and of the disk, each once."""
        texts = [text for follower in self._followers if (text := follower.complaint())]
        files: list[JsonLines | TensorBoard] = [self._metrics, self._samples, self._board]
        for file in files:
            if not file.refusal:
                self._refused.discard(file.path)
            elif file.path not in self._refused:
                self._refused.add(file.path)
                texts.append(f"WARNING: {file.path} cannot be written: {file.refusal}. Training goes on; {file.loss}.")
        return texts

    def close(self) -> None:
        """Closes the files."""
        files: list[JsonLines | TensorBoard | Follower] = [self._metrics, self._samples, self._board, *self._followers]
        for file in files:
            file.close()


class JsonLines:
    """A file of JSON objects, one a line, that is only ever complete; `refusal` says why lines are not written now."""

    loss = "the lines are kept in memory and written when there is room"

    def __init__(self, path: Path) -> None:
        self.path, self.refusal = path, ""
        _mend(path)
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""

    def append(self, line: dict[str, Any]) -> None:
        """Adds a line; what a full disk refuses is kept and tried again with the next."""
        self._unwritten += _encoded(json.dumps(line, ensure_ascii=False, allow_nan=False))
        self._write()

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Removes the other lines: written aside, renamed over."""
        lines = list(read_records(self.path))
        kept = [line for line in lines if wanted(line)]
        if len(kept) == len(lines):
            return
        self._file.close()
        _rewrite(self.path, kept)
        self._file = self.path.open("ab", buffering=0)

    def close(self) -> None:
        """Closes the file."""
        self._write()
        self._file.close()

    def _write(self) -> None:
        end = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(self._unwritten) == len(self._unwritten):
                self._unwritten, self.refusal = b"", ""
                return
            self.refusal = os.strerror(errno.ENOSPC)  # a disk that has become full takes a part first
        except OSError as error:
            self.refusal = error.strerror or str(error)
        with suppress(OSError):
            self._file.truncate(end)  # half a line would be the end of all later ones


def to_line(event: Event) -> dict[str, Any]:
    """The event as its line, with the present time; a number that JSON does not have (NaN, infinity) becomes null."""
    fields = event.to_record()
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    line: dict[str, Any] = _finite({"event": fields.pop("event"), "time": now, **fields})
    return line


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a record; a last line that is still being written is left out.

    Raises:
        ValueError: a complete line is not JSON.
    """
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)


def last_time(path: Path) -> str:
    """When the last event of a record was, "" of one that is not there or holds none."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    events = (parsed(line) for line in reversed(lines))
    return next((str(event.get("time", "")) for event in events if event is not None), "")


def saved_a_checkpoint(run_folder: Path) -> bool:
    """Whether the run's record tells of a checkpoint."""
    path = run_folder / METRICS
    return path.exists() and any(line["event"] == CheckpointSaved.kind for line in read_records(path))


def has_sample(run_folder: Path, step: int) -> bool:
    """Whether the record has the sample of that step, the last thing a validation does."""
    path = run_folder / SAMPLES
    return path.exists() and any(line["step"] == step for line in read_records(path))


def has_finished(run_folder: Path, step: int) -> bool:
    """Whether the newest launch that trained came to its end after that step, its last validation included."""
    path = run_folder / METRICS
    marks = (AttemptStarted.kind, AttemptEnded.kind)
    launches = (line for line in read_records(path) if line["event"] in marks) if path.exists() else ()
    last = next(iter(deque(launches, maxlen=1)), {"event": AttemptStarted.kind})
    return last["event"] == AttemptEnded.kind and bool(last.get("finished")) and last.get("step") == step


def _happens_again(line: dict[str, Any], step: int, validates: bool) -> bool:
    if line["event"] in ABOUT_A_LAUNCH:
        return False
    return line["step"] > step or (validates and line["step"] == step and line["event"] in OF_A_VALIDATION)


def _mend(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb+") as file:
        complete = sum(len(line) for line in file if line.endswith(b"\n"))
        file.truncate(complete)
    with path.open("rb") as file:
        lines = [parsed(line) for line in file]
    if None in lines:
        shutil.copy2(path, path.with_name(f"{path.name}.damaged"))
        _rewrite(path, [line for line in lines if line is not None])


def parsed(line: bytes) -> dict[str, Any] | None:
    """The object of a line; None: it is none, or says nothing of an event."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and _is_event(value) else None


def _is_event(line: dict[str, Any]) -> bool:
    """Whether it has a kind, and a step but where it is about a launch; where it has a time, that has to be one."""
    kind = line.get("event")
    if not isinstance(kind, str) or ("time" in line and not _is_time(line["time"])):
        return False
    return type(line.get("step", 0 if kind in ABOUT_A_LAUNCH else None)) is int


def _is_time(text: Any) -> bool:
    try:
        return datetime.fromisoformat(text).tzinfo is not None
    except (TypeError, ValueError):
        return False


def _rewrite(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    aside = path.with_name(f"{path.name}.tmp")
    with doing(f"writing {path}"):
        try:
            with aside.open("wb") as file:
                file.writelines(_encoded(json.dumps(line, ensure_ascii=False)) for line in lines)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        except OSError:
            aside.unlink(missing_ok=True)
            raise


def _encoded(line: str) -> bytes:
    """A line of the file; half a surrogate pair, which UTF-8 does not have, stays the JSON escape that it was."""
    return line.encode(errors="backslashreplace") + b"\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
