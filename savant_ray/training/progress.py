"""Progress marks of this process's training thread; the driver detects hangs from them.

The thread marks each unit of its work, such as a micro-batch or a token of an answer. Another thread sends the newest mark
to the driver (`worker/host.py`), which compares those of all ranks (`driver/hang_watch.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# Factors of the usual time limit.
SLOW = 10.0  # starting, compiling, validating, the first reading of sequences
STORAGE = 60.0  # reading and writing checkpoints: storage may be slow, and has time limits of its own


@dataclass(frozen=True)
class Mark:
    """The newest mark of a training thread."""

    number: int  # of marks in this process so far
    activity: str  # for messages: "computing"
    limit_factor: float  # factor of the usual time limit until the next mark
    collectives: int  # that this rank has entered so far; the same sequence on all ranks
    waits: bool  # whether it may be waiting for the other ranks in the newest of them
    finished: bool = False  # no more marks will follow


class Progress:
    """The marks of the training thread; other threads may only read `newest`."""

    def __init__(self) -> None:
        self.newest = Mark(0, "starting", SLOW, 0, False)
        self._activity, self._limit_factor = "starting", SLOW
        self._compiles = True

    def begin(self, activity: str, limit_factor: float = 1.0) -> None:
        """Mark the beginning of an activity whose units may take `limit_factor` times the usual limit."""
        self._activity, self._limit_factor = activity, limit_factor
        self.mark()

    def mark(self) -> None:
        """Mark that a unit of the current activity begins or has ended."""
        limit_factor = max(self._limit_factor, SLOW) if self._compiles else self._limit_factor
        self.newest = replace(
            self.newest, number=self.newest.number + 1, activity=self._activity, limit_factor=limit_factor, waits=False
        )

    def enter_collective(self) -> None:
        """Mark the beginning of an operation that waits for all ranks; it counts as unfinished until the next mark."""
        self.newest = replace(
            self.newest, number=self.newest.number + 1, collectives=self.newest.collectives + 1, waits=True
        )

    def expect_compilation(self) -> None:
        """Allow `SLOW` times the usual limit until the end of the next step."""
        self._compiles = True

    def end_step(self) -> None:
        """Mark the end of a step."""
        self._compiles = False
        self.mark()

    def finish(self) -> None:
        """Mark the end of training in this process."""
        self.newest = replace(self.newest, number=self.newest.number + 1, finished=True)


PROGRESS = Progress()
"""The marks of this process, which has one training thread."""
