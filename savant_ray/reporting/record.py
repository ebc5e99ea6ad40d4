"""`metrics.jsonl` and `samples.jsonl`: every event as one JSON line, from which all else derives.

A run that is killed may leave half a line: it is cut off at the next opening. A run that goes on from an earlier step
drops what was recorded after it, so that each step is in the record once.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from savant_ray.events import Event, SampleGenerated

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
ABOUT_A_LAUNCH = ("attempt", "resume", "notice", "failure")  # happened, even if the steps after it are gone


class Record:
    """The two files of one run; flushed with each event."""

    def __init__(self, run_folder: Path) -> None:
        self._metrics = JsonLines(run_folder / METRICS)
        self._samples = JsonLines(run_folder / SAMPLES)

    def append(self, event: Event) -> None:
        """Writes one line, a sample to both files."""
        fields = event.to_record()
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"event": fields.pop("event"), "time": now, **fields}
        self._metrics.append(line)
        if isinstance(event, SampleGenerated):
            self._samples.append(line)

    def drop_after(self, step: int) -> None:
        """Forgets what happened after `step`, because it is about to happen again."""
        self._metrics.drop_after(step)
        self._samples.drop_after(step)

    def close(self) -> None:
        """Closes the files."""
        self._metrics.close()
        self._samples.close()


class JsonLines:
    """A file of JSON objects, one a line, that is only ever complete."""

    def __init__(self, path: Path) -> None:
        self._path = path
        _cut_torn_line(path)
        self._file = path.open("a", encoding="utf-8")

    def append(self, line: dict[str, Any]) -> None:
        """Adds a line; a number that JSON does not have (NaN, infinity) becomes null."""
        self._file.write(json.dumps(_finite(line), ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def drop_after(self, step: int) -> None:
        """Removes the lines about later steps: written aside, renamed over."""
        lines = list(read_records(self._path))
        kept = [line for line in lines if line.get("step", 0) <= step or line.get("event") in ABOUT_A_LAUNCH]
        if len(kept) == len(lines):
            return
        self._file.close()
        aside = self._path.with_name(f"{self._path.name}.tmp")
        with aside.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(self._path)
        self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a record; a last line that is still being written is left out.

    Raises:
        ValueError: a complete line is not JSON.
    """
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb+") as file:
        complete = sum(len(line) for line in file if line.endswith(b"\n"))
        file.truncate(complete)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
