"""What Ray says of a lost worker becomes what the user can do about it."""

from __future__ import annotations

import traceback

import pytest
import torch
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

from savant_ray.cluster.failures import _in_words
from savant_ray.training.fitting import retry_on_oom


@pytest.mark.parametrize(
    "said",
    [
        "The actor 8f6e is unavailable: The actor is temporarily unavailable: RpcError: failed to connect to all addresses",
        "The actor died because its node has died. Node Id: 13ab",
    ],
)
def test_a_worker_that_cannot_be_reached_is_lost_with_its_node_or_killed(said: str) -> None:
    assert _in_words(RuntimeError(said)) == "it died: it was killed, ran out of memory, or its node is gone"


def test_a_save_that_ran_out_of_gpu_memory_is_named_and_not_the_batch_size() -> None:
    def no_room() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    try:
        retry_on_oom(no_room, torch.device("cpu"), "copying step 4 for its checkpoint")
    except RuntimeError as error:
        said = _in_words(UserExceptionWithTraceback(error, traceback_str=traceback.format_exc()))
    assert said.startswith("copying step 4 for its checkpoint ran out of device memory twice") and "\n" not in said
