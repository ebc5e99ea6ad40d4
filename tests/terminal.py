"""Commands in a pseudo-terminal."""

from __future__ import annotations

import os
import pty
import select
import time
from pathlib import Path


def start_in_terminal(command: list[str], folder: Path, variables: dict[str, str]) -> tuple[int, int]:
    """Start a command in a pseudo-terminal; return its process id and the terminal's file descriptor."""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder)
        os.execve(command[0], command, variables)
    return process, terminal


def read_until(terminal: int, words: str, seconds: float, before: str = "") -> str:
    """Return what the terminal shows until these words are there; `before` has been read earlier."""
    shown, deadline = b"", time.monotonic() + seconds
    while words not in before + shown.decode(errors="replace"):
        assert time.monotonic() < deadline, before + shown.decode(errors="replace")
        if select.select([terminal], [], [], 1)[0]:
            shown += os.read(terminal, 4096)
    return shown.decode(errors="replace")


def ended(process: int) -> int:
    """Wait for the end of a process; return its exit code, or minus the number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
