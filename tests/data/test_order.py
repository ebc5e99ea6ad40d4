"""The global order: weights are met in each prefix, each sequence occurs once per epoch, any position can be located."""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from savant_ray.config import Config
from savant_ray.data.order import GlobalOrder, permute, positions_in_order, rank_slice, weights_by_documents
from savant_ray.errors import DataError, SettingsError


def located(order: GlobalOrder, start: int, stop: int) -> list[tuple[int, int]]:
    """Return (source, row) of each position."""
    return list(zip(*(array.tolist() for array in order.locate(np.arange(start, stop))), strict=True))


@settings(max_examples=200, deadline=None)
@given(weights=st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_in_every_prefix_each_source_is_within_one_sequence_of_its_weight(weights: list[int]) -> None:
    sources, _ = GlobalOrder([5] * len(weights), weights, seed=1).locate(np.arange(2 * sum(weights) + 3))
    prefix = np.arange(1, len(sources) + 1)
    for source, weight in enumerate(weights):
        off = np.cumsum(sources == source) * sum(weights) - weight * prefix  # times the sum: whole numbers
        assert np.abs(off).max() < sum(weights)


@settings(max_examples=100, deadline=None)
@given(left_out=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=5))
def test_an_order_without_some_sequences_has_all_others_once_in_the_same_order(left_out: list[tuple[int, int]]) -> None:
    """Each entry counts in the numbering that the entries before it have left."""
    expected = list(range(500))
    for first, n_sequences in left_out:
        del expected[first : first + n_sequences]
    assert positions_in_order(np.arange(300), left_out).tolist() == expected[:300]


def test_the_default_mixture_is_four_to_one() -> None:
    sources = [source for source, _ in located(GlobalOrder([1_000, 10], [0.8, 0.2], seed=0), 0, 192)]
    assert abs(sources.count(0) - Fraction(8, 10) * 192) < 1


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 400), seed=st.integers(-5, 2**63), epoch=st.integers(0, 10**9))
def test_every_sequence_occurs_once_in_every_epoch(size: int, seed: int, epoch: int) -> None:
    rows = [row for _, row in located(GlobalOrder([size], [1.0], seed), epoch * size, (epoch + 1) * size)]
    assert sorted(rows) == list(range(size))


def test_the_order_differs_between_sources_epochs_and_seeds() -> None:
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


def test_positions_located_in_slices_equal_those_located_at_once() -> None:
    order = GlobalOrder([117, 30, 1], [0.7, 0.2, 0.1], seed=9)
    whole = located(order, 0, 1_000)
    assert [pair for start in range(0, 1_000, 7) for pair in located(order, start, min(start + 7, 1_000))] == whole


def test_a_position_far_from_the_start_can_be_located() -> None:
    """It is computed directly; counting up to it would take years."""
    sizes = np.array([10**12, 10**6])
    sources, rows = GlobalOrder(list(sizes), [0.8, 0.2], seed=0).locate(np.arange(10**15, 10**15 + 192))
    assert set(sources) == {0, 1} and (rows < sizes[sources]).all()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8, 12])
@pytest.mark.parametrize("effective_batch", [192, 7, 1])
def test_the_slices_of_all_ranks_together_are_the_step(world_size: int, effective_batch: int) -> None:
    slices = [rank_slice(effective_batch, rank, world_size) for rank in range(world_size)]
    assert [position for part in slices for position in part] == list(range(effective_batch))
    assert max(map(len, slices)) - min(map(len, slices)) <= 1


@given(n=st.integers(1, 200), world_size=st.integers(1, 20), group=st.integers(1, 30))
def test_the_slices_are_whole_groups_wherever_they_are_cut(n: int, world_size: int, group: int) -> None:
    slices = [rank_slice(n, rank, world_size, group) for rank in range(world_size)]
    assert [position for part in slices for position in part] == list(range(n))
    assert all(part.start % group == 0 for part in slices)
    n_groups = [-(-len(part) // group) for part in slices]
    assert max(n_groups) - min(n_groups) <= 1


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 5_000), key=st.integers(0, 2**64 - 1))
def test_each_key_selects_a_permutation(size: int, key: int) -> None:
    images = permute(np.arange(size), size, np.full(size, key, dtype=np.uint64))
    assert sorted(images.tolist()) == list(range(size))


