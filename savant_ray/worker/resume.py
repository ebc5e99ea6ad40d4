"""Loads the state that a worker starts from: the run's newest checkpoint, else the weights of `run.init_from`, if any.

The driver makes the same choice before it starts workers (`driver/starting_point.py`). It is made again here because Ray
Train restarts workers without the driver.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import ray.train
import torch.distributed as dist

from savant_ray.config import Config
from savant_ray.events import RunResumed
from savant_ray.storage.protocol import RunStorage, newest_checkpoint_name
from savant_ray.storage.run_storage import initial_checkpoint
from savant_ray.training.checkpoint import (
    find_checkpoint,
    left_out_file,
    model_weights,
    read_checkpoint,
    read_left_out,
)
from savant_ray.training.reduction import broadcast_from_rank_0
from savant_ray.training.state import TrainingState


def load_newest(
    state: TrainingState, config: Config, storage: RunStorage, allow_changes: bool
) -> tuple[RunResumed | None, int | None]:
    """Load on every rank the checkpoint that rank 0 selects, or the weights of `run.init_from`. Collective.

    The sequences that rewinds have left out are those of the run folder, because the last rewind may be newer than the
    checkpoint.

    Returns:
        As `load_newest_checkpoint`.

    Raises:
        CheckpointError: the checkpoint, or the file with the sequences that are left out, is damaged or does not fit.
        SavantError: another process has taken over the run.
        OSError: the storage cannot be read.
    """
    resumed, threads = load_newest_checkpoint(state, storage, allow_changes)
    resumed = resumed or load_initial_weights(state, config)
    name = left_out_file(state.data_fingerprint)
    stored = broadcast_from_rank_0(
        lambda: json.dumps(read_left_out(storage.fetch(name))) if name in storage.file_names() else None
    )
    if stored is not None:
        state.left_out = tuple((first, n_sequences) for first, n_sequences in json.loads(stored))
    return resumed, threads


def load_newest_checkpoint(
    state: TrainingState, storage: RunStorage, allow_changes: bool
) -> tuple[RunResumed | None, int | None]:
    """Load on every rank the checkpoint that rank 0 selects. Collective.

    Returns:
        The event, None without a checkpoint, and the number of CPU threads per worker that computed it, None if unknown.

    Raises:
        CheckpointError, SavantError, OSError: as in `load_newest`.
    """
    name = broadcast_from_rank_0(lambda: newest_name(storage))
    if name is None:
        return None, None
    content = read_checkpoint(fetch_once_per_node(storage, name))
    notes = state.load_checkpoint(content, allow_changes)
    resumed = RunResumed(step=state.step, path=storage.locate(name), warnings=tuple(notes))
    return resumed, content["savant"].get("threads")  # absent in older checkpoints


def newest_name(storage: RunStorage) -> str | None:
    """Return the name of the newest checkpoint, or None if there is none.

    Raises:
        SavantError: another process has taken over the run.
        OSError: the storage cannot be read.
    """
    storage.check_owner()
    return newest_checkpoint_name(storage)


def fetch_once_per_node(storage: RunStorage, name: str) -> Path:
    """Fetch a checkpoint on the first rank of each node and return its local folder. Collective."""
    is_first = not dist.is_initialized() or ray.train.get_context().get_local_rank() == 0
    if is_first:
        storage.fetch(name)
    if dist.is_initialized():
        dist.barrier()
    return storage.folder / name


@contextmanager
def on_each_node(checkpoint: AbstractContextManager[Path]) -> Iterator[Path]:
    """Enter `checkpoint` on the first rank of each node, and yield its path on all ranks of the node. Collective."""
    if not dist.is_initialized():
        with checkpoint as path:
            yield path
        return
    context = ray.train.get_context()
    with ExitStack() as stack:
        is_first = context.get_local_rank() == 0
        fetched = str(stack.enter_context(checkpoint)) if is_first else None
        paths: list[tuple[int, str | None] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(paths, (context.get_node_rank(), fetched))
        yield next(Path(item[1]) for item in paths if item and item[0] == context.get_node_rank() and item[1])
        dist.barrier()  # the first rank deletes its copy after all ranks have read it


def load_initial_weights(state: TrainingState, config: Config) -> RunResumed | None:
    """Load the weights of `run.init_from` into a new state; return None if the setting is null. Collective.

    Raises:
        CheckpointError: there is no checkpoint, or its weights do not fit the model.
    """
    if config.run.init_from is None:
        return None
    # The driver has already compared the settings.
    with on_each_node(initial_checkpoint(config, allow_changes=True)) as path:
        state.load_weights(model_weights(read_checkpoint(find_checkpoint(path))))
    return RunResumed(step=0, path=config.run.init_from, note="its weights only: a new run with a fresh optimizer")
