"""Packing: no token is lost or duplicated, and there is little padding."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from savant_ray.data.packing import pack


def unpack(lengths: list[int], sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack the tokens 1, 2, 3 …; return the rows, and the documents that were cut."""
    tokens = np.arange(1, sum(lengths) + 1, dtype=np.uint32)
    packing = pack(lengths, sequence_length)
    rows = packing.fill(tokens, np.cumsum(lengths) - np.array(lengths, dtype=np.int64))
    return rows, np.unique(packing.documents[packing.starts > 0])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=60), st.sampled_from([1, 2, 7, 16, 64]))
def test_every_token_is_in_one_row_and_pieces_stay_in_order(lengths: list[int], sequence_length: int) -> None:
    rows, _ = unpack(lengths, sequence_length)
    assert rows.shape[1] == sequence_length
    assert sorted(rows[rows > 0].tolist()) == list(range(1, sum(lengths) + 1))
    assert rows.size - sum(lengths) < sequence_length + 0.001 * rows.size
    packing = pack(lengths, sequence_length)
    row_of_piece = np.repeat(np.arange(len(packing)), np.diff(packing.row_ends, prepend=0))
    assert np.bincount(row_of_piece, weights=packing.lengths).max() <= sequence_length
    for document, length in enumerate(lengths):
        mine = packing.documents == document
        begins, ends = packing.starts[mine], packing.starts[mine] + packing.lengths[mine]
        assert sorted([*begins.tolist(), length]) == sorted([0, *ends.tolist()])


@pytest.mark.parametrize("sequence_length", [256, 512, 1024])
@pytest.mark.parametrize("median", [60, 200, 700])
def test_padding_is_below_0_2_percent_and_few_documents_are_cut(median: int, sequence_length: int) -> None:
    lengths = np.random.default_rng(0).lognormal(np.log(median), 0.8, size=20_000).astype(int) + 2
    rows, cut = unpack(lengths.tolist(), sequence_length)
    assert (rows == 0).mean() < 0.002
    too_long = (lengths > sequence_length).sum()
    assert len(cut) <= too_long + 0.01 * len(lengths)


def test_documents_of_more_than_half_a_row_are_cut_to_fill_the_gaps() -> None:
    rows, cut = unpack([150] * 1_000, 256)
    assert (rows == 0).mean() < 0.002
    assert len(cut) <= 420  # 1000 documents in 586 rows: 414 have to be divided


def test_packing_is_deterministic() -> None:
    lengths = np.random.default_rng(1).integers(1, 900, size=3_000).tolist()
    first, second = pack(lengths, 512), pack(lengths, 512)
    assert all(np.array_equal(getattr(first, key), getattr(second, key)) for key in ("documents", "starts", "row_ends"))


def test_a_million_tokens_take_less_than_a_second() -> None:
    lengths = np.random.default_rng(2).integers(2, 400, size=5_000).tolist()
    started = time.process_time()
    unpack(lengths, 1024)
    assert time.process_time() - started < sum(lengths) / 1e6
