"""The lock of a run folder, which ensures that at most one process trains a run.

It is a lock of the operating system (`flock`), which releases it when the process ends.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from savant_ray.errors import SavantError, SettingsError
from savant_ray.locations import free_name

LOCK = ".lock"
OLD = ".old"  # suffix of a run folder that was moved aside
RETRY_SECONDS = 0.5  # locking is retried for this time, because `is_in_use` of other processes locks the file briefly


def set_aside(path: Path, suffix: str) -> Path:
    """Append `suffix` to the name of a file or folder, and a number if that name is taken; return the new path."""
    return path.rename(free_name(f"{path}{suffix}", os.path.exists))


def is_in_use(run_folder: Path) -> bool:
    """Return whether a process trains this run."""
    try:
        with (run_folder / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is no lock file, or this user may not read it
        return False
    return False


def owner_token(run_folder: Path) -> str | None:
    """Return the token of the process that locked the folder last (see `locked`); None if the lock file has none."""
    try:
        lines = (run_folder / LOCK).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    return lines[1] if len(lines) > 1 else None


@contextmanager
def locked(run_folder: Path) -> Iterator[str]:
    """Create the folder if necessary and lock it within a `with` block; yield a unique token.

    Raises:
        SavantError: another process trains this run.
        SettingsError: the folder cannot be created or locked.
    """
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"run.storage_path: {run_folder} cannot be created: {error.strerror}") from error
    token = uuid.uuid4().hex
    with ExitStack() as stack:
        try:
            file = stack.enter_context(_locked_file(run_folder / LOCK))
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n{token}\n".encode())
        except OSError as error:
            raise SettingsError(_lock_error(run_folder / LOCK, error)) from error
        yield token


def _locked_file(path: Path) -> IO[bytes]:
    """Open and lock a file, creating it and its folder if necessary.

    The file is opened for each attempt to lock it, because `--fresh` of the process that holds the lock moves it aside.

    Raises:
        SavantError: another process still holds the lock after `RETRY_SECONDS`.
    """
    end = time.monotonic() + RETRY_SECONDS
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            file = stack.enter_context(path.open("ab+", buffering=0))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > end:
                    file.seek(0)
                    holder = file.readline().decode(errors="replace").strip() or "another process"
                    raise SavantError(
                        f"{path.parent} is in use by {holder}; stop that run first, or give this one another run.name"
                    ) from None
            else:
                if _is_at(file, path):
                    stack.pop_all()
                    return file
        time.sleep(RETRY_SECONDS / 10)


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Return whether `path` is still the path of an open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock_error(path: Path, error: OSError) -> str:
    match error.errno:
        case errno.ENOLCK | errno.ENOSYS | errno.EOPNOTSUPP:
            return (
                f"run.storage_path: {path} cannot be locked ({error.strerror}): its file system is mounted without locks; "
                "mount it with locks (NFS: a running lockd, without nolock; Lustre: -o flock), or choose another one"
            )
        case errno.EACCES | errno.EPERM:
            return (
                f"run.storage_path: {path} cannot be written ({error.strerror}): it belongs to {_owner_of(path)}; "
                "choose another run.name or run.storage_path, or change its permissions"
            )
    return f"run.storage_path: {path} cannot be written ({error.strerror})"


def _owner_of(path: Path) -> str:
    """Return the name of the user who owns a file or, if that is unknown, its folder."""
    for candidate in (path, path.parent):
        with suppress(OSError, KeyError):
            return candidate.owner()
    return "another user"
