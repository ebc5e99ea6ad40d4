"""A thread that sends the record to a tracker, many lines at once: a slow server slows nothing down.

What could not be sent, because the server was away or the driver was killed, is sent at the next launch: the tracker is
asked how far it has come. What it has is never told again, so that steps which are done again are not there twice.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from savant_ray.events import AttemptEnded, AttemptStarted, SampleGenerated
from savant_ray.reporting.record import parsed, read_records
from savant_ray.reporting.tensorboard import WITH_NUMBERS

SECONDS_BETWEEN = 5.0
MOST_LINES = 500  # sent at once
PATIENCE = 10.0  # seconds for the last lines when a launch ends
TOLD = (*WITH_NUMBERS, SampleGenerated.kind)
Line = dict[str, Any]


class Tracker(Protocol):
    """Where experiments are kept."""

    def open(self, identity: str, settings: dict[str, Any]) -> dict[str, int]:
        """Finds the run of that identity or makes it; the last step that it has of each kind of line."""

    def send(self, lines: list[Line]) -> None:
        """Adds steps, validations, logic scores, checkpoints and samples."""

    def close(self, finished: bool) -> None:
        """The launch is over; `finished`: so is the run."""


class Tracking:
    """Keeps one tracker up to date; a `Follower` of the record. An error ends this, and not the run."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self._name, self._tracker = name, tracker
        self._thread: threading.Thread | None = None
        self._reopen, self._ended, self._finished = False, threading.Event(), False
        self._complaint = ""

    def begin(self, record: Path) -> None:
        """See `Follower`."""
        self._reopen = True
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, args=(record,), name=self._name, daemon=True)
            self._thread.start()

    def complaint(self) -> str:
        """See `Follower`."""
        said, self._complaint = self._complaint, ""
        return said

    def close(self) -> None:
        """Sends what is left, as far as that takes a moment."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(PATIENCE)

    def _run(self, record: Path) -> None:
        try:
            told = self._tracker.open(*_identity(record))
            self._follow(record, told)
            self._tracker.close(self._finished)
        except Exception as error:  # whatever the tracker runs into
            said = str(error).strip().split("\n")[0] or type(error).__name__
            self._complaint = (
                f"WARNING: {self._name} is told nothing more: {said}. The record has everything, and the next launch "
                "sends what is missing."
            )

    def _follow(self, record: Path, told: dict[str, int]) -> None:
        ended = False
        while not ended:
            self._reopen = False
            with record.open("rb") as file:
                while not (ended or self._reopen):
                    ended = self._ended.is_set()  # asked before reading, so that nothing is left over
                    self._send_new(file, told)
                    ended or self._ended.wait(SECONDS_BETWEEN)

    def _send_new(self, file: BinaryIO, told: dict[str, int]) -> None:
        lines: list[Line] = []
        while (text := file.readline()).endswith(b"\n"):
            line = parsed(text)
            if line is not None and line["event"] == AttemptEnded.kind:
                self._finished = line["finished"]
            if line is not None and line["event"] in TOLD and line["step"] > told.get(line["event"], -1):
                told[line["event"]] = line["step"]
                lines.append(line)
            if len(lines) == MOST_LINES:
                self._tracker.send(lines)
                lines = []
        file.seek(-len(text), os.SEEK_CUR)  # a line that is still being written
        if lines:
            self._tracker.send(lines)


def _identity(record: Path) -> tuple[str, dict[str, Any]]:
    """A run is known by when its record began; and its settings by their full names."""
    began, settings = "", {}
    for line in read_records(record):
        began = began or line["time"]
        if line["event"] == AttemptStarted.kind:
            settings = line["settings"]
    identity = "".join(character for character in began if character.isalnum())
    return identity, {f"{part}.{name}": value for part, named in settings.items() for name, value in named.items()}
