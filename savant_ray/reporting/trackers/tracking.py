"""A thread that sends the record to a tracker in batches, so that a slow server does not slow down training.

The thread first asks the tracker for the last step that it has received (for each kind of line; W&B has one step for all
kinds), and sends later lines only. So lines that a failed server or a killed driver has left out are sent later, and
repeated steps are not sent twice. After an error it begins again.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from savant_ray.events import AttemptEnded, AttemptStarted, SampleGenerated
from savant_ray.reporting.record import parse_event, read_records
from savant_ray.reporting.tensorboard import NUMERIC_KINDS

SECONDS_BETWEEN_BATCHES = 5.0
RETRY_SECONDS = 60.0  # after an error
MAX_LINES = 500  # of a batch
CLOSE_TIMEOUT = 10.0  # seconds for the last lines when an attempt ends
SENT_KINDS = (*NUMERIC_KINDS, SampleGenerated.kind)
Line = dict[str, Any]


class Tracker(Protocol):
    """An experiment tracker."""

    def open(self, identity: str, settings: dict[str, Any]) -> dict[str, int]:
        """Open or create the run of that identity; return the last step that the tracker has of each kind of line."""

    def send(self, lines: list[Line]) -> None:
        """Send steps, validations, logic scores, checkpoints and samples."""

    def close(self, finished: bool) -> None:
        """Close the run at the end of the attempt; `finished` if training is complete."""


class TrackerFollower:
    """A `Follower` of the record that sends it to one tracker; an error delays the tracking and does not end the run."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self._name, self._tracker = name, tracker
        self._thread: threading.Thread | None = None
        self._reopen, self._ended, self._finished = False, threading.Event(), False
        self._warning = ""

    def begin(self, record: Path) -> None:
        """See `Follower`."""
        self._reopen = True
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, args=(record,), name=self._name, daemon=True)
            self._thread.start()

    def warning(self) -> str:
        """See `Follower`."""
        warning, self._warning = self._warning, ""
        return warning

    def close(self) -> None:
        """Send the remaining lines for at most `CLOSE_TIMEOUT` seconds."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(CLOSE_TIMEOUT)

    def _run(self, record: Path) -> None:
        reported = ""
        while True:
            is_last_try = self._ended.is_set()
            try:
                identity, settings = _identity(record)
                if not identity:
                    return  # an empty record
                self._follow(record, self._tracker.open(identity, settings))
                self._tracker.close(self._finished)
            except Exception as error:  # any error of the tracker's library
                reason = (str(error).strip().split("\n")[0] or type(error).__name__).removesuffix(".")
                if reason != reported:
                    self._warning = (
                        f"WARNING: nothing is sent to {self._name} now: {reason}. The record is complete; the missing lines "
                        "are sent as soon as that works, or when the same command is run again."
                    )
                reported = reason
                self._ended.wait(RETRY_SECONDS)
                if not is_last_try:
                    continue
            return

    def _follow(self, record: Path, last_steps: dict[str, int]) -> None:
        ended = False
        while not ended:
            self._reopen = False
            with record.open("rb") as file:
                while not (ended or self._reopen):
                    ended = self._ended.is_set()  # checked before reading, so that the lines before the end are sent
                    self._send_new(file, last_steps)
                    if not ended:
                        self._ended.wait(SECONDS_BETWEEN_BATCHES)

    def _send_new(self, file: BinaryIO, last_steps: dict[str, int]) -> None:
        lines: list[Line] = []
        while (text := file.readline()).endswith(b"\n"):
            line = parse_event(text)
            if line is not None and line["event"] in (AttemptStarted.kind, AttemptEnded.kind):
                self._finished = line["event"] == AttemptEnded.kind and line["finished"]
            if line is not None and line["event"] in SENT_KINDS and line["step"] > last_steps.get(line["event"], -1):
                last_steps[line["event"]] = line["step"]
                lines.append(line)
            if len(lines) == MAX_LINES:
                self._tracker.send(lines)
                lines = []
        file.seek(-len(text), os.SEEK_CUR)  # a line that is still being written
        if lines:
            self._tracker.send(lines)


def _identity(record: Path) -> tuple[str, dict[str, Any]]:
    """Return the run's identity (the time of its first event) and its settings by dotted name."""
    first_time, settings = "", {}
    for line in read_records(record):
        first_time = first_time or line["time"]
        if line["event"] == AttemptStarted.kind:
            settings = line["settings"]
    identity = "".join(character for character in first_time if character.isalnum())
    return identity, {
        f"{section}.{name}": value for section, values in settings.items() for name, value in values.items()
    }
