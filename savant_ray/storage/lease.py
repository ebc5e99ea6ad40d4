"""The lock of a run in object storage: a lease, renewed by the process that trains.

The lease is a small JSON object, `.lock`, that contains the claim of its holder. If the storage supports conditional
writes (`conditional_write.py`), the lease is created, renewed and taken over by compare-and-swap, so that exactly one of
any number of processes acquires it. Otherwise the last writer acquires it: each process writes its claim, waits for
`SETTLE_SECONDS`, and continues only if it then reads its own claim.

Clocks of different machines are not compared. A claim that changes while another process watches it belongs to a running
process; a claim that stays the same for `EXPIRY_SECONDS` has expired.

Workers can outlive a driver that lost its connection. `Owner` is their fencing token. The `epoch` in it is incremented
whenever workers of an earlier owner may still write, and is part of the names of checkpoints (`object_store.py`).
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
    ConditionsNotSupportedError,
    PlainObject,
    SharedObject,
    VersionConflictError,
    conditional_object,
)

LEASE = ".lock"
RENEWAL_SECONDS = 5.0
EXPIRY_SECONDS = 20.0  # an unchanged claim is treated as that of a dead process after this time
SETTLE_SECONDS = 1.0  # without conditional writes: time between writing a claim and checking that it is still there


@dataclass(frozen=True)
class Owner:
    """Fencing token of the process that may write a run: a random ID and an epoch. Workers get it as plain values."""

    token: str
    epoch: int = 0


@contextmanager
def leased(filesystem: pafs.FileSystem, path: str, log: Callable[[str], None], min_epoch: int = 0) -> Iterator[Lease]:
    """Hold the lease of the run at `path` within a `with` block.

    The epoch is at least `min_epoch`. If this process cannot renew the lease, another one may take it over; see
    `Lease.refuse_if_lost`.

    Raises:
        SavantError: another process trains this run.
        OSError: the storage cannot be written.
    """
    lease = Lease(filesystem, path)
    lease.acquire(log, min_epoch)
    try:
        yield lease
    finally:
        lease.release()


def refuse_if_superseded(filesystem: pafs.FileSystem, path: str, owner: Owner) -> None:
    """Read the lease of the run at `path` and compare it with the owner's token.

    Raises:
        SavantError: another process has taken the run over.
        OSError: the storage cannot be read.
    """
    claim = _parse(PlainObject(filesystem, f"{path}/{LEASE}").read()[0])
    if claim and claim.get("token") != owner.token:
        raise _superseded_error(path, claim)


class Lease:
    """The lease of the run at `path`, and the claim of this process to it.

    The owner sets `workers_may_live` if its workers may still write after the lease is released.
    """

    def __init__(self, filesystem: pafs.FileSystem, path: str) -> None:
        self.workers_may_live = False
        self._run, self._filesystem, self._path = path, filesystem, f"{path}/{LEASE}"
        self._object: SharedObject = PlainObject(filesystem, self._path)
        self._version: Any = None  # of the object as it was last read or written
        self._claim: dict[str, Any] = {
            "token": uuid.uuid4().hex,
            "process": os.getpid(),
            "host": socket.gethostname(),
            "beat": 0,  # incremented by each renewal
            "machine": _machine(),
            "epoch": 0,
        }
        self._new_owner = dict[str, Any]()  # the claim of a process that took the run over
        self._released = threading.Event()
        self._renewal = threading.Thread(target=self._renew, name="lease", daemon=True)

    @property
    def owner(self) -> Owner:
        """Fencing token of this process and its workers."""
        return Owner(self._claim["token"], self._claim["epoch"])

    def acquire(self, log: Callable[[str], None], min_epoch: int = 0) -> None:
        """Write the claim of this process; if there is another holder, wait first until its claim has expired.

        The epoch of the claim is at least `min_epoch`.

        Raises:
            SavantError: another process trains this run.
            OSError: the storage cannot be written.
        """
        self._object = self._conditional_object(log) or self._object
        holder = self._read()
        if holder and not _is_released(holder) and not _is_dead_local_process(holder):
            log(f"{_process(holder)} may still train {self._run}; watching its lease for {EXPIRY_SECONDS:g} s …")
            holder = self._wait_for_expiry(holder)
        self._claim["epoch"] = max(min_epoch, _next_epoch(holder))
        try:
            written = self._write()
        except ConditionsNotSupportedError as error:
            self._continue_without_conditions(str(error), log)
            written = self._write()
        if written and not self._conditions_work():
            if isinstance(self._object, ConditionalObject):
                self._continue_without_conditions("the server ignores their headers", log)
                self._write()
            time.sleep(SETTLE_SECONDS)  # without conditions, the process that writes last acquires the lease
        holder = self._read()
        if holder.get("token") != self._claim["token"]:
            raise _in_use_error(self._run, holder)
        self._renewal.start()

    def refuse_if_lost(self) -> None:
        """Raise SavantError if another process has taken the run over; does not read the storage."""
        if self._new_owner:
            raise _superseded_error(self._run, self._new_owner)

    def release(self) -> None:
        """Release the lease if it is still held.

        Epochs must never decrease, and an owner that finds no lease begins at epoch 0. The object is therefore deleted only
        if the next owner's epoch is 0.
        """
        self._released.set()
        self._renewal.join()
        self._claim["released"] = "workers may live" if self.workers_may_live else "clean"
        with suppress(OSError):
            if not self._is_held():
                return
            if _next_epoch(self._claim) == 0:
                self._filesystem.delete_file(self._path)
            else:
                self._write()

    def _renew(self) -> None:
        while not self._new_owner and not self._released.wait(RENEWAL_SECONDS):
            self._claim["beat"] += 1
            with suppress(OSError):  # retried at the next renewal
                if self._is_held() and not self._write():
                    self._is_held()  # another process has written in between: store its claim in `_new_owner`

    def _is_held(self) -> bool:
        """Return whether no other process has taken the lease over, and store the claim of one that has.

        A lease that was deleted by hand is still held.
        """
        holder = self._read()
        if holder and holder.get("token") != self._claim["token"]:
            self._new_owner = holder
        return not self._new_owner

    def _wait_for_expiry(self, holder: dict[str, Any]) -> dict[str, Any]:
        """Return the last claim when it is released or has expired; raise SavantError if it is renewed."""
        end = time.monotonic() + EXPIRY_SECONDS
        while time.monotonic() < end:
            time.sleep(RENEWAL_SECONDS / 2)
            if (claim := self._read()) != holder:
                if claim and not _is_released(claim):
                    raise _in_use_error(self._run, claim)
                return claim or holder
        return holder

    def _conditional_object(self, log: Callable[[str], None]) -> ConditionalObject | None:
        """Return the object with conditional writes; None if the storage does not have them or its client cannot read."""
        try:
            candidate = conditional_object(self._filesystem, self._path)
            if candidate is not None:
                candidate.read()
        except OSError as error:
            self._read()  # raises if pyarrow cannot reach the storage either
            self._continue_without_conditions(str(error), log)
            return None
        return candidate

    def _conditions_work(self) -> bool:
        """Return whether the storage enforces conditions, and the claim is also read by pyarrow, which the workers use."""
        if not isinstance(self._object, ConditionalObject):
            return False
        claim = _parse(PlainObject(self._filesystem, self._path).read()[0])
        return claim.get("token") == self._claim["token"] and self._object.is_conditional(self._encoded())

    def _continue_without_conditions(self, reason: str, log: Callable[[str], None]) -> None:
        """Use an object without conditional writes from now on, and log the reason and the risk."""
        log(
            f"{self._run}: no conditional writes ({reason}). Start this run once only: two processes that start it within "
            f"{SETTLE_SECONDS:g} s, or with slow writes, could both train it"
        )
        self._object, self._version = PlainObject(self._filesystem, self._path), None

    def _read(self) -> dict[str, Any]:
        """Return the stored claim; {} if there is none."""
        content, self._version = self._object.read()
        return _parse(content)

    def _write(self) -> bool:
        """Write this process's claim; return whether it replaced the version that was read or written last."""
        try:
            self._version = self._object.write(self._encoded(), self._version)
        except VersionConflictError:  # also if the client retried a write whose response was lost
            return bool(self._read().get("token") == self._claim["token"])
        return True

    def _encoded(self) -> bytes:
        return json.dumps(self._claim).encode()


