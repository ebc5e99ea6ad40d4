"""Ctrl+C and SIGTERM: an interruption while preparing, a wish to stop while training, an order the second time.

What is left to do after an order (saying where the run goes on, sending its record) may take seconds, and `fit()` may
still run: one more signal then ends the process on the spot.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import NoReturn

from savant_ray.errors import STOPPED_EARLY

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Before `patient` is set a signal raises KeyboardInterrupt; after it, the first one only sets `received`.

    Once `leaving` is set a signal ends the process.
    """

    def __init__(self) -> None:
        self.patient = False
        self.received = False
        self.leaving = False

    def install(self) -> None:
        """Takes over both signals; call again after `ray.init()`, which installs its own."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.leaving:
            os._exit(STOPPED_EARLY)
        if self.received or not self.patient:
            self.interrupt()
        self.received = True

    def interrupt(self) -> NoReturn:
        """Ends the launch at once."""
        self.leaving = True
        raise KeyboardInterrupt