@pytest.mark.parametrize("weights", [[0.5, 0.0], [1.0, -1.0], [float("nan"), 1.0], [1, 1e6], [1.0]])
def test_weights_that_are_not_positive_or_too_small_are_refused(weights: list[float]) -> None:
    with pytest.raises(SettingsError, match="weight"):
        GlobalOrder([3, 3], weights, seed=0)


@pytest.mark.parametrize(
    "weights",
    [
        [12345678, 98765431],
        [0.142857, 0.857143],
        [0.3141592653589793, 1.0],
        [1e308, 7e307, 3e303],
        [5e-324, 1.5e-323],
        [1 / 3, 1 / 7, 1 / 11, 1 / 13],
        [float(i) + 0.123 for i in range(1, 200)],
    ],
    ids=["token counts", "rounded sevenths", "many digits", "huge", "subnormal", "fractions", "199 sources"],
)
def test_any_positive_weights_are_met_to_within_one_sequence_in_100_000(weights: list[float]) -> None:
    n = 200_000
    sources, _ = GlobalOrder([5] * len(weights), weights, seed=1).locate(np.arange(n))
    total = sum(map(Fraction, weights))
    for source, weight in enumerate(weights):
        fraction = float(Fraction(weight) / total)
        off = np.cumsum(sources == source) - fraction * np.arange(1, n + 1)
        assert np.abs(off).max() < 1 + 2e-5 * n / 2
        assert (sources == source).any()


@pytest.mark.parametrize(
    ("weights", "digest"),
    [
        ([0.8, 0.2], "8434ea942626c369"),
        ([1, 2, 3], "932e51f50f4f3d84"),
        ([0.7, 0.2, 0.1], "4a61a7a0c4dc83c4"),
        ([5, 1, 1, 7, 3], "e187c673e05540ed"),
        ([0.33, 0.33, 0.34], "f5a7adb9c72c8287"),
        ([1.0], "3367bc6910a95f40"),
        ([317, 1009, 41], "ad03a96c4c6d241b"),
    ],
)
def test_the_order_of_earlier_runs_never_changes(weights: list[float], digest: str) -> None:
    """A checkpoint stores only a position, so with another order a resumed run would read the wrong sequences."""
    order = GlobalOrder([97 + i for i in range(len(weights))], weights, seed=11)
    source, row = order.locate(np.arange(5_000, 9_000))
    content = source.astype("<i8").tobytes() + row.astype("<i8").tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == digest


@pytest.mark.parametrize("weights", [[1, 99_999], [99_998, 1, 1], [1, 100_000], [99_999, 1, 1], [1e-300, 1e300]])
def test_the_settings_accept_the_weights_that_the_order_accepts(weights: list[float]) -> None:
    settings = {"sources": [{"path": "a.jsonl", "weight": weight} for weight in weights]}
    if Fraction(str(min(weights))) * 100_000 >= sum(Fraction(str(weight)) for weight in weights):
        Config.from_dict({"data": settings})
        sources, _ = GlobalOrder([9] * len(weights), weights, seed=0).locate(np.arange(100_000))
        assert set(sources.tolist()) == set(range(len(weights)))
        return
    with pytest.raises(SettingsError, match=r"data\.sources: weight 1.* less than 1 sequence in 100,000"):
        Config.from_dict({"data": settings})
    with pytest.raises(SettingsError, match="less than 1 in 100,000"):
        GlobalOrder([9] * len(weights), weights, seed=0)


# --- weights that are fractions of the documents

SOURCE = st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(1, 12))  # weight, documents, sequences
SOURCES = st.lists(SOURCE, min_size=1, max_size=5)


@settings(max_examples=100, deadline=None)
@given(sources=SOURCES)
def test_by_documents_each_source_is_within_one_sequence_in_every_prefix(sources: list[tuple[int, int, int]]) -> None:
    weights, documents, sequences = zip(*sources, strict=True)
    by_documents = [Fraction(w * s, d) for w, d, s in sources]
    order = GlobalOrder(sequences, weights_by_documents(weights, documents, sequences), seed=1)
    n = 3_000
    taken, _ = order.locate(np.arange(n))
    for source, weight in enumerate(by_documents):
        off = np.cumsum(taken == source) - float(weight / sum(by_documents)) * np.arange(1, n + 1)
        rounding = n / 100_000  # of weights whose period is longer
        assert np.abs(off).max() < 1 + rounding


