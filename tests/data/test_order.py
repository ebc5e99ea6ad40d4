"""The order is a pure function: weights exact in each prefix, each sequence once per epoch, any start at once."""

from __future__ import annotations

import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from savant_ray.data.order import GlobalOrder, permute, share
from savant_ray.errors import DataError, SettingsError


def located(order: GlobalOrder, start: int, stop: int) -> list[tuple[int, int]]:
    """(source, row) at each position."""
    return list(zip(*(array.tolist() for array in order.locate(np.arange(start, stop))), strict=True))


@settings(max_examples=200, deadline=None)
@given(weights=st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_in_every_prefix_each_source_is_within_one_of_its_weight(weights: list[int]) -> None:
    sources, _ = GlobalOrder([5] * len(weights), weights, seed=1).locate(np.arange(2 * sum(weights) + 3))
    prefix = np.arange(1, len(sources) + 1)
    for source, weight in enumerate(weights):
        off = np.cumsum(sources == source) * sum(weights) - weight * prefix  # times the sum: whole numbers
        assert np.abs(off).max() < sum(weights)


def test_the_default_mixture_is_four_to_one() -> None:
    sources = [source for source, _ in located(GlobalOrder([1_000, 10], [0.8, 0.2], seed=0), 0, 192)]
    assert abs(sources.count(0) - Fraction(8, 10) * 192) < 1


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 400), seed=st.integers(-5, 2**63), epoch=st.integers(0, 10**9))
def test_every_sequence_comes_once_in_every_epoch(size: int, seed: int, epoch: int) -> None:
    rows = [row for _, row in located(GlobalOrder([size], [1.0], seed), epoch * size, (epoch + 1) * size)]
    assert sorted(rows) == list(range(size))


def test_every_source_is_reshuffled_every_epoch_and_by_seed() -> None:
    def epoch(seed: int, source: int, number: int) -> list[int]:
        order = GlobalOrder([50, 50], [1, 1], seed)
        return [row for s, row in located(order, number * 100, (number + 1) * 100) if s == source]

    orders = [tuple(epoch(*key)) for key in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 1, 1)]]
    assert len(set(orders)) == len(orders)
    assert tuple(range(50)) not in orders


def test_all_permutations_of_four_are_equally_likely() -> None:
    epochs = 24_000
    rows = GlobalOrder([4], [1], seed=3).locate(np.arange(4 * epochs))[1].reshape(epochs, 4)
    counts = np.unique(rows @ 4 ** np.arange(4), return_counts=True)[1]
    assert len(counts) == 24
    assert ((counts - 1_000) ** 2 / 1_000).sum() < 60  # chi-square with 23 degrees of freedom


def test_any_slice_is_the_slice_of_the_whole() -> None:
    order = GlobalOrder([117, 30, 1], [0.7, 0.2, 0.1], seed=9)
    whole = located(order, 0, 1_000)
    assert [pair for start in range(0, 1_000, 7) for pair in located(order, start, min(start + 7, 1_000))] == whole


def test_a_far_start_costs_what_the_first_does() -> None:
    order = GlobalOrder([10**12, 10**6], [0.8, 0.2], seed=0)

    def seconds(start: int) -> float:
        begun = time.process_time()
        for _ in range(50):
            order.locate(np.arange(start, start + 192))
        return time.process_time() - begun

    seconds(0)
    assert seconds(10**15) < 5 * seconds(0) + 0.05


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8, 12])
@pytest.mark.parametrize("effective_batch", [192, 7, 1])
def test_the_shares_of_all_ranks_are_the_step(world_size: int, effective_batch: int) -> None:
    shares = [share(effective_batch, rank, world_size) for rank in range(world_size)]
    assert [position for part in shares for position in part] == list(range(effective_batch))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 5_000), key=st.integers(0, 2**64 - 1))
def test_a_key_permutes(size: int, key: int) -> None:
    images = permute(np.arange(size), size, np.full(size, key, dtype=np.uint64))
    assert sorted(images.tolist()) == list(range(size))


@pytest.mark.parametrize("weights", [[0.5, 0.0], [1.0, -1.0], [float("nan"), 1.0], [0.3141592653589793, 1.0], [1.0]])
def test_silly_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(SettingsError, match="weight"):
        GlobalOrder([3, 3], weights, seed=0)


def test_an_empty_source_is_refused() -> None:
    with pytest.raises(DataError, match="source 1 yields no sequence"):
        GlobalOrder([3, 0], [1, 1], seed=0)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_rows_lie_in_their_source(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 10**9), min_size=1, max_size=5))
    weights = data.draw(st.lists(st.integers(1, 9), min_size=len(sizes), max_size=len(sizes)))
    start = data.draw(st.integers(0, 10**15))
    assume(sum(weights) > 0)
    sources, rows = GlobalOrder(sizes, weights, seed=4).locate(np.arange(start, start + 200))
    assert (rows >= 0).all()
    assert (rows < np.array(sizes)[sources]).all()
