"""The time that is left before a drained node of the run is shut down."""

from __future__ import annotations

import time

from savant_ray.ray_internals import preemption_deadline_ms


def drain_grace_left(without_deadline: float) -> float | None:
    """Return the seconds until the first drained node of this run is shut down, None if no node is being drained.

    `without_deadline` is returned for a drain without a deadline.
    """
    deadline_ms = preemption_deadline_ms()
    if deadline_ms is None:
        return None
    return deadline_ms / 1000 - time.time() if deadline_ms else without_deadline
