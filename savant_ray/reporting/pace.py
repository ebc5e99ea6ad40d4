"""How long the rest will take."""

from __future__ import annotations

from collections import deque
from statistics import median

RECENT_STEPS = 100


class Pace:
    """Median of the recent steps, so that one slow step does not matter, plus the pauses' average share.

    Pauses (validation, checkpoints, the first compilation's aftermath) are what the wall clock shows beside the steps.
    """

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self._first: float | None = None
        self._steps, self._busy_seconds, self._elapsed = 0, 0.0, 0.0

    def observe(self, step_seconds: float, now: float) -> None:
        """A step that took `step_seconds` ended at `now`."""
        self._recent.append(step_seconds)
        if self._first is None:  # the first step also compiles and warms up: only its end counts
            self._first = now
            return
        self._steps += 1
        self._busy_seconds += step_seconds
        self._elapsed = now - self._first

    def seconds_left(self, steps: int) -> float | None:
        """The time `steps` more steps take; None before two steps were seen."""
        if not self._steps:
            return None
        pause = max(0.0, self._elapsed - self._busy_seconds) / self._steps
        return steps * (median(self._recent) + pause)
