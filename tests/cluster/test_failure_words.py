"""What Ray says of a lost worker becomes what the user can do about it."""

from __future__ import annotations

import pytest

from savant_ray.cluster.failures import _in_words


@pytest.mark.parametrize(
    "said",
    [
        "The actor 8f6e is unavailable: The actor is temporarily unavailable: RpcError: failed to connect to all addresses",
        "The actor died because its node has died. Node Id: 13ab",
    ],
)
def test_a_worker_that_cannot_be_reached_is_lost_with_its_node_or_killed(said: str) -> None:
    assert _in_words(RuntimeError(said)) == "it died: it was killed, ran out of memory, or its node is gone"
