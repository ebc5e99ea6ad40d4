"""Ray Train's own list of a run's checkpoints, made true again before each launch.

Ray 2.60 writes `checkpoint_manager_snapshot.json` without renaming. Cut short, or naming a folder that is gone, it
ends `fit()` with an error that names no cause; missing, it makes Ray forget the older checkpoints and never delete
them. The run folder itself says which checkpoints there are, so the list is written anew.
"""

from __future__ import annotations

from pathlib import Path

from savant_ray.ray_internals import checkpoint_manager_snapshot
from savant_ray.storage.local import Disk
from savant_ray.training.checkpoint import step_of

SNAPSHOT = "checkpoint_manager_snapshot.json"


def rebuild_snapshot(storage: Disk) -> None:
    """Lists the complete checkpoints, oldest first; without any the list is removed. Raises OSError."""
    names = storage.complete_steps()
    if not names:
        storage.remove(SNAPSHOT)
        return
    storage.write(SNAPSHOT, checkpoint_manager_snapshot([(name, step_of(Path(name))) for name in names]))
