"""One run, one process: a run folder is locked while a run uses it.

The lock is the operating system's (`flock`), so a process that died holds none.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from savant_ray.errors import SavantError

LOCK = ".lock"


@contextmanager
def locked(run_folder: Path) -> Iterator[None]:
    """Holds the folder, which is made if need be, for the time of a `with` block.

    Raises:
        SavantError: another process trains this run.
    """
    run_folder.mkdir(parents=True, exist_ok=True)
    with (run_folder / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise SavantError(
                f"{run_folder} is in use by {file.read().strip() or 'another process'}; stop that run first, "
                "or give this one another run.name"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
