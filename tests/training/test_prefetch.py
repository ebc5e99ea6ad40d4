"""Prefetched batches are the same, and a run that stops leaves no thread behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from savant_ray.events import StepDone
from savant_ray.training.loop import train
from savant_ray.training.prefetch import prefetch
from tests.training.tiny import RecordingHost, shares, tiny_config, tiny_state, weights

PATIENCE = 60  # seconds


def fetchers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def wait_until_gone() -> None:
    deadline = time.monotonic() + PATIENCE
    while fetchers():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("n", [0, 1, 5])
def test_the_same_items_come_in_the_same_order_and_the_thread_ends(n: int) -> None:
    prepared: list[str] = []
    items = prefetch((i for i in range(n)), lambda: prepared.append(threading.current_thread().name))
    assert list(items) == list(range(n))
    assert len(prepared) == 1 and prepared[0].startswith("prefetch")
    wait_until_gone()


def test_the_next_item_is_fetched_while_one_is_used_and_the_first_does_not_wait_for_it() -> None:
    second_asked, second_may_come = threading.Event(), threading.Event()

    def source() -> Iterator[int]:
        yield 1
        second_asked.set()
        assert second_may_come.wait(PATIENCE)
        yield 2

    items = prefetch(source())
    assert next(items) == 1, "though the second is not there"
    assert second_asked.wait(PATIENCE)
    second_may_come.set()
    assert list(items) == [2]


def test_an_error_comes_where_the_item_would_have_come() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    items = prefetch(source())
    assert next(items) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(items)
    wait_until_gone()


def test_when_it_is_dropped_the_source_is_closed_and_the_thread_ends() -> None:
    closed = threading.Event()

    def source() -> Iterator[int]:
        try:
            yield from range(1_000_000)
        finally:
            closed.set()

    for item in prefetch(source()):
        if item == 3:
            break
    assert closed.wait(PATIENCE)
    wait_until_gone()


def test_a_run_that_stops_and_goes_on_over_shares_fetched_ahead_is_the_run_without() -> None:
    config = tiny_config()
    straight, state = RecordingHost(), tiny_state(config)
    train(state, config, shares(state, config), straight)

    first, stopped = RecordingHost(stop_at=3), tiny_state(config)
    assert not train(stopped, config, prefetch(shares(stopped, config)), first)
    second, resumed = RecordingHost(), tiny_state(config)
    resumed.load_checkpoint(first.checkpoint)
    assert resumed.position == 3 * 12, "what was fetched and not trained on does not count"
    assert train(resumed, config, prefetch(shares(resumed, config)), second)
    told = [event.train_loss for event in first.events + second.events if isinstance(event, StepDone)]
    assert told == [event.train_loss for event in straight.events if isinstance(event, StepDone)]
    assert all(torch.equal(w, weights(resumed)[name]) for name, w in weights(state).items())
    wait_until_gone()
