"""Ray's errors about failed workers become messages with the cause and advice."""

from __future__ import annotations

import traceback

import pytest
import torch
from ray.exceptions import RayTaskError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2.api.exceptions import NCCLHangError

from savant_ray.driver.failures import explain_failure, ray_errors_explained
from savant_ray.errors import UnexpectedError, describe
from savant_ray.training.device import retry_on_oom
from savant_ray.training.rank_comparison import RanksDifferError


def explanation(failure: Exception) -> str:
    """Return what the error for the user says about the failure of the only worker."""
    error = explain_failure(WorkerGroupError("a worker failed", {0: failure}), None, "step_4", max_failures=3)
    worker, cause = str(error).splitlines()[0].split(": ", 1)
    assert worker == "worker 0"
    return cause


@pytest.mark.parametrize(
    "ray_message",
    [
        "The actor 8f6e is unavailable: The actor is temporarily unavailable: RpcError: failed to connect to all addresses",
        "The actor died because its node has died. Node Id: 13ab",
    ],
)
def test_an_unreachable_worker_is_reported_with_its_possible_causes(ray_message: str) -> None:
    assert all(cause in explanation(RuntimeError(ray_message)) for cause in ("killed", "out of memory", "node"))


def test_running_out_of_gpu_memory_during_a_save_names_the_save() -> None:
    def no_room() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    try:
        retry_on_oom(no_room, torch.device("cpu"), "copying step 4 for its checkpoint")
    except RuntimeError as error:
        explained = explanation(UserExceptionWithTraceback(error, traceback_str=traceback.format_exc()))
    assert explained.startswith("copying step 4 for its checkpoint ran out of device memory twice")


SHARED_MEMORY = (
    "Error while creating shared memory segment /dev/shm/nccl-ZfJ (size 33030528), error: No space left on device"
)
KERNEL = "No valid triton configs. OutOfMemoryError: out of resource: fused_0 Required: 114688 Hardware limit:101376"


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        ("NCCL error: ncclRemoteError: A call failed\nLast error:\nNET/Socket : peer", "it lost its connection"),
        (
            "NCCL error: unhandled system error\nncclSystemError: System call failed\nLast error:\n" + SHARED_MEMORY,
            "/dev/shm",
        ),
        (
            "NCCL error: ncclInvalidUsage\nLast error:\nDuplicate GPU detected : rank 0 and rank 1 both on CUDA",
            "Duplicate GPU",
        ),
        ("Distributed package doesn't have NCCL built in", "doesn't have NCCL built in"),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", "raise training.vram_limit_gb if the GPU has more"),
        (KERNEL, "Hardware limit:101376"),
    ],
)
def test_errors_of_nccl_and_of_kernels_keep_their_cause(message: str, cause: str) -> None:
    assert cause in explanation(RuntimeError(message))


def as_a_worker_raises_it(error: Exception, activity: str = "training") -> UnexpectedError:
    try:
        raise error
    except Exception:
        return UnexpectedError(describe(error, activity), traceback.format_exc())


def test_an_unexpected_error_in_a_worker_is_reported_with_activity_and_traceback() -> None:
    failures: dict[int, Exception] = {0: as_a_worker_raises_it(RuntimeError("broken\nConnection closed by peer"))}
    failures[1] = as_a_worker_raises_it(ValueError("invalid literal"), "saving step_5")
    explained = explain_failure(WorkerGroupError("workers failed", failures), None, "step_4", max_failures=3)
    first, second = str(explained).splitlines()
    assert first == "worker 1: while saving step_5: ValueError: invalid literal"
    assert "scaling.max_failures: 3" in second and second.endswith("resume from step_4.")
    assert isinstance(explained, UnexpectedError) and "raise error\n" in explained.details


def test_a_hang_that_ray_trains_own_detector_reports_without_a_worker_is_reported_with_ray_trains_text() -> None:
    explained = explain_failure(NCCLHangError("1 of 3 communicators made no progress", {}), None, "step_4", 3)
    assert str(explained).startswith("training ended: NCCLHangError: 1 of 3 communicators made no progress\n")
    assert isinstance(explained, UnexpectedError) and str(explained).endswith("resume from step_4.")


def test_an_error_in_ray_trains_controller_is_reported_with_its_cause() -> None:
    error = ControllerError(PermissionError(13, "Permission denied", "/runs/quickstart"))
    explained = explain_failure(error, None, "step_4", max_failures=3)
    assert str(explained).startswith("training ended: /runs/quickstart: Permission denied\n")


def test_an_error_of_our_code_in_a_ray_task_keeps_its_cause() -> None:
    with pytest.raises(RayTaskError), ray_errors_explained():
        raise RayTaskError("tokenise", "Traceback …", ZeroDivisionError("division by zero"))


def test_ranks_that_differ_are_reported_without_the_python_around_it() -> None:
    error = as_a_worker_raises_it(RanksDifferError("rank 2 has different weights after step 300: an error of memory"))
    failures: dict[int, Exception] = dict.fromkeys(range(3), error)
    explained = explain_failure(WorkerGroupError("workers failed", failures), None, "step_200", max_failures=3)
    assert str(explained).startswith("worker 0: rank 2 has different weights after step 300: an error of memory\n")
