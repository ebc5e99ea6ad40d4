"""Nodes that are taken away: what Ray Train's own watcher knows, without the barrier of its public call.

`ray.train.get_preemption_info()` is a collective; one of those per step is too dear, so the value is read where Ray
Train keeps it (Ray 2.60), and whether to stop travels in the step's own all-reduce.
"""

from __future__ import annotations

import time

from ray._private.state import state
from ray.train.v2._internal.execution.context import get_train_context


def draining_nodes() -> set[str]:
    """The ids of the nodes that take no more work."""
    return set(state.get_draining_nodes())


def drain_grace_left(without_deadline: float) -> float | None:
    """Seconds until the first drained node of this run is gone, `without_deadline` if nobody said; None: no drain."""
    info = get_train_context().preemption_context.preemption_info
    if info is None:
        return None
    return info.deadline_ms / 1000 - time.time() if info.deadline_ms else without_deadline
