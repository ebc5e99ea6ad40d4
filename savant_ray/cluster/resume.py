"""Where a worker goes on: the newest checkpoint of the run, else the weights of `run.init_from`, else from scratch.

The driver has looked at them (`starting_point.py`); here the choice is made again, because Ray Train starts workers
anew without asking it.
"""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from savant_ray.config import Config
from savant_ray.events import RunResumed
from savant_ray.training.checkpoint import find_checkpoint, newest_checkpoint, read_checkpoint, step_of
from savant_ray.training.original import NOTE, newest_original, read_original
from savant_ray.training.state import TrainingState


def load_newest(state: TrainingState, config: Config, run_folder: Path, allow_changes: bool) -> RunResumed | None:
    """Loads on every rank what rank 0 found; collective.

    Raises:
        CheckpointError: the checkpoint is damaged or does not fit.
    """
    newest = agree(newest_checkpoint(run_folder))
    original = agree(newest_original(run_folder, step_of(newest) if newest else -1, say=lambda _: None))
    if original is not None:
        names = [name for name, _ in state.model.named_parameters()]
        content = read_original(original, names, config.training.effective_batch)
        notes = state.load_checkpoint(content, allow_changes)
        return RunResumed(step=state.step, path=str(original), note=NOTE, warnings=tuple(notes))
    if newest is not None:
        notes = state.load_checkpoint(read_checkpoint(newest), allow_changes)
        return RunResumed(step=state.step, path=str(newest), warnings=tuple(notes))
    if config.run.init_from is None:
        return None
    origin = agree(find_checkpoint(Path(config.run.init_from)))
    state.load_weights(read_checkpoint(origin)["model_state_dict"])
    return RunResumed(step=0, path=str(origin), note="its weights only: a new run with a fresh optimizer")


def agree(path: Path | None) -> Path | None:
    """Rank 0's path on every rank."""
    if not dist.is_initialized():
        return path
    shared = [path]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]
