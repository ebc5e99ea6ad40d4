"""Ray Train's list of a run's checkpoints, rebuilt before each start of `fit()`.

Ray 2.60 reads the list from `checkpoint_manager_snapshot.json` when `fit()` starts, and writes it in place, not
atomically. If it is truncated or names a folder that does not exist, `fit()` fails without naming the cause. If it is
missing, Ray does not know the earlier checkpoints and never deletes them. The folders of the run are therefore the only
source, and the list is derived from them.
"""

from __future__ import annotations

from savant_ray.ray_internals import checkpoint_manager_snapshot
from savant_ray.storage.protocol import RunStorage
from savant_ray.training.checkpoint import step_of

SNAPSHOT = "checkpoint_manager_snapshot.json"


def rebuild_snapshot(storage: RunStorage) -> None:
    """Write Ray's list of the complete checkpoints; remove it if there are none. Raises OSError."""
    names = storage.checkpoints()
    if not names:
        storage.remove(SNAPSHOT)
        return
    storage.write(SNAPSHOT, checkpoint_manager_snapshot([(name, step_of(name)) for name in names]))
