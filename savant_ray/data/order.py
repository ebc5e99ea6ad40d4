"""Global order of the sequences: the sequence at position p is a pure function of (seed, p).

The order is infinite. No state is stored and nothing is replayed, so that resuming at any position takes the same time and
the sequences of a step do not depend on the number of workers.

Mixing is chairman assignment (R. Tijdeman, The chairman assignment problem, Discrete Mathematics 32, 1980) over one
period of the rational weights: among the first n positions, the number of sequences of each source differs from weight · n
by less than 1. Weights whose exact period is longer than `MAX_PERIOD` are rounded to multiples of 1 / `MAX_PERIOD`. Weights
that are fractions of the documents are first converted to weights of sequences (`weights_by_documents`). Shuffling is a
Feistel network with cycle walking, keyed by seed, source and epoch.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from savant_ray.errors import DataError, SettingsError

Int64s = NDArray[np.int64]
UInt64s = NDArray[np.uint64]
Weight = float | Fraction

MAX_PERIOD = 100_000  # equal to `WEIGHT_RESOLUTION` in config.py, which is not imported because that takes too long
FEISTEL_ROUNDS = 8  # each round changes both halves
ROUND_KEY = np.uint64(0xD1342543DE82EF95)  # odd, so that no round key repeats


class GlobalOrder:
    """Infinite order of the sequences of several sources, mixed by `weights` and reshuffled in each epoch of a source.

    `sizes` are the numbers of sequences of the sources.

    Raises:
        DataError: a source is empty.
        SettingsError: a weight is not positive, or less than 1 / `MAX_PERIOD` of their sum.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[Weight], seed: int) -> None:
        if len(sizes) != len(weights) or not sizes:
            raise SettingsError(f"{len(sizes)} sources, but {len(weights)} weights")
        if min(sizes) < 1:
            raise DataError(f"source {min(range(len(sizes)), key=sizes.__getitem__)} yields no sequence")
        self._sizes = np.asarray(sizes, dtype=np.int64)
        self._seed = seed
        self._pattern, self._occurrence = _period(_counts(weights))
        self._per_period = np.bincount(self._pattern, minlength=len(sizes)).astype(np.int64)

    def locate(self, positions: Int64s) -> tuple[Int64s, Int64s]:
        """Return source and row of each position, two arrays of the shape of `positions` (all ≥ 0)."""
        period, offset = np.divmod(positions, len(self._pattern))
        source = self._pattern[offset]
        # The dividend is the number of earlier sequences of the same source.
        epoch, slot = np.divmod(period * self._per_period[source] + self._occurrence[offset], self._sizes[source])
        row = np.empty_like(slot)
        for index, size in enumerate(self._sizes):
            mask = source == index
            row[mask] = permute(slot[mask], int(size), _keys(self._seed, index, epoch[mask]))
        return source, row


def positions_in_order(positions: Int64s, left_out: Sequence[tuple[int, int]]) -> Int64s:
    """Map positions in the order without `left_out` to positions in the complete order.

    `left_out` are (first position, number of sequences); each entry counts positions after all earlier entries were removed.
    Positions before a first position keep their sequence, so those that a run has trained on stay the same when more is left
    out.
    """
    for first, n_sequences in reversed(left_out):
        positions = np.where(positions >= first, positions + n_sequences, positions)
    return positions


