"""Recognizes workers that make no progress, and kills them, so that Ray Train restarts all from the newest checkpoint.

Every worker sends a heartbeat each second, with the newest mark of its training thread (`training/progress.py`). A worker
hangs if the mark stays the same, or if the heartbeats stop, for longer than the limit. If several hang, only those that the
others wait for are killed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal

from savant_ray.cluster.bridge import LatestHeartbeat, WorkerProgress
from savant_ray.cluster.session import check_ray_actors
from savant_ray.cluster.stuck_process import KilledProcess, kill_process, training_thread
from savant_ray.driver.phases import Phase
from savant_ray.errors import TrainingError
from savant_ray.events import AttemptStarted, Event, StepDone, WorkerHung, WorkersLost, WorkersStarted
from savant_ray.reporting.wording import duration
from savant_ray.training.progress import SLOW

MIN_SECONDS = 60.0  # smallest limit with `auto`
LIMIT_STEPS = 20  # the limit with `auto`, in median step times
RECENT_STEPS = 100  # in the median
SILENT_SECONDS = 10.0  # without a heartbeat: the process is stopped, or something holds its interpreter lock
ACTORS_CHECK_SECONDS = 10.0  # between two checks of Ray's actors, which take milliseconds
MAX_CHECK_SECONDS = 5.0  # a longer time between two checks means that this process was suspended
SHOWN_FRAMES = 8  # of the stack, in the message
COLLECTIVE_SECONDS = 3600.0  # timeout of a collective, for hangs that `HangWatch` has not ended earlier
RUNNING = (Phase.LOADING, Phase.TRAINING, Phase.STOP_REQUESTED, Phase.STOPPING)


def collective_timeout(hang_seconds: float | Literal["auto"] | None) -> float:
    """Return the timeout of collectives in seconds, after which gloo or NCCL ends a worker that waits for others.

    `HangWatch` ends most hangs earlier and names the worker that the others wait for. Its limit is longer than this timeout
    only while that worker reads or writes checkpoints, and with `auto` if steps are long (more than 3 minutes; 18 s while it
    starts, compiles, begins to read its sequences or validates). With null there is no limit. The timeout also limits how
    long workers wait for each other when they start.
    """
    if hang_seconds in ("auto", None):
        return COLLECTIVE_SECONDS
    return max(COLLECTIVE_SECONDS, 2 * SLOW * float(hang_seconds))


@dataclass(frozen=True)
class StuckWorker:
    """A worker that hangs."""

    progress: WorkerProgress
    seconds: float  # without progress
    waits_for: tuple[int, ...]  # ranks that have not sent a heartbeat yet


@dataclass
class _Observed:
    """The newest heartbeat of a worker, when it arrived, and when the worker last made progress."""

    heartbeat: LatestHeartbeat
    last_heartbeat_time: float
    last_progress_time: float

    @property
    def position(self) -> int:
        """Return how far the rank is: 2 per collective that it has entered, minus 1 while it waits in the newest one."""
        progress = self.heartbeat.progress
        return 2 * progress.collectives - progress.waits


class HangWatch:
    """Watches the workers of an attempt.

    Args:
        hang_seconds: `scaling.hang_seconds`.
        emit: adds an event to the run's report.
        kill: as `kill_process`.
        clock: returns a time in seconds.
    """

    def __init__(
        self,
        hang_seconds: float | Literal["auto"] | None,
        emit: Callable[[Event], None],
        kill: Callable[[int, float, str], KilledProcess | None] = kill_process,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._setting, self._emit, self._kill, self._clock = hang_seconds, emit, kill, clock
        self._step_seconds: deque[float] = deque(maxlen=RECENT_STEPS)
        self._last_step = 0
        self._observed: dict[int, _Observed] = {}  # by rank
        self._started_ranks: set[int] = set()  # those that have sent a heartbeat
        self._last_check = clock()
        self._time = 0.0  # seconds observed so far, without those in which this process was suspended
        self._actors_checked = 0.0
        self._kill_time: float | None = None  # when workers were killed; None once Ray Train has reported their loss
        self.reason = ""  # why workers were killed; "" if none were since the workers last started

    def observe(self, event: Event) -> Event:
        """Process an event of the workers and return it, with the reason if they were lost because of a hang."""
        match event:
            case StepDone():
                self._step_seconds.append(event.step_seconds)
                self._last_step = event.step
            case AttemptStarted():
                self._last_step = event.step
            case WorkersStarted():
                self.reason = ""
                self._forget()
            case WorkersLost():
                was_killed = self._kill_time is not None
                self._forget()
                if was_killed:
                    return replace(event, text=self.reason)
        return event

    @property
    def limit(self) -> float | None:
        """Return after how many seconds without progress a worker counts as hanging; None: never."""
        if self._setting == "auto":
            return max(MIN_SECONDS, LIMIT_STEPS * median(self._step_seconds)) if self._step_seconds else MIN_SECONDS
        return self._setting

    def check(self, phase: Phase, workers: Sequence[LatestHeartbeat]) -> None:
        """Kill workers that hang; to be called at short intervals.

        Raises:
            TrainingError: a worker that hangs cannot be killed; or Ray Train does not notice that it was killed; or an actor
                that training needs (the bridge, Ray Train's controller) is stopped (SIGSTOP).
        """
        now = self._clock()
        self._time += min(now - self._last_check, MAX_CHECK_SECONDS)
        self._last_check = now
        if self._time > self._actors_checked + ACTORS_CHECK_SECONDS:
            self._actors_checked = self._time
            check_ray_actors()  # if Ray Train's controller is stopped, all workers wait when they save
        limit = self.limit
        if limit is None or phase not in RUNNING:
            self._forget()
            return
        if self._kill_time is not None:
            if self._time - self._kill_time > max(limit, MIN_SECONDS):
                raise TrainingError(
                    f"{self.reason}. Ray did not restart it: its process still runs, or its node or Ray Train's controller "
                    "does not answer.\n"
                    "Run the same command again to resume from the last checkpoint."
                )
            return
        self._update(workers)
        self._kill_workers(self._stuck(limit))

    def _update(self, workers: Sequence[LatestHeartbeat]) -> None:
        ranks = {heartbeat.progress.rank for heartbeat in workers}
        self._observed = {rank: worker for rank, worker in self._observed.items() if rank in ranks}
        for heartbeat in workers:
            progress = heartbeat.progress
            self._started_ranks.add(progress.rank)
            earlier = self._observed.get(progress.rank)
            if earlier is None or earlier.heartbeat.progress.actor_id != progress.actor_id:
                self._observed[progress.rank] = _Observed(heartbeat, self._time, self._time)
                continue
            if earlier.heartbeat.progress.marks != progress.marks:
                earlier.last_progress_time = self._time
            if earlier.heartbeat.number != heartbeat.number:
                earlier.last_heartbeat_time = self._time
            earlier.heartbeat = heartbeat

    def _stuck(self, limit: float) -> list[StuckWorker]:
        """Return the hanging workers that the others wait for.

        The candidates are the silent workers, if there are any; otherwise all running ones if a rank has not sent a
        heartbeat yet, because its process id is not known; otherwise those that are furthest behind in the collectives.
        """
        running = [worker for worker in self._observed.values() if not worker.heartbeat.progress.finished]
        silent = [worker for worker in running if self._time - worker.last_heartbeat_time > SILENT_SECONDS]
        first_position = min((worker.position for worker in running), default=0)
        world_size = max((worker.heartbeat.progress.world_size for worker in running), default=0)
        missing = tuple(rank for rank in range(world_size) if rank not in self._started_ranks)
        stuck = []
        for worker in silent or [worker for worker in running if missing or worker.position == first_position]:
            progress, seconds = worker.heartbeat.progress, self._time - worker.last_progress_time
            # A silent process gets the plain limit: heartbeats do not depend on its training thread.
            limit_factor = 1.0 if silent else min(progress.limit_factor, SLOW) if missing else progress.limit_factor
            if seconds > limit * limit_factor:
                stuck.append(StuckWorker(progress, seconds, () if silent else missing))
        return stuck

    def _kill_workers(self, stuck: Sequence[StuckWorker]) -> None:
        for worker in stuck:
            progress = worker.progress
            try:
                killed = self._kill(progress.pid, progress.process_started, progress.node_id)
            except ProcessLookupError:  # Ray Train has just ended it
                del self._observed[progress.rank]
                continue
            self._kill_time = self._time
            self.reason = _reason(worker, killed)
            self._emit(
                WorkerHung(
                    rank=progress.rank,
                    after_step=self._last_step,
                    seconds=worker.seconds,
                    activity=_activity(worker),
                    process=_process(worker, killed),
                    stack=killed.stack if killed else "",
                    text=_message(worker, killed, self._last_step),
                )
            )

    def _forget(self) -> None:
        self._observed.clear()
        self._started_ranks.clear()
        self._kill_time = None


def _activity(worker: StuckWorker) -> str:
    if worker.waits_for:
        ranks = ", ".join(map(str, worker.waits_for))
        return f"waiting for worker{'s' if len(worker.waits_for) > 1 else ''} {ranks} (no heartbeat yet)"
    return "waiting for the other workers" if worker.progress.waits else worker.progress.activity


def _process(worker: StuckWorker, killed: KilledProcess | None) -> str:
    state = "its node does not answer" if killed is None else killed.state
    return f"process {worker.progress.pid} on {worker.progress.host}, {state}"


def _reason(worker: StuckWorker, killed: KilledProcess | None) -> str:
    state = " (its process was stopped)" if killed is not None and killed.state in ("stopped", "tracing-stop") else ""
    end = "was killed" if killed is not None and not killed.not_killed else "could not be killed"
    why = f" ({killed.not_killed})" if killed is not None and killed.not_killed else ""
    return f"worker {worker.progress.rank} made no progress for {duration(worker.seconds)}{state} and {end}{why}"


def _message(worker: StuckWorker, killed: KilledProcess | None, last_step: int) -> str:
    """Return the message for the user, with the innermost frames of the training thread."""
    lines = [f"{_reason(worker, killed)}: {_activity(worker)} after step {last_step:,}, {_process(worker, killed)}"]
    if killed is not None and (frames := training_thread(killed.stack)):
        lines += [f"    {frame}" for frame in frames[:SHOWN_FRAMES]]
        lines += ["    … (metrics.jsonl has the complete stack)"] if len(frames) > SHOWN_FRAMES else []
    elif killed is not None:
        lines.append(
            f"    its Python stack could not be read ({killed.note})" if killed.note else f"    {killed.stack}"
        )
    return "\n".join(lines)
