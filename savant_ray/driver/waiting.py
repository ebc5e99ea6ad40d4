"""Says what a run waits for when its workers do not come: Ray itself waits for ever, and in silence."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import ray

from savant_ray.events import Event, WorkersLost, WorkersStarted

SECONDS_UNTIL_SAID = 30.0


class WorkerWatch:
    """Whether there are workers, by what they themselves and Ray Train tell."""

    def __init__(
        self,
        workers: int,
        resources: Mapping[str, float],
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._workers, self._resources = workers, resources
        self._say, self._clock = say, clock
        self._missing_since: float | None = clock()

    def note(self, event: Event) -> None:
        """Hears of every event."""
        match event:
            case WorkersStarted():
                self._missing_since = None
            case WorkersLost():
                self._missing_since = self._clock()

    def remark(self) -> None:
        """Speaks up, once, when there have been no workers for long; called again and again."""
        if self._missing_since is None or self._clock() - self._missing_since < SECONDS_UNTIL_SAID:
            return
        self._missing_since = None
        self._say(waiting_for(self._workers, self._resources, ray.available_resources(), ray.cluster_resources()))


def waiting_for(
    workers: int, resources: Mapping[str, float], free: Mapping[str, float], there: Mapping[str, float]
) -> str:
    """What is asked for and what the cluster has."""
    who = "worker" if workers == 1 else "workers"
    each = ", ".join(f"{name}: {amount:g}" for name, amount in resources.items())
    has = ", ".join(f"{free.get(name, 0):g} {name} free of {there.get(name, 0):g}" for name in resources)
    return (
        f"no workers yet; if it is for want of resources: {workers} {who} with {{{each}}} each; "
        f"the cluster has {has}. The run goes on by itself as soon as they are there; `ray status` shows the nodes."
    )
