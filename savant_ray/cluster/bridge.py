"""An actor that carries events from workers to the driver and the stop request from the driver to workers.

`ray.train.report()` is a barrier over all ranks and is limited to one call per health check, so per-step metrics use this
actor instead: a worker's call does not block, and the driver receives the event a few milliseconds later. The stop request
stays in the actor, so it also reaches workers that start later.
"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from savant_ray.cluster.session import check_ray_processes
from savant_ray.events import Event, RunFailed, WorkersLost, WorkersStarted

STOP_POLL_SECONDS = 30.0
RAY_CHECK_SECONDS = 0.5  # if the answer to a poll is overdue by this, Ray's own processes are checked

BridgeHandle = Any  # an `ActorHandle`, whose methods Ray annotates as `Never`


# Ray's annotations lack some of these options and the class that the decorator returns.
@ray.remote(num_cpus=0, max_concurrency=10_000, enable_task_events=False)  # type: ignore[call-overload]
class Bridge:
    """The actor; there is one per attempt, on the driver's node, and Ray ends it with the driver.

    Task events are disabled because Ray's head would keep 3 KB for each call (measured over 80,000 steps).
    """

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._has_events = asyncio.Event()
        self._stop = asyncio.Event()
        self._grace_seconds = 0.0
        self._failed = False
        self._has_workers = False

    async def send(self, event: Event) -> None:
        """Add an event that a worker, or `FailureCallback` in Ray Train's controller, has sent."""
        match event:
            case RunFailed():
                self._failed = True
            case WorkersStarted():
                self._has_workers = True
            case WorkersLost():
                if self._failed or not self._has_workers:  # a worker has sent its error, or the loss was sent before
                    return
                self._has_workers = False
        self._events.append(event)
        self._has_events.set()

    async def take_events(self, seconds: float) -> list[Event]:
        """Return all events since the last call; wait up to `seconds` for the first."""
        await _wait(self._has_events, seconds)
        self._has_events.clear()
        events, self._events = self._events, []
        return events

    async def has_failed(self) -> bool:
        """Return whether a worker ended the run with an error for the user, which would occur again after a restart."""
        return self._failed

    async def request_stop(self, grace_seconds: float) -> None:
        """Request that workers stop within `grace_seconds`, including workers that start later."""
        self._grace_seconds = grace_seconds
        self._stop.set()

    async def wait_for_stop_request(self, seconds: float) -> float | None:
        """Wait up to `seconds` for a stop request; return within how many seconds to stop, None if there is none."""
        return self._grace_seconds if await _wait(self._stop, seconds) else None


def start_bridge() -> BridgeHandle:
    """Start the actor on this node. Ray would place an actor without resources on any node, even on one that may be lost."""
    strategy = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Bridge.options(scheduling_strategy=strategy).remote()  # type: ignore[attr-defined]


def next_events(bridge: BridgeHandle, seconds: float) -> list[Event]:
    """Return all events since the last call, in the driver; wait up to `seconds` for the first.

    Raises:
        TrainingError: Ray itself has died.
    """
    events = bridge.take_events.remote(seconds)
    while not ray.wait([events], timeout=seconds + RAY_CHECK_SECONDS)[0]:
        check_ray_processes()
    check_ray_processes()
    return list(ray.get(events))


class StopListener:
    """Polls the bridge for a stop request in a daemon thread, so that a training step never waits for the answer."""

    def __init__(self, bridge: BridgeHandle) -> None:
        self._bridge = bridge
        self._deadline: float | None = None  # by time.monotonic()
        threading.Thread(target=self._listen, name="stop-listener", daemon=True).start()

    def grace_left(self) -> float | None:
        """Return the seconds that are left for a requested stop, None if no stop is requested."""
        return None if self._deadline is None else self._deadline - time.monotonic()

    def _listen(self) -> None:
        while (grace_seconds := ray.get(self._bridge.wait_for_stop_request.remote(STOP_POLL_SECONDS))) is None:
            pass
        self._deadline = time.monotonic() + grace_seconds


async def _wait(event: asyncio.Event, seconds: float) -> bool:
    """Return whether the event was set within `seconds`."""
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return False
    return True
