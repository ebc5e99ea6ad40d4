"""An actor that carries events and heartbeats from workers to the driver and the stop request from the driver to workers.

`ray.train.report()` is a barrier over all ranks and is limited to one call per health check, so per-step metrics use this
actor instead: a worker's call does not block, and the driver receives the event a few milliseconds later. The stop request
stays in the actor, so it also reaches workers that start later. A worker asks for it every second and sends its progress
with the question, so the questions are its heartbeats.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from savant_ray.cluster.session import check_ray_actors, check_ray_processes
from savant_ray.errors import TrainingError
from savant_ray.events import CheckpointSaved, Event, RunFailed, WorkersLost, WorkersStarted

RAY_CHECK_SECONDS = 0.5  # if the answer to a call is overdue by this, Ray's own processes are checked
LAST_ANSWER_SECONDS = 1.0  # for the last events, after Ray has failed
ANSWER_SECONDS = 60.0  # the bridge answers within milliseconds
LOST_SECONDS = 10.0  # until a call that others have overtaken is taken for lost; it arrives within milliseconds

BridgeHandle = Any  # an `ActorHandle`, whose methods Ray annotates as `Never`


@dataclass(frozen=True)
class WorkerProgress:
    """What a worker sends with each heartbeat: its process, and the newest mark of its training thread."""

    rank: int
    world_size: int  # of its worker group
    actor_id: str
    node_id: str
    host: str  # name of its machine
    pid: int
    process_started: float  # seconds since the epoch
    marks: int  # number of marks of its training thread
    activity: str
    limit_factor: float  # factor of the usual time limit until the next mark
    collectives: int  # that it has entered; the same sequence on all ranks
    waits: bool  # whether it may be waiting for the other ranks in the newest of them
    finished: bool  # no more marks will follow


@dataclass(frozen=True)
class LatestHeartbeat:
    """The newest progress of a worker and the number of its heartbeats so far."""

    progress: WorkerProgress
    number: int


class HeartbeatTable:
    """The newest heartbeat of each rank of the current worker group."""

    def __init__(self) -> None:
        self._by_rank: dict[int, LatestHeartbeat] = {}
        self._ended: set[str] = set()  # actors of earlier groups, whose last heartbeats may still arrive

    def add(self, progress: WorkerProgress) -> bool:
        """Count a heartbeat of a worker; return whether it shows that a new group has started.

        Other actors with its rank, or with another world size, belong to an earlier group: Ray Train starts new actors to
        resize. Until the loss of that group is reported, several ranks of the new one may return True.
        """
        if progress.actor_id in self._ended:
            return False
        is_new = False
        for heartbeat in self.all:
            earlier = heartbeat.progress
            is_replaced = earlier.rank == progress.rank and earlier.actor_id != progress.actor_id
            if is_replaced or earlier.world_size != progress.world_size:
                self._end(earlier)
                is_new = True
        is_new = is_new or not self._by_rank
        known = self._by_rank.get(progress.rank)
        self._by_rank[progress.rank] = LatestHeartbeat(progress, known.number + 1 if known else 1)
        return is_new

    def clear(self) -> None:
        """Forget all workers: their group has ended."""
        for heartbeat in self.all:
            self._end(heartbeat.progress)

    def _end(self, progress: WorkerProgress) -> None:
        self._ended.add(progress.actor_id)
        del self._by_rank[progress.rank]

    @property
    def all(self) -> list[LatestHeartbeat]:
        """The newest heartbeat of each rank that has sent one."""
        return list(self._by_rank.values())


class EventReorderer:
    """Delivers the events of a sender in the order in which it numbered them, from 0.

    Ray may begin calls of an asynchronous actor in another order than that in which a process has made them. If the
    connection between two nodes fails, it may also lose some of them (`ActorUnavailableError`); events that wait for a lost
    one are delivered after `LOST_SECONDS`.
    """

    def __init__(self, deliver: Callable[[Event], None]) -> None:
        self._deliver, self._next = deliver, 0
        self._waiting: dict[int, tuple[Event, asyncio.Event]] = {}

    async def add(self, event: Event, number: int) -> None:
        """Add an event; return after it and all earlier ones have been delivered, or have been lost."""
        if number < self._next:  # it was taken for lost
            self._deliver(event)
            return
        delivered = asyncio.Event()
        self._waiting[number] = (event, delivered)
        self._deliver_from_next()
        if delivered.is_set() or await _wait(delivered, LOST_SECONDS):
            return
        while not delivered.is_set():
            self._next = min(self._waiting)
            self._deliver_from_next()

    def _deliver_from_next(self) -> None:
        while self._next in self._waiting:
            event, delivered = self._waiting.pop(self._next)
            self._next += 1
            self._deliver(event)
            delivered.set()


# Ray's annotations lack some of these options and the class that the decorator returns.
@ray.remote(num_cpus=0, max_concurrency=10_000, enable_task_events=False)  # type: ignore[call-overload]
class Bridge:
    """The actor; there is one per attempt, on the driver's node, and Ray ends it with the driver.

    Task events are disabled because Ray's head would keep 3 KB for each call (measured over 80,000 steps).
    """

    def __init__(self) -> None:
        self._events: list[Event] = []
        # Numbers of saved checkpoints: among `_events`, and among the events that the driver took last and may not have
        # recorded yet.
        self._checkpoints_waiting = self._checkpoints_taken = 0
        self._senders: dict[str, EventReorderer] = {}
        self._has_events = asyncio.Event()
        self._stop = asyncio.Event()
        self._grace_seconds = 0.0
        self._failed = False
        self._heartbeats = HeartbeatTable()

    async def send(self, event: Event, sender: str, number: int) -> int:
        """Add an event that a worker, or `FailureCallback` in Ray Train's controller, has sent; `number` counts from 0.

        Returns after this event and all earlier ones of the sender have been added; the value is the number of checkpoints
        whose events the driver may not have recorded yet.
        """
        if sender not in self._senders:
            self._senders[sender] = EventReorderer(self._add)
        await self._senders[sender].add(event, number)
        return self._checkpoints_waiting + self._checkpoints_taken

    def _add(self, event: Event) -> None:
        match event:
            case RunFailed():
                if self._failed:  # several workers may end with the same error, or with another one as its consequence
                    return
                self._failed = True
            case WorkersLost():
                if self._failed:  # a worker has sent its error
                    return
                self._heartbeats.clear()
            case CheckpointSaved():
                self._checkpoints_waiting += 1
        self._events.append(event)
        self._has_events.set()

    async def take(self, seconds: float) -> tuple[list[Event], list[LatestHeartbeat]]:
        """Return all events since the last call, and the workers' heartbeats; wait up to `seconds` for the first event.

        The driver has recorded the events of its last call before it calls again.
        """
        self._checkpoints_taken = 0
        await _wait(self._has_events, seconds)
        self._has_events.clear()
        events, self._events = self._events, []
        self._checkpoints_taken, self._checkpoints_waiting = self._checkpoints_waiting, 0
        return events, self._heartbeats.all

    async def has_failed(self) -> bool:
        """Return whether a worker ended the run with an error for the user, which would occur again after a restart."""
        return self._failed

    async def request_stop(self, grace_seconds: float) -> None:
        """Request that workers stop within `grace_seconds`, including workers that start later."""
        self._grace_seconds = grace_seconds
        self._stop.set()

    async def wait_for_stop_request(self, progress: WorkerProgress, seconds: float) -> float | None:
        """Wait up to `seconds` for a stop request; return within how many seconds to stop, None if there is none."""
        if self._heartbeats.add(progress) and not self._failed:
            self._add(WorkersStarted())
        return self._grace_seconds if await _wait(self._stop, seconds) else None


def start_bridge() -> BridgeHandle:
    """Start the actor on this node. Ray would place an actor without resources on any node, even on one that may be lost."""
    strategy = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Bridge.options(scheduling_strategy=strategy).remote()  # type: ignore[attr-defined]


def next_events(bridge: BridgeHandle, seconds: float) -> tuple[list[Event], list[LatestHeartbeat]]:
    """Return all events since the last call and the workers' heartbeats, in the driver.

    Waits up to `seconds` for the first event.

    Raises:
        TrainingError: as `answer_of`.
    """
    events, heartbeats = answer_of(bridge.take.remote(seconds), seconds)
    return list(events), list(heartbeats)


def last_events(bridge: BridgeHandle) -> list[Event]:
    """Return all events since the last call if the bridge still answers, after Ray has failed otherwise."""
    try:
        events, _ = ray.get(bridge.take.remote(0), timeout=LAST_ANSWER_SECONDS)
    except RayError:
        return []
    return list(events)


def answer_of(call: Any, seconds: float = 0.0) -> Any:
    """Return the result of a call of the bridge that takes up to `seconds`, in the driver.

    Raises:
        TrainingError: Ray itself has died or is stopped, or the bridge does not answer.
    """
    overdue = 0.0  # seconds of waiting; the time in which this process itself was suspended does not count
    while not ray.wait([call], timeout=seconds + RAY_CHECK_SECONDS)[0]:
        check_ray_processes()
        check_ray_actors()
        overdue += seconds + RAY_CHECK_SECONDS
        if overdue > ANSWER_SECONDS:
            raise TrainingError(
                "the process between driver and workers, ray::Bridge on this machine, has not answered for "
                f"{overdue:.0f} s.\n"
                "Run the same command again to resume from the last checkpoint."
            )
    return ray.get(call)


async def _wait(event: asyncio.Event, seconds: float) -> bool:
    """Return whether the event was set within `seconds`."""
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return False
    return True
