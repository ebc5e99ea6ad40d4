"""Ray Train's list of a run's checkpoints, rebuilt before each start of `fit()`.

Ray 2.60 reads the list from `checkpoint_manager_snapshot.json` when `fit()` starts, and writes it in place, not
atomically. If it is truncated or names a folder that does not exist, `fit()` fails without naming the cause. If it is
missing, Ray does not know the earlier checkpoints and never deletes them. The folders of the run are therefore the only
source, and the list is derived from them.
"""

from __future__ import annotations

from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _CheckpointManagerState, _TrainingResultState

from savant_ray.storage.protocol import RunStorage
from savant_ray.training.checkpoint import step_of

SNAPSHOT = "checkpoint_manager_snapshot.json"


def rebuild_snapshot(storage: RunStorage) -> None:
    """Write Ray's list of the complete checkpoints; remove it if there are none. Raises OSError."""
    names = storage.checkpoints()
    if not names:
        storage.remove(SNAPSHOT)
        return
    results = [_TrainingResultState(checkpoint_dir_name=name, metrics={"step": step_of(name)}) for name in names]
    state = _CheckpointManagerState(
        checkpoint_results=results,
        checkpoint_report_indices=list(range(len(results))),
        latest_checkpoint_result=results[-1],
        pending_training_results=[],
        pending_validation_specs=[],
        current_report_index=len(results),
        validated_checkpoint_dir_names=[],
        timed_out_validation_checkpoint_dir_names=[],
        failed_validation_checkpoint_dir_names=[],
    )
    storage.write(SNAPSHOT, state.model_dump_json())
