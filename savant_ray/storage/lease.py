"""One run, one process, where nothing can be locked: a lease in object storage, renewed by the process that trains.

The lease is one small object, `.lock`. Where the storage has conditional writes (`conditional.py`), it is created,
renewed and taken over by compare-and-swap, so that of any number of processes exactly one gets it. Elsewhere the last
writer wins, and who finds its own mark again after a moment goes on. No clocks are compared: a mark that changes while
one looks at it belongs to a living process; one that stays the same for `SILENCE_SECONDS` was left by a dead one.

Workers outlive a driver that was cut off. `Owner` is the fencing token that they get: its `epoch` grows whenever
workers of an earlier owner may still write, and is part of the names that are written (`object_storage.py`).
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.fs as pafs

from savant_ray.errors import SavantError
from savant_ray.storage.conditional_write import (
    ConditionalObject,
    Conflict,
    NotConditional,
    PlainObject,
    SharedObject,
    conditional_object,
)

LEASE = ".lock"
BEAT_SECONDS = 5.0
SILENCE_SECONDS = 20.0  # after which its holder is taken for dead
SETTLE_SECONDS = 1.0  # without conditional writes: of two that begin at once, the one whose mark is still there


@dataclass(frozen=True)
class Owner:
    """Who may write the run; sent to workers as plain values."""

    token: str
    epoch: int = 0


@contextmanager
def leased(filesystem: pafs.FileSystem, path: str, say: Callable[[str], None], least_epoch: int = 0) -> Iterator[Lease]:
    """Hold the run for the time of a `with` block, or until another process took it for dead (`Lease.refuse_if_lost`).

    Raises:
        SavantError: another process trains this run.
        OSError: the storage cannot be written.
    """
    lease = Lease(filesystem, f"{path}/{LEASE}")
    lease.take(path, say, least_epoch)
    try:
        yield lease
    finally:
        lease.give_back()


def refuse_if_superseded(filesystem: pafs.FileSystem, path: str, owner: Owner) -> None:
    """Read the lease of the run at `path`.

    Raises:
        SavantError: another process has taken the run over.
        OSError: the storage is not reached.
    """
    there = _parsed(PlainObject(filesystem, f"{path}/{LEASE}").read()[0])
    if there and there.get("token") != owner.token:
        raise superseded(path, there)


def superseded(run: str, winner: dict[str, Any]) -> SavantError:
    """The refusal of a process that no longer owns the run."""
    return SavantError(
        f"{run} was not reached for {SILENCE_SECONDS:g} s or more, and {_named(winner)} has taken the "
        "run over meanwhile; this one has stopped and saves nothing. Go on with the other one, or stop it first."
    )


class Lease:
    """The mark of this process."""

    def __init__(self, filesystem: pafs.FileSystem, path: str) -> None:
        self.workers_may_live = False  # when it is given back
        self._filesystem, self._path = filesystem, path
        self._object: SharedObject = PlainObject(filesystem, path)
        self._version: Any = None
        self._mark = dict[str, Any](token=uuid.uuid4().hex, process=os.getpid(), host=socket.gethostname(), beat=0)
        self._mark |= {"machine": _machine(), "epoch": 0}
        self._run, self._winner = "", dict[str, Any]()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    @property
    def owner(self) -> Owner:
        """The fencing token of this process and its workers."""
        return Owner(self._mark["token"], self._mark["epoch"])

    def take(self, run: str, say: Callable[[str], None], least_epoch: int = 0) -> None:
        """Wait for a silent holder, and take its place.

        Raises:
            SavantError: another process trains this run.
            OSError: the storage cannot be written.
        """
        self._run = run
        self._object = self._conditional(say) or self._object
        holder = self._read()
        if holder and not _is_released(holder) and not _died_here(holder):
            say(f"{_named(holder)} may still train {run}; listening for {SILENCE_SECONDS:g} s …")
            holder = self._listen(holder)
        self._mark["epoch"] = max(least_epoch, _next_epoch(holder))
        try:
            won = self._write()
        except NotConditional as error:
            self._give_up_conditions(str(error), say)
            won = self._write()
        if won and not self._is_enforced():
            if isinstance(self._object, ConditionalObject):
                self._give_up_conditions("the server ignores their headers", say)
                self._write()
            time.sleep(SETTLE_SECONDS)
        there = self._read()
        if there.get("token") != self._mark["token"]:
            raise _in_use(run, there)
        self._thread.start()

    def refuse_if_lost(self) -> None:
        """Raise SavantError if another process has taken the run over."""
        if self._winner:
            raise superseded(self._run, self._winner)

    def give_back(self) -> None:
        """Release the lease, if it is still ours. The object stays where it has an epoch to tell: that never decreases."""
        self._ended.set()
        self._thread.join()
        self._mark["released"] = "workers may live" if self.workers_may_live else "clean"
        with suppress(OSError):
            if not self._is_ours():
                return
            if _next_epoch(self._mark) == 0:
                self._filesystem.delete_file(self._path)
            else:
                self._write()

    def _is_enforced(self) -> bool:
        """Whether nobody can replace our mark unseen, and it is where workers read it, with a client of their own."""
        there = _parsed(PlainObject(self._filesystem, self._path).read()[0])
        return there.get("token") == self._mark["token"] and self._object.is_conditional(self._encoded())

    def _beat(self) -> None:
        while not self._winner and not self._ended.wait(BEAT_SECONDS):
            self._mark["beat"] += 1
            with suppress(OSError):  # tried again at the next beat
                if self._is_ours() and not self._write():
                    self._is_ours()

    def _is_ours(self) -> bool:
        """Whether nobody else has taken it; a mark that somebody removed by hand counts as ours."""
        there = self._read()
        if there and there.get("token") != self._mark["token"]:
            self._winner = there
        return not self._winner

    def _listen(self, holder: dict[str, Any]) -> dict[str, Any]:
        """Return the mark once it is released or was silent for long enough; raise SavantError if it is renewed."""
        end = time.monotonic() + SILENCE_SECONDS
        while time.monotonic() < end:
            time.sleep(BEAT_SECONDS / 2)
            if (now := self._read()) != holder:
                if now and not _is_released(now):
                    raise _in_use(self._run, now)
                return now or holder
        return holder

    def _conditional(self, say: Callable[[str], None]) -> ConditionalObject | None:
        """The object with conditional writes, if there is a client for them that reaches it."""
        try:
            found = conditional_object(self._filesystem, self._path)
            if found is not None:
                found.read()
        except OSError as error:
            self._read()  # raises where nobody reaches it
            self._give_up_conditions(str(error), say)
            return None
        return found

    def _give_up_conditions(self, reason: str, say: Callable[[str], None]) -> None:
        say(
            f"{self._run}: no conditional writes ({reason}), so of two processes that start this run within "
            f"{SETTLE_SECONDS:g} s or with slow writes both may go on; start it once"
        )
        self._object, self._version = PlainObject(self._filesystem, self._path), None

    def _read(self) -> dict[str, Any]:
        """The mark that is there, {} if there is none."""
        content, self._version = self._object.read()
        return _parsed(content)

    def _write(self) -> bool:
        """Whether our mark replaced the one that was read last."""
        try:
            self._version = self._object.write(self._encoded(), self._version)
        except Conflict:  # also where an answer got lost, and the request was sent again
            return bool(self._read().get("token") == self._mark["token"])
        return True

    def _encoded(self) -> bytes:
        return json.dumps(self._mark).encode()


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        mark = json.loads(content)
    except ValueError:
        return {}
    return mark if isinstance(mark, dict) else {}


def _is_released(holder: dict[str, Any]) -> bool:
    return bool(holder.get("released"))


def _next_epoch(holder: dict[str, Any]) -> int:
    """The same after an owner whose workers had ended; it grows where some may still write."""
    epoch = holder.get("epoch", 0)
    epoch = epoch if isinstance(epoch, int) else 0
    return epoch + 1 if holder and holder.get("released") != "clean" else epoch


def _died_here(holder: dict[str, Any]) -> bool:
    """Whether it was a process of this machine, which runs no more."""
    if holder.get("host") != socket.gethostname() or holder.get("machine", _machine()) != _machine():
        return False
    process = holder.get("process")
    return isinstance(process, int) and not psutil.pid_exists(process)


def _machine() -> str:
    """What tells machines of one name apart, and containers with process numbers of their own; "" if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _named(holder: dict[str, Any]) -> str:
    return f"process {holder.get('process', '?')} on {holder.get('host', 'another machine')}"


def _in_use(run: str, holder: dict[str, Any]) -> SavantError:
    return SavantError(f"{run} is in use by {_named(holder)}; stop that run first, or give this one another run.name")
