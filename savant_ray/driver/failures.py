"""Turns what Ray reports about a failed run into a message that names the worker, the cause and what to do."""

from __future__ import annotations

import traceback
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ray.exceptions import RayActorError, RayError
from ray.train import ControllerError, UserCallback, WorkerGroupError

from savant_ray.errors import SavantError, TrainingError, UnexpectedError, describe, error_class
from savant_ray.events import RunFailed, WorkersLost
from savant_ray.training.device import DeviceMemoryError
from savant_ray.training.rank_comparison import RanksDifferError

HEADING = "Training failed due to worker errors"
# Parts of messages. Ray Train wraps Ray's errors, so their types are lost.
DEAD_ACTOR = ("died", "is unavailable")
OUT_OF_MEMORY = ("outofmemoryerror", "memory monitor", "running low on memory", "due to oom", "out of memory issue")
# Not every error of NCCL: it also reports two workers on one GPU, or too little shared or GPU memory.
LOST_CONNECTION = (
    "Connection closed by peer",
    "Connection closed by remote peer",
    "Connection refused",
    "Connection reset by peer",
    "Broken pipe",
    "ncclInternalError",
    "ncclRemoteError",
    "NCCL communicator was aborted",
    "WorkNCCL",
)


def explain_failure(
    error: BaseException | None, reported: RunFailed | None, newest: str, max_failures: int, hang: str = ""
) -> SavantError:
    """Return the error for the user.

    Args:
        error: what `fit()` raised, None if it returned.
        reported: the error that a worker reported before it ended, None if it reported none.
        newest: name of the checkpoint from which the run would resume.
        max_failures: `scaling.max_failures`.
        hang: why the driver killed the worker that failed last, "" if it did not.

    An unexpected error in a worker becomes an `UnexpectedError` with the worker's traceback.
    """
    if reported is not None:
        return error_class(reported.error, TrainingError)(reported.text)
    advice = f"When the cause is fixed, run the same command again to resume from {newest}."
    if not isinstance(error, WorkerGroupError) or not error.worker_failures:  # Ray Train's `NCCLHangError` has none
        details = "" if error is None else "".join(traceback.format_exception(error))
        reason = "no reason was given" if error is None else _reason(error)
        return UnexpectedError(f"training ended: {reason}\n{advice}", details)
    _, root_cause = _root_failure(error.worker_failures)
    summary = hang or _summarize(error.worker_failures)
    message = f"{summary}\nThe workers were restarted as often as scaling.max_failures: {max_failures} allows."
    if isinstance(root_cause, UnexpectedError):
        return UnexpectedError(f"{message} {advice}", root_cause.details)
    return TrainingError(f"{message} Ray's error is in training_log.txt. {advice}")


def _reason(error: BaseException) -> str:
    """Return one line as `describe`, without the heading with which Ray Train's messages begin."""
    if isinstance(error, ControllerError):
        return describe(error.controller_failure)
    heading, _, text = str(error).partition(":\n")
    return f"{type(error).__name__}: {text.splitlines()[0]}" if heading == HEADING and text else describe(error)


@contextmanager
def ray_errors_explained() -> Iterator[None]:
    """Turn an error of Ray in the driver itself (its head is gone, the bridge died) into a `TrainingError`."""
    try:
        yield
    except RayError as error:
        cause = getattr(error, "cause", None)
        if cause is not None and not isinstance(cause, RayError):  # raised by our code in a task
            raise
        raise TrainingError(
            f"Ray failed: {_explain(error)}\nRun the same command again to resume from the last checkpoint."
        ) from error


class FailureCallback(UserCallback):
    """Reports to the driver that workers failed; runs in Ray Train's controller before it restarts them."""

    def __init__(self, bridge: Any) -> None:
        self._bridge = bridge

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, BaseException]) -> None:
        """Send the failures by rank to the bridge; called by Ray Train."""
        self._bridge.send.remote(WorkersLost(text=_summarize(worker_exceptions)), sender=uuid.uuid4().hex, number=0)


def _root_failure(failures: Mapping[int, BaseException]) -> tuple[int, BaseException]:
    """Return rank and error of the worker whose failure made the others fail.

    That is the first whose error is not a lost connection to another worker; if all are, the first.
    """
    return min(failures.items(), key=lambda item: _is_lost_connection(item[1]))


def _summarize(failures: Mapping[int, BaseException]) -> str:
    """Return one line about the worker whose failure made the others fail."""
    rank, failure = _root_failure(failures)
    return f"worker {rank}: {_explain(failure)}"


def _is_lost_connection(failure: BaseException) -> bool:
    return any(part in _full_text(failure) for part in LOST_CONNECTION)


def _full_text(failure: BaseException) -> str:
    """Return the message, and for an unexpected error the end of its traceback, because its message is one line only."""
    if isinstance(failure, UnexpectedError):
        return f"{failure}\n{failure.details.rpartition('  File ')[2]}"
    return str(failure)


def _explain(failure: BaseException) -> str:
    text = _full_text(failure)
    for own_error in (
        DeviceMemoryError,
        RanksDifferError,
    ):  # checked before CUDA's error, which the text may also contain
        if own_error.__name__ in text:
            return _last_line(failure).rpartition(f"{own_error.__name__}: ")[2]
    if "CUDA out of memory" in text:
        return (
            "its GPU memory was not sufficient; stop other programs that use the GPU, or raise training.vram_limit_gb if "
            "the GPU has more"
        )
    if "out of resource" in text:  # a kernel needs more registers or shared memory than the GPU has
        return _last_line(failure)
    if any(part in text.lower() for part in OUT_OF_MEMORY):
        return (
            "its node ran out of memory, so Ray ended it; reduce its memory use (a lower training.batch_size or "
            "scaling.num_workers, training.recompute_loops: true), or stop other programs there"
        )
    if _is_lost_connection(failure):  # to a worker that has died, which Ray detects only half a minute later
        return "it lost its connection to another worker: that one was killed, ran out of memory, or its node is gone"
    if isinstance(failure, RayActorError) or any(part in text for part in DEAD_ACTOR):
        return "it died: it was killed, ran out of memory, or its node is gone"
    return _last_line(failure)


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
