"""Phases of an attempt, and what Ctrl+C, SIGTERM, SIGHUP and SIGUSR1 do in each of them.

While workers have nothing to save, a signal raises KeyboardInterrupt. Once they train, the first signal requests a stop:
the current step is finished and saved. After a second Ctrl+C or SIGTERM the driver exits without waiting for the save. It
first prints from which checkpoint the run resumes and uploads the record, which may take seconds; a third Ctrl+C or
SIGTERM ends the process immediately.

A terminal that closes sends SIGHUP, often twice (from its shell and from the kernel), so a second SIGHUP has no effect, nor
has a second SIGUSR1, which batch systems such as Slurm send before they end a job. Under `nohup` SIGHUP remains ignored.
`timeout` sends SIGTERM twice within microseconds, to the command and to its process group, so a SIGTERM right after another
one has no effect either.

Once the workers have finished and their last step is saved, nothing can be lost: a signal then ends only the wait for Ray
Train, with the exit code of the run.
"""

from __future__ import annotations

import errno
import math
import os
import signal
import termios
import time
from enum import Enum, auto
from types import FrameType

from savant_ray.errors import STOPPED_EARLY
from savant_ray.events import AttemptEnded, AttemptStarted, Event, WorkersLost, WorkersStarted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
REPEAT_SECONDS = 1.0  # a SIGTERM this soon after another one is part of the same request


class Phase(Enum):
    """What an attempt is doing."""

    PREPARING = auto()
    """Settings, data and Ray are being prepared; no workers have been requested."""
    WAITING_FOR_WORKERS = auto()
    """Ray Train is to start workers, for the first time or after it lost some."""
    LOADING = auto()
    """Workers run but have not loaded the state of the run yet, so they have nothing to save."""
    TRAINING = auto()
    """Workers train."""
    STOP_REQUESTED = auto()
    """A signal has requested a stop, and the driver has not sent the request to the workers yet."""
    STOPPING = auto()
    """The workers finish their step and save it."""
    SAVED = auto()
    """The workers have finished, and their last step is saved; `fit()` has not returned yet."""
    EXITING = auto()
    """The process exits without waiting for workers."""


class Trigger(Enum):
    """What can end a phase."""

    FIT_STARTED = auto()
    WORKERS_STARTED = auto()
    TRAINING_STARTED = auto()
    WORKERS_LOST = auto()
    SIGNAL = auto()
    """SIGINT or SIGTERM."""
    NOTICE = auto()
    """SIGHUP or SIGUSR1."""
    REQUEST_SENT = auto()
    """The stop request has reached the bridge."""
    SAVED = auto()
    """The workers have finished and saved."""
    EXIT = auto()
    """The attempt has ended while `fit()` still runs."""


