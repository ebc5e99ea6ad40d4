"""Every use of Ray's private modules and attributes, written for Ray 2.60.

No other module may touch them (tests/test_layers.py). Each function gives the reason why Ray's public API does not suffice.
The imports are inside the functions because each process needs only one or two of them, and `ray.train` alone takes more
than a second to import. After an upgrade of Ray, check this file against its sources and run `make test-all`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray._private.node import Node
    from ray.data import Dataset
    from ray.job_config import JobConfig
    from ray.train.v2._internal.execution.storage import StorageContext


# Connecting


def started_head() -> Node | None:
    """Return the head node that this process started, None if it is connected to a cluster that was running before.

    Ray has no public way to distinguish the two cases, to list the head's processes, or to find those that have died.
    """
    from ray._private import worker

    node: Any = worker._global_node  # annotated as None in Ray's sources
    return node if node is not None and node.is_head() else None


def enable_token_authentication_if_token_exists() -> None:
    """Enable token authentication if this machine has an authentication token.

    Ray does this only inside `ray.init()`, for a cluster that was started on this machine; the check of the address before
    `ray.init()` needs the token earlier.
    """
    from ray._private.authentication import authentication_token_setup

    authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def require_token_if_authentication_is_enabled() -> None:
    """Check for the authentication token before Ray does: its own client ends the process if there is none.

    Raises:
        ray.exceptions.AuthenticationError: authentication is enabled, and no token was found.
    """
    from ray._private.authentication import authentication_token_setup

    authentication_token_setup.ensure_token_if_auth_enabled(create_token_if_missing=False)


@contextmanager
def processes_in_own_groups() -> Iterator[None]:
    """Let Ray start its processes in process groups of their own within the `with` block; Ray has no setting for it.

    A signal to the group of this process, as `timeout` and terminals send it, then does not reach Ray's processes.
    """
    from ray._private import services

    popen: Any = services.ConsolePopen
    services.ConsolePopen = partial(popen, process_group=0)  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        services.ConsolePopen = popen  # type: ignore[misc]


def request_cluster_id(address: str) -> None:
    """Ask the Ray head at HOST:PORT for the id of its cluster, without connecting this process to it as `ray.init()` does.

    Blocks for minutes if nothing answers.

    Raises:
        Exception: of various types; what answers is not a Ray head, or refuses the token.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # a compiled module

    GcsClient(address=address)


def detected_cores() -> int:
    """Return the number of cores that Ray would use on this machine; Ray itself reports it only after its start."""
    from ray._private.utils import get_num_cpus

    return int(get_num_cpus(override_docker_cpu_warning=True))


def set_driver_import_path(config: JobConfig, path: list[str]) -> None:
    """Set the list of folders that workers of this job put before `sys.path`.

    Ray offers no setting for it and appends the folder of the driver's script and its working directory to the list.
    """
    config._py_driver_sys_path = path


# Submitting a job


def walk_working_directory(folder: Path, excludes: Sequence[str], visit: Callable[[Path], None]) -> None:
    """Call `visit` for each file and folder that `ray job submit --working-dir` would pack; Ray has no dry run."""
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    quiet = logging.getLogger("savant_ray.upload")
    quiet.addHandler(logging.NullHandler())
    quiet.propagate = False
    _dir_travel(folder, [_get_excludes(folder, list(excludes))], visit, include_gitignore=True, logger=quiet)


# Nodes that are being drained


def draining_nodes() -> set[str]:
    """Return the ids of the nodes that accept no more work; `ray.nodes()` lists them as alive."""
    from ray._private.state import state

    return set(state.get_draining_nodes())


def preemption_deadline_ms() -> int | None:
    """Return when the first drained node of this run will be shut down; to be called in a training worker.

    Returns:
        Milliseconds since the epoch, 0 if the drain has no deadline, None if no node is being drained.

    `ray.train.get_preemption_info()` returns the same, but it is a collective call, too slow for each training step.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    info = get_train_context().preemption_context.preemption_info
    return None if info is None else info.deadline_ms or 0


# Ray Train's files


def storage_context(storage_path: str, folder: str, filesystem: Any) -> StorageContext:
    """Return where Ray Train stores a run.

    Ray's `RunConfig` has no setting for the folder: it uses the run's name, which Ray restricts to ASCII.
    """
    from ray.train.v2._internal.execution.storage import StorageContext

    return StorageContext(storage_path, folder, filesystem)


def checkpoint_manager_snapshot(steps: Sequence[tuple[str, int]]) -> str:
    """Return the JSON of Ray Train's list of a run's checkpoints, for (folder name, step) pairs, the oldest first.

    Ray Train reads the list when a run is resumed. It has no public way to restore a list that was lost or damaged.
    """
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import (
        _CheckpointManagerState,
        _TrainingResultState,
    )

    results = [_TrainingResultState(checkpoint_dir_name=name, metrics={"step": step}) for name, step in steps]
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
    return str(state.model_dump_json())


# Ray Data


def silence_ray_data_console() -> None:
    """Print only Ray Data's errors; without this it prints messages even when progress bars are disabled."""
    from ray._private.log import PlainRayHandler

    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, PlainRayHandler):
            handler.setLevel(logging.ERROR)


def stop_execution(dataset: Dataset) -> None:
    """Stop the tasks of a dataset now; Ray Data stops an unfinished read only when it is garbage-collected."""
    executor = dataset._current_executor
    if executor is not None and not sys.is_finalizing():
        executor.shutdown(force=True)