@settings(max_examples=100, deadline=None)
@given(sources=SOURCES)
def test_after_whole_epochs_the_documents_are_in_proportion_to_the_weights(sources: list[tuple[int, int, int]]) -> None:
    weights, documents, sequences = zip(*sources, strict=True)
    fractions = weights_by_documents(weights, documents, sequences)
    epochs_of = [fraction / size for fraction, size in zip(fractions, sequences, strict=True)]  # in one position
    n = math.lcm(*(epochs.denominator for epochs in epochs_of))  # the first time that all epochs end together
    assume(n < 50_000)
    taken, rows = GlobalOrder(sequences, fractions, seed=2).locate(np.arange(n))
    seen = np.zeros(len(sources))
    for source, (_, n_documents, size) in enumerate(sources):
        in_sequence = np.bincount(np.arange(n_documents) % size, minlength=size)  # some sequences hold none
        seen[source] = in_sequence[rows[taken == source]].sum()
    assert [Fraction(int(count), int(seen.sum())) for count in seen] == [Fraction(w, sum(weights)) for w in weights]


@given(sources=SOURCES, per_sequence=st.fractions(Fraction(1, 50), 50, max_denominator=50), start=st.integers(0, 10**9))
@settings(max_examples=50, deadline=None)
def test_mixing_by_documents_changes_nothing_if_sequences_of_all_sources_have_equally_many(
    sources: list[tuple[int, int, int]], per_sequence: Fraction, start: int
) -> None:
    weights, _, sizes = zip(*sources, strict=True)
    sequences = [size * per_sequence.denominator for size in sizes]
    documents = [size * per_sequence.numerator for size in sizes]
    by_documents = weights_by_documents([0.1 * w for w in weights], documents, sequences)
    order, expected = (GlobalOrder(sequences, w, seed=3) for w in (by_documents, [0.1 * w for w in weights]))
    assert located(order, start, start + 500) == located(expected, start, start + 500)


def test_a_weight_of_documents_is_converted_to_a_weight_of_sequences() -> None:
    stories, logic = 0.8, 0.2
    assert weights_by_documents([stories, logic], [400, 4_000], [100, 100]) == (Fraction(40, 41), Fraction(1, 41))
    assert weights_by_documents([stories], [7], [100]) == (1,)


def test_documents_that_fill_many_sequences_count_as_one_each() -> None:
    assert weights_by_documents([1, 1], [10, 100], [1_000, 100]) == (Fraction(100, 101), Fraction(1, 101))


def test_weights_of_sources_with_millions_of_sequences_are_met_to_within_one_in_100_000() -> None:
    documents, sequences = [1_234_567, 7_654_321, 999_983], [3_456_789, 1_234_577, 77_773]
    fractions = weights_by_documents([0.7, 0.2, 0.1], documents, sequences)
    taken, _ = GlobalOrder(sequences, fractions, seed=1).locate(np.arange(200_000))
    for source, fraction in enumerate(fractions):
        off = np.cumsum(taken == source) - float(fraction) * np.arange(1, 200_001)
        assert np.abs(off).max() < 1 + 200_000 / 100_000


# --- what is refused


def test_an_empty_source_is_refused() -> None:
    with pytest.raises(DataError, match="source 1 yields no sequence"):
        GlobalOrder([3, 0], [1, 1], seed=0)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_located_rows_exist_in_their_source(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 10**9), min_size=1, max_size=5))
    weights = data.draw(st.lists(st.integers(1, 9), min_size=len(sizes), max_size=len(sizes)))
    start = data.draw(st.integers(0, 10**15))
    assume(sum(weights) > 0)
    sources, rows = GlobalOrder(sizes, weights, seed=4).locate(np.arange(start, start + 200))
    assert (rows >= 0).all()
    assert (rows < np.array(sizes)[sources]).all()
