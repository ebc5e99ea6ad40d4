"""Documents → rows of exactly `sequence_length` tokens, told as pieces: which part of which document lies where.

Padding every document to a row wastes 19 to 55 %, concatenate-and-split cuts 44 to 88 % of the documents. Best-fit
decreasing cuts only what is longer than a row; where its gaps come to more than WASTE, the emptiest rows are poured
into the largest gaps, which cuts as few further documents as possible.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

WASTE = 0.0005  # share of padding below which no further document is cut


class Piece(NamedTuple):
    """Tokens [start, start + length) of a document."""

    document: int
    start: int
    length: int


Row = list[Piece]


@dataclass(frozen=True)
class Packing:
    """The pieces of all rows, row after row; `row_ends[i]` is the number of pieces up to the end of row i."""

    sequence_length: int
    documents: NDArray[np.int64]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    row_ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.row_ends)

    def fill(self, tokens: NDArray[Any], document_starts: NDArray[np.int64]) -> NDArray[Any]:
        """The rows [N, sequence_length]; document d's tokens begin at `tokens[document_starts[d]]`; padding is 0."""
        rows = np.zeros((len(self), self.sequence_length), dtype=tokens.dtype)
        first_of_piece = np.cumsum(self.lengths) - self.lengths
        origin = document_starts[self.documents] + self.starts - first_of_piece
        filled = np.diff(np.concatenate(([0], np.cumsum(self.lengths)[self.row_ends - 1])))
        rows[np.arange(self.sequence_length) < filled[:, None]] = tokens[
            np.repeat(origin, self.lengths) + np.arange(self.lengths.sum())
        ]
        return rows


def pack(lengths: Sequence[int], sequence_length: int) -> Packing:
    """Rows that hold every token of documents of these lengths exactly once; the same lengths give the same rows."""
    full, rest = _cut_long(lengths, sequence_length)
    rows = [[piece] for piece in full] + _top_up(*_best_fit(rest, sequence_length), sequence_length)
    pieces = np.array([piece for row in rows for piece in row], dtype=np.int64).reshape(-1, 3)
    documents, starts, sizes = pieces.T
    row_ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
    return Packing(sequence_length, documents, starts, sizes, row_ends)


def _cut_long(lengths: Sequence[int], sequence_length: int) -> tuple[list[Piece], list[Piece]]:
    """Pieces that fill a row by themselves, and the shorter rest of every document, longest first."""
    full, rest = [], []
    for document, length in enumerate(lengths):
        whole = length - length % sequence_length
        full += [Piece(document, start, sequence_length) for start in range(0, whole, sequence_length)]
        if whole < length:
            rest.append(Piece(document, whole, length - whole))
    return full, sorted(rest, key=lambda piece: -piece.length)


def _best_fit(pieces: list[Piece], sequence_length: int) -> tuple[list[Row], list[int]]:
    """Each piece goes to the row where it leaves the smallest gap; returns the rows and their gaps."""
    rows: list[Row] = []
    gaps: list[int] = []
    rows_with_gap: list[list[int]] = [[] for _ in range(sequence_length + 1)]
    present = 0  # bit g is set where rows_with_gap[g] is not empty
    for piece in pieces:
        fitting = present >> piece.length
        if fitting:
            gap = piece.length + (fitting & -fitting).bit_length() - 1
            row = rows_with_gap[gap].pop()
            present ^= (not rows_with_gap[gap]) << gap
        else:
            gap, row = sequence_length, len(rows)
            rows.append([])
            gaps.append(gap)
        rows[row].append(piece)
        gaps[row] = left = gap - piece.length
        if left:
            rows_with_gap[left].append(row)
            present |= 1 << left
    return rows, gaps


def _top_up(rows: list[Row], gaps: list[int], sequence_length: int) -> list[Row]:
    """Pours the emptiest row into the largest gaps of the others, until little padding or less than a row is left."""
    largest = [(-gap, row) for row, gap in enumerate(gaps) if gap]
    heapq.heapify(largest)
    padding, allowed = sum(gaps), WASTE * len(rows) * sequence_length
    while padding >= max(sequence_length, allowed):
        _, emptiest = heapq.heappop(largest)
        padding -= sequence_length
        pieces, rows[emptiest] = rows[emptiest], []
        for piece in pieces:
            _pour(piece, rows, largest)
    return [row for row in rows if row]


def _pour(piece: Piece, rows: list[Row], largest: list[tuple[int, int]]) -> None:
    while piece.length:
        negative_gap, row = heapq.heappop(largest)
        taken = min(piece.length, -negative_gap)
        rows[row].append(piece._replace(length=taken))
        piece = Piece(piece.document, piece.start + taken, piece.length - taken)
        if taken < -negative_gap:
            heapq.heappush(largest, (negative_gap + taken, row))
