"""The bridge between driver and workers: events up, one wish down.

`ray.train.report()` is a barrier over all ranks and is throttled to one per health check, so per-step numbers take
this actor instead: a worker's call returns at once, and the driver has the event a few milliseconds later. The one
wish that goes down, "stop", waits here until workers exist, so a signal is never too early.
"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from savant_ray.cluster.session import refuse_dead_ray
from savant_ray.events import Event, RunFailed, WorkersLost, WorkersStarted

POLL_SECONDS = 30.0
SECONDS_UNTIL_ASKED = 0.5  # whether Ray lives, when no answer comes

BridgeHandle = Any  # an `ActorHandle`, by whose types no method of it ever returns


# Ray's types know neither all of its options nor what the decorator makes of a class.
@ray.remote(num_cpus=0, max_concurrency=10_000, enable_task_events=False)  # type: ignore[call-overload]
class Bridge:
    """One per attempt, on the driver's node; it dies with the driver.

    Ray's head would remember each call for its dashboard, 3 KB each (measured over 80,000 steps), so it is told of none.
    """

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._news = asyncio.Event()
        self._stop = asyncio.Event()
        self._grace_seconds = 0.0
        self._failed = False
        self._has_workers = False

    async def tell(self, event: Event) -> None:
        """A worker's fact, or Ray Train's of its workers."""
        match event:
            case RunFailed():
                self._failed = True
            case WorkersStarted():
                self._has_workers = True
            case WorkersLost():
                if self._failed or not self._has_workers:  # they gave up and said why, or it was said before
                    return
                self._has_workers = False
        self._events.append(event)
        self._news.set()

    async def take_events(self, seconds: float) -> list[Event]:
        """All events since the last call; waits up to `seconds` for the first."""
        await _wait(self._news, seconds)
        self._news.clear()
        events, self._events = self._events, []
        return events

    async def has_failed(self) -> bool:
        """Whether a worker ended the run with an error for the user, which starting workers again would not mend."""
        return self._failed

    async def request_stop(self, grace_seconds: float) -> None:
        """The driver's wish; it stays."""
        self._grace_seconds = grace_seconds
        self._stop.set()

    async def stop_requested(self, seconds: float) -> float | None:
        """None, or within how many seconds to stop; waits up to `seconds` for the wish."""
        return self._grace_seconds if await _wait(self._stop, seconds) else None


def start_bridge() -> BridgeHandle:
    """On this very node: an actor without resources would be put on any, and lost with it."""
    here = ray.get_runtime_context().get_node_id()
    strategy = NodeAffinitySchedulingStrategy(here, soft=False)
    return Bridge.options(scheduling_strategy=strategy).remote()  # type: ignore[attr-defined]


def next_events(bridge: BridgeHandle, seconds: float) -> list[Event]:
    """In the driver: all since the last call; waits up to `seconds` for the first.

    Raises:
        TrainingError: Ray itself has died.
    """
    events = bridge.take_events.remote(seconds)
    while not ray.wait([events], timeout=seconds + SECONDS_UNTIL_ASKED)[0]:
        refuse_dead_ray()
    refuse_dead_ray()
    return list(ray.get(events))


class StopListener:
    """A worker's ear: a daemon thread long-polls the bridge, so that asking costs a step nothing."""

    def __init__(self, bridge: BridgeHandle) -> None:
        self._bridge = bridge
        self._deadline: float | None = None  # by time.monotonic()
        threading.Thread(target=self._listen, name="stop-listener", daemon=True).start()

    def grace_left(self) -> float | None:
        """None until the wish has arrived, then the seconds that are left for it."""
        return None if self._deadline is None else self._deadline - time.monotonic()

    def _listen(self) -> None:
        while (grace_seconds := ray.get(self._bridge.stop_requested.remote(POLL_SECONDS))) is None:
            pass
        self._deadline = time.monotonic() + grace_seconds


async def _wait(event: asyncio.Event, seconds: float) -> bool:
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return False
    return True
