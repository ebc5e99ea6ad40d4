"""Reports what an attempt waits for if its workers do not start: Ray itself waits indefinitely without a message."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import ray

from savant_ray.cluster.session import check_ray_actors, owns_ray, resources_text
from savant_ray.driver.phases import Phase

SECONDS_UNTIL_REPORT = 30.0


class WorkerWatch:
    """Reports once if no workers start for `SECONDS_UNTIL_REPORT`; a loss of workers begins a new wait."""

    def __init__(
        self,
        workers: int,
        resources: Mapping[str, float],
        notify: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._workers, self._resources = workers, resources
        self._notify, self._clock = notify, clock
        self._wait_started: float | None = None  # reset by each check of Ray's actors
        self._is_reported = False

    def check(self, phase: Phase) -> None:
        """Report if the wait has been long; to be called at short intervals.

        Raises:
            TrainingError: a process of Ray is stopped (SIGSTOP), and the workers may be waiting for it.
        """
        if phase is not Phase.WAITING_FOR_WORKERS:
            self._wait_started, self._is_reported = None, False
            return
        if self._wait_started is None:
            self._wait_started = self._clock()
        if self._clock() - self._wait_started < SECONDS_UNTIL_REPORT:
            return
        self._wait_started = self._clock()
        # Workers are checked as well, because they send no heartbeats before they run the training function.
        check_ray_actors(all_of_them=True)
        if self._is_reported:
            return
        self._is_reported = True
        if owns_ray():  # nothing else uses it, and `scaling` has checked that the workers fit
            self._notify(
                "the workers are still starting, which takes long on a busy machine, or if Python's packages are on a slow "
                "disk"
            )
            return
        self._notify(
            waiting_message(self._workers, self._resources, ray.available_resources(), ray.cluster_resources())
        )


def waiting_message(
    workers: int, resources: Mapping[str, float], free: Mapping[str, float], total: Mapping[str, float]
) -> str:
    """Return a message with the resources that the workers need and those that the cluster has."""
    required = resources_text(resources)
    need = f"1 worker needs {required}" if workers == 1 else f"{workers} workers need {required} each"
    available = ", ".join(f"{free.get(name, 0):g} of {total.get(name, 0):g} {name} free" for name in resources)
    return (
        f"no workers have started yet. {need}; the cluster has {available}. "
        "Training starts as soon as the resources are available; `ray status` shows the nodes."
    )