def rank_slice(n_sequences: int, rank: int, world_size: int, group: int = 1) -> range:
    """Return the range of a step's sequences that `rank` computes.

    These are whole groups of `group` sequences (the last group may be smaller), whose number differs between ranks by at
    most 1. The first rank has the first group.
    """
    n_groups = -(-n_sequences // group)
    first, stop = (-(-n_groups * r // world_size) * group for r in (rank, rank + 1))
    return range(first, min(stop, n_sequences))


def weights_by_documents(
    weights: Sequence[Weight], documents: Sequence[int], sequences: Sequence[int]
) -> tuple[Fraction, ...]:
    """Return the fraction of the sequences that each source needs for `weights` to be fractions of the documents.

    `documents` and `sequences` are the sizes of the sources. A sequence of source i counts as `documents[i] / sequences[i]`
    documents, the mean; a document in several sequences counts as one. After complete epochs of all sources, the numbers of
    documents are exactly in proportion to `weights`, before that on average.
    """
    parts = [
        Fraction(str(weight)) * n_sequences / n_documents  # as written: 0.1 is a tenth
        for weight, n_documents, n_sequences in zip(weights, documents, sequences, strict=True)
    ]
    total = sum(parts)
    return tuple(part / total for part in parts)


def permute(slots: Int64s, size: int, keys: UInt64s) -> Int64s:
    """Map each slot with the permutation of range(size) that its key selects; `slots` and `keys` have shape [N].

    The Feistel network permutes all numbers below a power of two; values ≥ `size` are permuted again (cycle walking).
    """
    bits = max((size - 1).bit_length(), 2)
    images = slots.astype(np.uint64)
    outside = np.arange(len(images))
    while len(outside):
        images[outside] = _feistel(images[outside], bits, keys[outside])
        outside = outside[images[outside] >= size]
    return images.astype(np.int64)


def _counts(weights: Sequence[Weight]) -> list[int]:
    """Return the number of positions of each source in a period.

    If a period of at most `MAX_PERIOD` positions has exactly these weights, the shortest one is used; otherwise one of
    `MAX_PERIOD` positions, with the weights rounded to whole positions (largest remainder method).

    Raises:
        SettingsError: a weight is not positive, or less than one position of the longest period.
    """
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise SettingsError(
            f"weights {_listed(weights)}: every weight must be greater than 0; remove the source instead"
        )
    exact = [Fraction(str(weight)) for weight in weights]  # as written: 0.1 is a tenth
    total = sum(exact)
    if min(exact) * MAX_PERIOD < total:
        raise SettingsError(
            f"weights {_listed(weights)}: {min(weights)} is less than 1 in {MAX_PERIOD:,} of their sum; raise it, "
            "or leave the source out"
        )
    parts = [weight / total for weight in exact]
    period = math.lcm(*(part.denominator for part in parts))
    if period <= MAX_PERIOD:
        return [int(part * period) for part in parts]
    counts = [int(part * MAX_PERIOD) for part in parts]
    by_remainder = sorted(range(len(parts)), key=lambda i: counts[i] - parts[i] * MAX_PERIOD)
    for index in by_remainder[: MAX_PERIOD - sum(counts)]:
        counts[index] += 1
    return counts


def _period(counts: list[int]) -> tuple[Int64s, Int64s]:
    """Return the source at each offset of a period, and the number of its earlier occurrences in the period.

    Tijdeman's rule: each offset is assigned to the eligible source with the earliest deadline, the first one among equals.
    With slack = 2 · (number of sources) − 2, at least 1, occurrence k of a source is eligible from the first offset with
    slack · (count · (offset + 1) − k · period) ≥ period; its deadline is (slack · (k + 1) − 1) · period / (slack · count).
    """
    period, slack = sum(counts), max(2 * len(counts) - 2, 1)

    def release(source: int, k: int) -> int:
        """Return the first offset at which occurrence k of the source is eligible."""
        return -(-(slack * k + 1) * period // (slack * counts[source])) - 1

    pattern, occurrence = np.empty(period, dtype=np.int64), np.empty(period, dtype=np.int64)
    waiting = [(release(source, 0), source, 0) for source in range(len(counts))]
    heapq.heapify(waiting)
    eligible: list[tuple[float, int, int]] = []
    for offset in range(period):
        while waiting and waiting[0][0] <= offset:
            _, source, k = heapq.heappop(waiting)
            # The heap contains deadlines without their common factor, period / slack. Floats suffice: different quotients
            # of integers this small differ by more than the rounding of the division.
            heapq.heappush(eligible, ((slack * (k + 1) - 1) / counts[source], source, k))
        _, source, k = heapq.heappop(eligible)
        pattern[offset], occurrence[offset] = source, k
        if k + 1 < counts[source]:
            heapq.heappush(waiting, (release(source, k + 1), source, k + 1))
    return pattern, occurrence


def _feistel(values: UInt64s, bits: int, keys: UInt64s) -> UInt64s:
    """Permute values of range(2**bits), each by its key; the halves may differ in length by one bit."""
    low_bits = bits // 2
    low, high = values & _ones(low_bits), values >> np.uint64(low_bits)
    for _ in range(FEISTEL_ROUNDS):
        low ^= _scramble(high + keys) & _ones(low_bits)
        keys = keys + ROUND_KEY
        high ^= _scramble(low + keys) & _ones(bits - low_bits)
        keys = keys + ROUND_KEY
    return (high << np.uint64(low_bits)) | low


def _keys(seed: int, source: int, epochs: Int64s) -> UInt64s:
    """Return one key per epoch; keys of different (seed, source, epoch) are unrelated."""
    start = _scramble(np.asarray([seed % (1 << 64)], dtype=np.uint64)) + np.uint64(source)
    return _scramble(_scramble(start) + epochs.astype(np.uint64))


def _scramble(values: UInt64s) -> UInt64s:
    """Apply SplitMix64's finalizer (S. Vigna): each input bit changes half of the output bits on average."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _ones(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)


def _listed(weights: Sequence[Weight]) -> str:
    return ", ".join(str(weight) for weight in weights)
