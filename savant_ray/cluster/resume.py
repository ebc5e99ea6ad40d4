"""Where a worker goes on: the newest checkpoint of the run, else the weights of `run.init_from`, else from scratch.

The driver has looked at them (`starting_point.py`); here the choice is made again, because Ray Train starts workers
anew without asking it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import ray.train
import torch.distributed as dist

from savant_ray.cluster.disk import Disk
from savant_ray.cluster.storage import on_this_machine
from savant_ray.config import Config
from savant_ray.events import RunResumed
from savant_ray.training.checkpoint import find_checkpoint, is_step_name, read_checkpoint, step_of
from savant_ray.training.original import NOTE, newest_original, read_original
from savant_ray.training.state import TrainingState
from savant_ray.training.step import broadcast_from_rank_0


def load_newest(state: TrainingState, config: Config, storage: Disk, allow_changes: bool) -> RunResumed | None:
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
    if is_step_name(name):
        notes = state.load_checkpoint(read_checkpoint(path), allow_changes)
        return RunResumed(step=state.step, path=storage.locate(name), warnings=tuple(notes))
    names = [parameter for parameter, _ in state.model.named_parameters()]
    content = read_original(path, names, config.training.effective_batch)
    notes = state.load_checkpoint(content, allow_changes)
    return RunResumed(step=state.step, path=storage.locate(name), note=NOTE, warnings=tuple(notes))


def newest_name(storage: Disk) -> str | None:
    """Of the newest checkpoint, or of the original's file that is newer.

    Raises:
        SavantError: another process has taken the run over.
        OSError: the storage cannot be read.
    """
    storage.check_owner()
    newest = next(reversed(storage.complete_steps()), None)
    storage.fetch_originals()
    original = newest_original(storage.folder, step_of(Path(newest)) if newest else -1, say=lambda _: None)
    return original.name if original else newest


def fetch_once_per_node(storage: Disk, name: str) -> Path:
    """By the node's first rank; the others wait for it. Collective."""
    first = not dist.is_initialized() or ray.train.get_context().get_local_rank() == 0
    if first:
        storage.fetch(name)
    if dist.is_initialized():
        dist.barrier()
    return storage.folder / name


@contextmanager
def on_each_node(checkpoint: str) -> Iterator[Path]:
    """`on_this_machine`, where the node's first rank fetches for all ranks of the node. Collective."""
    if not dist.is_initialized():
        with on_this_machine(checkpoint) as path:
            yield path
        return
    context = ray.train.get_context()
    with ExitStack() as held:
        is_first = context.get_local_rank() == 0
        fetched = str(held.enter_context(on_this_machine(checkpoint))) if is_first else None
        paths: list[tuple[int, str | None] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(paths, (context.get_node_rank(), fetched))
        yield next(Path(each[1]) for each in paths if each and each[0] == context.get_node_rank() and each[1])
        dist.barrier()  # the copy goes when every rank has read it


def _initial_weights(state: TrainingState, config: Config) -> RunResumed | None:
    if config.run.init_from is None:
        return None
    with on_each_node(config.run.init_from) as path:
        origin = find_checkpoint(path)
        state.load_weights(read_checkpoint(origin)["model_state_dict"])
    return RunResumed(step=0, path=config.run.init_from, note="its weights only: a new run with a fresh optimizer")