TRANSITIONS = {
    (Phase.PREPARING, Trigger.FIT_STARTED): Phase.WAITING_FOR_WORKERS,
    (Phase.WAITING_FOR_WORKERS, Trigger.WORKERS_STARTED): Phase.LOADING,
    (Phase.WAITING_FOR_WORKERS, Trigger.TRAINING_STARTED): Phase.TRAINING,
    (Phase.LOADING, Trigger.TRAINING_STARTED): Phase.TRAINING,
    (Phase.LOADING, Trigger.WORKERS_LOST): Phase.WAITING_FOR_WORKERS,
    (Phase.TRAINING, Trigger.WORKERS_LOST): Phase.WAITING_FOR_WORKERS,
    # A signal exits if there is nothing to save, otherwise requests a stop; a second one ends the wait for the save.
    (Phase.PREPARING, Trigger.SIGNAL): Phase.EXITING,
    (Phase.PREPARING, Trigger.NOTICE): Phase.EXITING,
    (Phase.WAITING_FOR_WORKERS, Trigger.SIGNAL): Phase.EXITING,
    (Phase.WAITING_FOR_WORKERS, Trigger.NOTICE): Phase.EXITING,
    (Phase.LOADING, Trigger.SIGNAL): Phase.EXITING,
    (Phase.LOADING, Trigger.NOTICE): Phase.EXITING,
    (Phase.TRAINING, Trigger.SIGNAL): Phase.STOP_REQUESTED,
    (Phase.TRAINING, Trigger.NOTICE): Phase.STOP_REQUESTED,
    (Phase.STOP_REQUESTED, Trigger.SIGNAL): Phase.EXITING,
    (Phase.STOPPING, Trigger.SIGNAL): Phase.EXITING,
    (Phase.STOP_REQUESTED, Trigger.REQUEST_SENT): Phase.STOPPING,
    # A stop ends early if the workers that could save were lost.
    (Phase.STOP_REQUESTED, Trigger.WORKERS_LOST): Phase.EXITING,
    (Phase.STOPPING, Trigger.WORKERS_LOST): Phase.EXITING,
    (Phase.TRAINING, Trigger.SAVED): Phase.SAVED,
    (Phase.STOP_REQUESTED, Trigger.SAVED): Phase.SAVED,
    (Phase.STOPPING, Trigger.SAVED): Phase.SAVED,
    (Phase.SAVED, Trigger.SIGNAL): Phase.EXITING,
} | {(phase, Trigger.EXIT): Phase.EXITING for phase in Phase}
"""The next phase; a pair that is not listed changes nothing."""

EVENT_TRIGGERS: dict[type[Event], Trigger] = {
    WorkersStarted: Trigger.WORKERS_STARTED,
    AttemptStarted: Trigger.TRAINING_STARTED,
    WorkersLost: Trigger.WORKERS_LOST,
}


class AttemptPhase:
    """The current phase of an attempt, and the signal handlers that change it."""

    def __init__(self) -> None:
        self.current = Phase.PREPARING
        self._last_sigterm = -math.inf  # by time.monotonic()

    def advance(self, trigger: Trigger) -> Phase:
        """Change the current phase as `trigger` requires, and return it."""
        while True:
            before = self.current
            after = TRANSITIONS.get((before, trigger), before)
            # Python runs signal handlers only at calls and when a loop repeats, so not between these two lines.
            if self.current is before:
                self.current = after
                return after

    def observe(self, event: Event) -> None:
        """Advance by an event of the workers; most events change nothing."""
        trigger = EVENT_TRIGGERS.get(type(event))
        if isinstance(event, AttemptEnded) and event.is_saved:
            trigger = Trigger.SAVED
        if trigger is not None:
            self.advance(trigger)

    def handle_signals(self) -> None:
        """Install the signal handlers; to be called again after `ray.init()`, which installs its own."""
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Advance by a signal; raise KeyboardInterrupt if the process has to exit because of it."""
        if number == signal.SIGHUP:
            silence_closed_terminal()
        if number == signal.SIGTERM:
            last, self._last_sigterm = self._last_sigterm, time.monotonic()
            if self._last_sigterm - last < REPEAT_SECONDS:
                return
        trigger = Trigger.NOTICE if number in (signal.SIGHUP, signal.SIGUSR1) else Trigger.SIGNAL
        before = self.current
        if before is not Phase.EXITING:
            if self.advance(trigger) is Phase.EXITING and before is not Phase.SAVED:
                raise KeyboardInterrupt
        elif trigger is Trigger.SIGNAL:
            os._exit(STOPPED_EARLY)


def silence_closed_terminal() -> None:
    """Redirect standard output and error to /dev/null if they are a terminal that was closed: each write would fail."""
    for descriptor in (1, 2):
        if _is_closed_terminal(descriptor):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)


def _is_closed_terminal(descriptor: int) -> bool:
    try:
        termios.tcgetattr(descriptor)
    except termios.error as error:
        return bool(error.args[0] == errno.EIO)  # ENOTTY: a file or a pipe
    return False
