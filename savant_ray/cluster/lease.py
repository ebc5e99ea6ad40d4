"""One run, one process, where nothing can be locked: who trains a run in object storage says so there, again and again.

No clocks are compared. A mark that changes while one looks at it belongs to a run that lives; one that stays the same
for a while was left by a run that died.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import pyarrow.fs as pafs

from savant_ray.errors import SavantError

LEASE = ".lock"
BEAT_SECONDS = 5.0
SILENCE_SECONDS = 20.0  # after which its holder is taken for dead
SETTLE_SECONDS = 1.0  # of two that begin at once, the one whose mark is still there


@contextmanager
def leased(filesystem: pafs.FileSystem, path: str, say: Callable[[str], None]) -> Iterator[Lease]:
    """Holds the run for the time of a `with` block, or until another process took it for dead (`Lease.refuse_if_lost`).

    Raises:
        SavantError: another process trains this run.
        OSError: the storage cannot be written.
    """
    lease = Lease(filesystem, f"{path}/{LEASE}")
    lease.take(path, say)
    try:
        yield lease
    finally:
        lease.give_back()


class Lease:
    """The mark of this process."""

    def __init__(self, filesystem: pafs.FileSystem, path: str) -> None:
        self._filesystem, self._path = filesystem, path
        self._mark = dict[str, Any](token=uuid.uuid4().hex, process=os.getpid(), host=socket.gethostname(), beat=0)
        self._run, self._winner = "", dict[str, Any]()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def take(self, run: str, say: Callable[[str], None]) -> None:
        """Waits for a silent holder; raises SavantError where one is alive."""
        self._run = run
        holder = self._read()
        if holder and not _died_here(holder):
            say(f"{_named(holder)} may still train {run}; listening for {SILENCE_SECONDS:g} s …")
            if self._changes(holder):
                raise _in_use(run, holder)
        self._write()
        time.sleep(SETTLE_SECONDS)
        now = self._read()
        if now.get("token") != self._mark["token"]:
            raise _in_use(run, now)
        self._thread.start()

    def refuse_if_lost(self) -> None:
        """Raises SavantError where another process has taken the run over."""
        if self._winner:
            raise SavantError(
                f"{self._run} was not reached for {SILENCE_SECONDS:g} s or more, and {_named(self._winner)} has taken the "
                "run over meanwhile; this one has stopped and saves nothing. Go on with the other one, or stop it first."
            )

    def give_back(self) -> None:
        """Removes the mark, if it is still ours."""
        self._ended.set()
        self._thread.join()
        with suppress(OSError):
            if self._is_ours():
                self._filesystem.delete_file(self._path)

    def _beat(self) -> None:
        while not self._winner and not self._ended.wait(BEAT_SECONDS):
            self._mark["beat"] += 1
            with suppress(OSError):  # the next one will tell
                if self._is_ours():
                    self._write()

    def _is_ours(self) -> bool:
        """Nobody else's, that is: who removed it by hand has not taken the run."""
        there = self._read()
        if there and there.get("token") != self._mark["token"]:
            self._winner = there
        return not self._winner

    def _changes(self, holder: dict[str, Any]) -> bool:
        end = time.monotonic() + SILENCE_SECONDS
        while time.monotonic() < end:
            time.sleep(BEAT_SECONDS / 2)
            if (now := self._read()) != holder:
                return bool(now)  # none: it has just given it back
        return False

    def _read(self) -> dict[str, Any]:
        """The mark that is there, {} if there is none."""
        try:
            with self._filesystem.open_input_stream(self._path) as file:
                return dict(json.loads(file.read()))
        except (FileNotFoundError, ValueError):
            return {}

    def _write(self) -> None:
        with self._filesystem.open_output_stream(self._path) as file:
            file.write(json.dumps(self._mark).encode())


def _died_here(holder: dict[str, Any]) -> bool:
    return holder.get("host") == socket.gethostname() and not psutil.pid_exists(int(holder.get("process", 0)))


def _named(holder: dict[str, Any]) -> str:
    return f"process {holder.get('process', '?')} on {holder.get('host', 'another machine')}"


def _in_use(run: str, holder: dict[str, Any]) -> SavantError:
    return SavantError(f"{run} is in use by {_named(holder)}; stop that run first, or give this one another run.name")
