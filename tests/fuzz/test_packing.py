"""Packing: every token once and in order, documents uncut where they fit, padding only at the end of a row."""

from __future__ import annotations

from random import Random

import numpy as np

from savant_ray.data.packing import MAX_PADDING, Packing, pack
from tests.fuzz.drawing import from_seed
from tests.fuzz.property import holds_for


def lengths_and_row(rng: Random) -> tuple[list[int], int]:
    """Return lengths of documents, and the length of a row."""
    row = rng.choice((1, 2, 3, 7, 16, 64, 256))
    most = rng.choice((1, 2, row, row // 2 + 1, row + 1, 3 * row, 8 * row))
    fewest = rng.choice((0, 1, most // 2, most))
    return [rng.randint(min(fewest, most), most) for _ in range(rng.choice((0, 1, 2, 5, 20, 60)))], row


def waste_uncut(lengths: list[int], row: int) -> tuple[int, int]:
    """Return rows and padding of best-fit decreasing, computed simply; only documents longer than a row are cut."""
    gaps: list[int] = []
    for length in sorted((n % row for n in lengths if n % row), reverse=True):
        fitting = [gap for gap in gaps if gap >= length]
        if fitting:
            gaps.remove(min(fitting))
        gaps.append((min(fitting) if fitting else row) - length)
    return len(gaps), sum(gaps)


def pieces_by_row(packing: Packing) -> list[list[tuple[int, int, int]]]:
    """Return (document, start, length) of the pieces of each row."""
    pieces = list(zip(packing.documents.tolist(), packing.starts.tolist(), packing.lengths.tolist(), strict=True))
    ends = packing.row_ends.tolist()
    return [pieces[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


@holds_for(
    "up to 60 documents of 0 to 8 rows' length, rows of 1 to 256 tokens", quick=300, case=from_seed(lengths_and_row)
)
def test_every_token_is_packed_once_in_order_and_documents_are_cut_only_to_avoid_padding(
    case: tuple[list[int], int],
) -> None:
    lengths, row_length = case
    packing = pack(lengths, row_length)
    starts = np.cumsum([0, *lengths], dtype=np.int64)[:-1]
    rows = packing.fill(np.arange(1, sum(lengths) + 1, dtype=np.uint32), starts)
    assert rows.shape == (len(packing), row_length)
    seen: dict[int, list[tuple[int, int]]] = {}
    for row, pieces in zip(rows.tolist(), pieces_by_row(packing), strict=True):
        tokens: list[int] = []
        for document, start, length in pieces:
            assert length > 0 and start + length <= lengths[document]
            tokens += range(int(starts[document]) + start + 1, int(starts[document]) + start + length + 1)
            seen.setdefault(document, []).append((start, length))
        assert 0 < len(tokens) <= row_length and row == tokens + [0] * (row_length - len(tokens))
    for document, length in enumerate(lengths):
        at = 0
        for start, size in sorted(seen.get(document, [])):
            assert start == at, "lost or duplicated"
            at += size
        assert at == length
    check_cuts(lengths, row_length, seen, rows.size - sum(lengths))


def check_cuts(lengths: list[int], row_length: int, seen: dict[int, list[tuple[int, int]]], padding: int) -> None:
    uncut_rows, uncut_padding = waste_uncut(lengths, row_length)
    worth_cutting = uncut_padding >= max(row_length, MAX_PADDING * uncut_rows * row_length)
    assert padding < max(row_length, MAX_PADDING * uncut_rows * row_length) or padding == uncut_padding == 0
    for document, pieces in seen.items():
        assert worth_cutting or len(pieces) == -(-lengths[document] // row_length), "cut where it fits"


def test_packing_no_documents_gives_no_rows() -> None:
    packing = pack([], 8)
    assert len(packing) == 0
    assert packing.fill(np.zeros(0, dtype=np.uint16), np.zeros(0, dtype=np.int64)).shape == (0, 8)
