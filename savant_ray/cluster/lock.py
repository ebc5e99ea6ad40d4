"""One run, one process: a run folder is locked while a run uses it.

The lock is the operating system's (`flock`), so a process that died holds none.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@contextmanager
def locked(run_folder: Path) -> Iterator[None]:
    """Holds the folder, which is made if need be, for the time of a `with` block.

    Raises:
        SavantError: another process trains this run.
        SettingsError: the folder cannot be made.
    """
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"run.storage_path: {run_folder} cannot be made: {error.strerror}") from error
    with (run_folder / LOCK).open("a+") as file:
        if not _take(file):
            file.seek(0)
            raise SavantError(
                f"{run_folder} is in use by {file.read().strip() or 'another process'}; stop that run first, "
                "or give this one another run.name"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _take(file: IO[str]) -> bool:
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
