"""What to say of a run that Ray Train gave up: whose failure it was, and what to do."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ray.exceptions import RayActorError, RayError
from ray.train import UserCallback, WorkerGroupError

from savant_ray.errors import SavantError, TrainingError, UnexpectedError, describe
from savant_ray.events import RunFailed, WorkersLost
from savant_ray.training.device import DeviceMemoryError

GONE = ("died", "is unavailable")  # Ray Train wraps what Ray says of an actor
OUT_OF_MEMORY = ("outofmemoryerror", "memory monitor", "running low on memory", "due to oom", "out of memory issue")
CONSEQUENCES = ("Connection closed by peer", "Connection reset by peer", "NCCL", "Broken pipe")  # of another's failure


def explain_failure(error: BaseException | None, told: RunFailed | None, newest: str, max_failures: int) -> SavantError:
    """What a worker `told` before it gave up, or what Ray says of it; `newest` names where the run would go on.

    What nobody foresaw in a worker's code becomes an `UnexpectedError` with the worker's traceback.
    """
    if told is not None:
        kinds = {kind.__name__: kind for kind in SavantError.__subclasses__()}
        return kinds.get(told.error, TrainingError)(told.text)
    again = f"It was tried again {max_failures} times (scaling.max_failures)."
    go_on = f"When the cause is mended, run the same command again to go on from {newest}."
    if not isinstance(error, WorkerGroupError):
        details = "" if error is None else "".join(traceback.format_exception(error))
        reason = "without a reason" if error is None else describe(error)
        return UnexpectedError(f"training ended: {reason}\n{go_on}", details)
    culprit = _culprit(error.worker_failures)[1]
    message = f"{_first_failure(error.worker_failures)}\n{again}"
    if isinstance(culprit, UnexpectedError):
        return UnexpectedError(f"{message} {go_on}", culprit.details)
    return TrainingError(f"{message} What Ray knows is in training_log.txt. {go_on}")


@contextmanager
def ray_errors_explained() -> Iterator[None]:
    """Turns what Ray raises in the driver itself (its head is gone, the bridge died) into a `TrainingError`."""
    try:
        yield
    except RayError as error:
        cause = getattr(error, "cause", None)
        if cause is not None and not isinstance(cause, RayError):  # our code's, in a task: the last resort names it
            raise
        raise TrainingError(
            f"Ray failed: {_in_words(error)}\nRun the same command again to go on from the last checkpoint."
        ) from error


class FailureNews(UserCallback):
    """Tells the driver at once that workers failed; lives in Ray Train's controller, which starts them again."""

    def __init__(self, bridge: Any) -> None:
        self._bridge = bridge

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, BaseException]) -> None:
        """Called by Ray Train with what each failed rank raised or died of."""
        self._bridge.tell.remote(WorkersLost(text=_first_failure(worker_exceptions)))


def _culprit(failures: Mapping[int, BaseException]) -> tuple[int, BaseException]:
    """The worker whose failure made the others fail."""
    return min(failures.items(), key=lambda item: _is_consequence(item[1]))


def _first_failure(failures: Mapping[int, BaseException]) -> str:
    """One line for the culprit."""
    rank, failure = _culprit(failures)
    return f"worker {rank}: {_in_words(failure)}"


def _is_consequence(failure: BaseException) -> bool:
    return any(sign in _text_of(failure) for sign in CONSEQUENCES)


def _text_of(failure: BaseException) -> str:
    """All that it says: our worker puts the first line into the message, the whole text ends the traceback."""
    if isinstance(failure, UnexpectedError):
        return f"{failure}\n{failure.details.rpartition('  File ')[2]}"
    return str(failure)


def _in_words(failure: BaseException) -> str:
    text = _text_of(failure)
    if DeviceMemoryError.__name__ in text:  # says what was being done; the error it came from is in the text as well
        return _last_line(failure).rpartition(f"{DeviceMemoryError.__name__}: ")[2]
    if "CUDA out of memory" in text:
        return (
            "its GPU memory, training.vram_limit_gb, did not suffice; lower training.batch_size and raise accumulation"
        )
    if any(sign in text.lower() for sign in OUT_OF_MEMORY):
        return (
            "its node ran out of memory, so Ray ended it; give it less to hold (a lower training.batch_size or "
            "scaling.num_workers, training.recompute_loops: true), or stop what else runs there"
        )
    if _is_consequence(failure):  # the other one's death is known to Ray only half a minute later
        return "it lost its connection to another worker: that one was killed, ran out of memory, or its node is gone"
    if isinstance(failure, RayActorError) or any(sign in text for sign in GONE):
        return "it died: it was killed, ran out of memory, or its node is gone"
    return _last_line(failure)


def _last_line(error: BaseException | None) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
