"""Where a worker goes on: the newest checkpoint of the run, else the weights of `run.init_from`, else from scratch.

The driver has looked at them (`starting_point.py`); here the choice is made again, because Ray Train starts workers
anew without asking it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import ray.train
import torch.distributed as dist

from savant_ray.config import Config
from savant_ray.events import RunResumed
from savant_ray.storage.protocol import RunStorage, newest_checkpoint_name
from savant_ray.storage.run_storage import initial_checkpoint
from savant_ray.training.checkpoint import find_checkpoint, read_checkpoint
from savant_ray.training.state import TrainingState
from savant_ray.training.step import broadcast_from_rank_0


def load_newest(state: TrainingState, config: Config, storage: RunStorage, allow_changes: bool) -> RunResumed | None:
    """Loads on every rank what rank 0 found; collective.

    Raises:
        CheckpointError: the checkpoint is damaged or does not fit.
        SavantError: another process has taken the run over.
        OSError: the storage cannot be read.
    """
    name = broadcast_from_rank_0(lambda: newest_name(storage))
    if name is None:
        return _initial_weights(state, config)
    path = fetch_once_per_node(storage, name)
    notes = state.load_checkpoint(read_checkpoint(path), allow_changes)
    return RunResumed(step=state.step, path=storage.locate(name), warnings=tuple(notes))


def newest_name(storage: RunStorage) -> str | None:
    """Return the name of the newest checkpoint, None without one.

    Raises:
        SavantError: another process has taken the run over.
        OSError: the storage cannot be read.
    """
    storage.check_owner()
    return newest_checkpoint_name(storage)


def fetch_once_per_node(storage: RunStorage, name: str) -> Path:
    """By the node's first rank; the others wait for it. Collective."""
    first = not dist.is_initialized() or ray.train.get_context().get_local_rank() == 0
    if first:
        storage.fetch(name)
    if dist.is_initialized():
        dist.barrier()
    return storage.folder / name


@contextmanager
def on_each_node(checkpoint: AbstractContextManager[Path]) -> Iterator[Path]:
    """Enter a context manager of a checkpoint's path in the node's first rank, for all ranks of the node. Collective."""
    if not dist.is_initialized():
        with checkpoint as path:
            yield path
        return
    context = ray.train.get_context()
    with ExitStack() as held:
        is_first = context.get_local_rank() == 0
        fetched = str(held.enter_context(checkpoint)) if is_first else None
        paths: list[tuple[int, str | None] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(paths, (context.get_node_rank(), fetched))
        yield next(Path(each[1]) for each in paths if each and each[0] == context.get_node_rank() and each[1])
        dist.barrier()  # the copy goes when every rank has read it


def _initial_weights(state: TrainingState, config: Config) -> RunResumed | None:
    if config.run.init_from is None:
        return None
    with on_each_node(initial_checkpoint(config, allow_changes=True)) as path:  # the driver has compared the settings
        origin = find_checkpoint(path)
        state.load_weights(read_checkpoint(origin)["model_state_dict"])
    return RunResumed(step=0, path=config.run.init_from, note="its weights only: a new run with a fresh optimizer")
