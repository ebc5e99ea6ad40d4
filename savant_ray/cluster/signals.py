"""Ctrl+C and SIGTERM: an interruption while preparing, a wish to stop while training, an order the second time."""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Before `patient` is set a signal raises KeyboardInterrupt; after it, the first one only sets `received`."""

    def __init__(self) -> None:
        self.patient = False
        self.received = False

    def install(self) -> None:
        """Takes over both signals; call again after `ray.init()`, which installs its own."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received or not self.patient:
            raise KeyboardInterrupt
        self.received = True