def _parse(content: bytes) -> dict[str, Any]:
    """Return the claim in the content of a lease; {} if the content is empty or invalid."""
    try:
        claim = json.loads(content)
    except ValueError:
        return {}
    return claim if isinstance(claim, dict) else {}


def _is_released(claim: dict[str, Any]) -> bool:
    return bool(claim.get("released"))


def _next_epoch(claim: dict[str, Any]) -> int:
    """Return the epoch of the next owner: one more than the claim's if workers of its process may still write.

    That is the case unless the process has released its claim as "clean".
    """
    epoch = claim.get("epoch", 0)
    epoch = epoch if isinstance(epoch, int) else 0
    return epoch + 1 if claim and claim.get("released") != "clean" else epoch


def _is_dead_local_process(claim: dict[str, Any]) -> bool:
    """Return whether the claim is that of a process of this machine that does not exist any more."""
    if claim.get("host") != socket.gethostname() or claim.get("machine", _machine()) != _machine():
        return False
    process = claim.get("process")
    return isinstance(process, int) and not psutil.pid_exists(process)


def _machine() -> str:
    """Return an ID that differs between machines with the same host name and between PID namespaces; "" if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _process(claim: dict[str, Any]) -> str:
    return f"process {claim.get('process', '?')} on {claim.get('host', 'another machine')}"


def _in_use_error(run: str, holder: dict[str, Any]) -> SavantError:
    return SavantError(f"{run} is in use by {_process(holder)}; stop that run first, or give this one another run.name")


def _superseded_error(run: str, new_owner: dict[str, Any]) -> SavantError:
    return SavantError(
        f"the lease of {run} was not renewed for {EXPIRY_SECONDS:g} s, and {_process(new_owner)} has taken the run over; "
        "this process has stopped and saves nothing. Continue with the other process, or stop it first."
    )
