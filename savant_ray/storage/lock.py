"""One run, one process: a run folder is locked while a run uses it.

The lock is the operating system's (`flock`), so a process that died holds none.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from savant_ray.errors import SavantError, SettingsError

LOCK = ".lock"
LOOK_SECONDS = 0.5  # `is_in_use` holds it for the time of a look


def move_run_aside(run_folder: Path) -> Path | None:
    """Renames the folder to the first free `<name>.old`, `<name>.old-2`, …; None: there was none.

    Raises:
        SavantError: another process trains this run.
    """
    if not run_folder.exists():
        return None
    with locked(run_folder):
        return set_aside(run_folder, ".old")


def set_aside(path: Path, suffix: str) -> Path:
    """Renames it to the first free name with that suffix, and a number from the second on."""
    return path.rename(free_name(f"{path}{suffix}", os.path.exists))


def free_name(wanted: str, is_taken: Callable[[str], bool]) -> str:
    """`wanted`, or with -2, -3, … the first that is free."""
    names = (wanted if number == 1 else f"{wanted}-{number}" for number in itertools.count(1))
    return next(name for name in names if not is_taken(name))


def is_in_use(run_folder: Path) -> bool:
    """Whether some process trains this run."""
    try:
        with (run_folder / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # never locked
        return False
    return False


def owner_token(run_folder: Path) -> str | None:
    """What the process that locked the folder last was given by `locked`; None: the lock file was removed."""
    try:
        lines = (run_folder / LOCK).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    return lines[1] if len(lines) > 1 else None


@contextmanager
def locked(run_folder: Path) -> Iterator[str]:
    """Holds the folder, which is made if need be, for the time of a `with` block, which gets a token of its own.

    Raises:
        SavantError: another process trains this run.
        SettingsError: the folder cannot be made, or not locked.
    """
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"run.storage_path: {run_folder} cannot be made: {error.strerror}") from error
    token = uuid.uuid4().hex
    with ExitStack() as held:
        try:
            file = held.enter_context((run_folder / LOCK).open("ab+", buffering=0))
            if not _take(file):
                file.seek(0)
                holder = file.readline().decode(errors="replace").strip() or "another process"
                raise SavantError(
                    f"{run_folder} is in use by {holder}; stop that run first, or give this one another run.name"
                )
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n{token}\n".encode())
        except OSError as error:
            raise SettingsError(_no_lock(run_folder / LOCK, error)) from error
        yield token


def _no_lock(path: Path, error: OSError) -> str:
    match error.errno:
        case errno.ENOLCK | errno.ENOSYS | errno.EOPNOTSUPP:
            return (
                f"run.storage_path: {path} cannot be locked ({error.strerror}): its file system has no locks here; "
                "mount it with locks (NFS: a running lockd, without nolock; Lustre: -o flock), or choose another one"
            )
        case errno.EACCES | errno.EPERM:
            return (
                f"run.storage_path: {path} cannot be written ({error.strerror}): it belongs to {_owner_of(path)}; "
                "choose another run.name or run.storage_path, or have its rights changed"
            )
    return f"run.storage_path: {path} cannot be written ({error.strerror})"


def _owner_of(path: Path) -> str:
    for each in (path, path.parent):
        with suppress(OSError, KeyError):
            return each.owner()
    return "another user"


def _take(file: IO[bytes]) -> bool:
    """Whether the lock is ours; who only looks at it for a moment is waited for."""
    end = time.monotonic() + LOOK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(LOOK_SECONDS / 10)
        else:
            return True
