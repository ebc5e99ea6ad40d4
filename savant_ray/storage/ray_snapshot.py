"""Ray Train's own list of a run's checkpoints, made true again before each launch.

Ray 2.60 writes `checkpoint_manager_snapshot.json` without renaming. Cut short, or naming a folder that is gone, it
ends `fit()` with an error that names no cause; missing, it makes Ray forget the older checkpoints and never delete
them. The run folder itself says which checkpoints there are, so the list is written anew.
"""

from __future__ import annotations

from pathlib import Path

from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _CheckpointManagerState, _TrainingResultState

from savant_ray.storage.local import Disk
from savant_ray.training.checkpoint import step_of

SNAPSHOT = "checkpoint_manager_snapshot.json"


def rebuild_snapshot(storage: Disk) -> None:
    """Lists the complete checkpoints, oldest first; without any the list is removed. Raises OSError."""
    names = storage.complete_steps()
    if not names:
        storage.remove(SNAPSHOT)
        return
    results = [_TrainingResultState(checkpoint_dir_name=name, metrics={"step": step_of(Path(name))}) for name in names]
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
