"""Ctrl+C, SIGTERM and SIGHUP: an interruption while preparing, a request to stop while training.

A second Ctrl+C or SIGTERM leaves without saving. What is left to do then (saying where the run goes on, sending its
record) may take seconds, and `fit()` may still run: a third one ends the process on the spot.

A terminal that closes sends SIGHUP, often twice (from its shell and from the kernel), so a second one means no more than
the first. Under `nohup` it is ignored, and stays so.
"""

from __future__ import annotations

import errno
import os
import signal
import termios
from types import FrameType
from typing import NoReturn

from savant_ray.errors import STOPPED_EARLY

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """Before `patient` is set a signal raises KeyboardInterrupt; after it, the first one only sets `received`.

    Once `leaving` is set a signal ends the process.
    """

    def __init__(self) -> None:
        self.patient = False
        self.received = False
        self.leaving = False

    def install(self) -> None:
        """Takes over the signals; call again after `ray.init()`, which installs its own."""
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            silence_closed_terminal()
            if self.leaving or self.received:
                return
        if self.leaving:
            os._exit(STOPPED_EARLY)
        if self.received or not self.patient:
            self.interrupt()
        self.received = True

    def interrupt(self) -> NoReturn:
        """Ends the launch at once."""
        self.leaving = True
        raise KeyboardInterrupt


def silence_closed_terminal() -> None:
    """Redirect standard output and error to /dev/null where they are a terminal that is gone: each write would fail."""
    for descriptor in (1, 2):
        if _is_dead_terminal(descriptor):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)


def _is_dead_terminal(descriptor: int) -> bool:
    try:
        termios.tcgetattr(descriptor)
    except termios.error as error:
        return bool(error.args[0] == errno.EIO)  # ENOTTY: a file or a pipe
    return False
