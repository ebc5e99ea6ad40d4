"""A worker's share of each step, from any start position, read ahead by Ray Data.

A datasource whose one read task knows plan, rank and start position yields a row per step. It is read with no CPU of
its own and on the worker's node: beside training, which holds the CPUs, any other Ray Data task waits for ever.

The endless order is read in portions, each a Ray Data execution of its own that ends before its steps are trained on,
while the next one is read in the background. One execution held back for the whole run would be simpler, but while it
is held back Ray Data's scheduler thread spins: it took 87 % of a core from the training (measured, Ray 2.60). The first
step of a launch is read by the worker itself, from the same plan, while the process of the first read task comes up.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray
from ray.data import Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from savant_ray.data import ray_data
from savant_ray.data.order import GlobalOrder, Weight, rank_slice
from savant_ray.data.token_cache import Sequences, TokenCache

PORTION_BYTES = 32 << 20  # two portions are in memory at a time
LONGEST_PORTION = 1024  # steps


@dataclass(frozen=True)
class StreamPlan:
    """All that decides which sequence is at which position: plain values that travel to the workers."""

    folders: tuple[str, ...]  # token caches, the same path on every node
    weights: tuple[Weight, ...]  # of sequences
    seed: int
    effective_batch: int  # sequences per step over all workers

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sequences in each source."""
        return tuple(_cache(folder).n_sequences for folder in self.folders)

    @property
    def sequence_length(self) -> int:
        """Tokens per sequence."""
        return _cache(self.folders[0]).sequence_length

    @property
    def order(self) -> GlobalOrder:
        """The global order."""
        return _order(self.sizes, self.weights, self.seed)

    def read(self, positions: NDArray[np.int64]) -> Sequences:
        """The sequences at these positions."""
        sources, rows = self.order.locate(positions)
        result = Sequences.empty(len(positions), self.sequence_length)
        for source in np.unique(sources):
            mine = sources == source
            taken = _cache(self.folders[source]).take(rows[mine])
            result.tokens[mine], result.document_ids[mine] = taken.tokens, taken.document_ids
        return result

    def documents(self, position: int) -> list[tuple[str, int]]:
        """File and line of each document in the sequence at this position."""
        (source,), (row,) = self.order.locate(np.array([position]))
        return _cache(self.folders[source]).documents(int(row))


@dataclass(frozen=True)
class StepShare:
    """One rank's sequences of one step and their positions [N]."""

    positions: NDArray[np.int64]
    sequences: Sequences


@dataclass(frozen=True)
class StepStream:
    """What rank `rank` of `world_size` reads."""

    plan: StreamPlan
    rank: int
    world_size: int

    def steps(self, start_position: int, n_steps: int) -> Generator[StepShare, None, None]:
        """This rank's share of `n_steps` steps, the first of which begins at `start_position`.

        The portion after the first step is being read from now on, the others a portion ahead; closing the generator
        ends that. A rank without a share gets empty ones, so that every rank makes the same number of steps.
        """
        if not self._share:
            nothing = StepShare(np.empty(0, dtype=np.int64), Sequences.empty(0, self.plan.sequence_length))
            return (nothing for _ in range(n_steps))
        at_once = self._read_here(start_position, min(n_steps, 1))
        return _read_ahead(at_once, self._read, self._portions(start_position + self.plan.effective_batch, n_steps - 1))

    def _read_here(self, start_position: int, n_steps: int) -> Iterator[StepShare]:
        """In this process, each when it is asked for."""
        for step in range(n_steps):
            positions = self.positions(start_position + step * self.plan.effective_batch)
            yield StepShare(positions, self.plan.read(positions))

    def _portions(self, start_position: int, n_steps: int) -> Iterator[tuple[int, int]]:
        """(start position, number of steps) of each portion."""
        longest = min(LONGEST_PORTION, max(1, PORTION_BYTES // self._step_bytes))
        for first in range(0, n_steps, longest):
            yield start_position + first * self.plan.effective_batch, min(longest, n_steps - first)

    def _read(self, start_position: int, n_steps: int) -> list[StepShare]:
        """One Ray Data execution, from its start to its end."""
        with ray_data.settings(block_bytes=PORTION_BYTES):
            dataset = ray.data.read_datasource(
                _StepSource(self, start_position, n_steps),
                override_num_blocks=1,
                num_cpus=0,
                label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
            )
        with closing(ray_data.rows(dataset)) as rows:
            return [self._to_share(row) for row in rows]

    def positions(self, start_position: int) -> NDArray[np.int64]:
        """This rank's positions in the step that begins at `start_position`."""
        return start_position + np.arange(self._share.start, self._share.stop)

    @property
    def _step_bytes(self) -> int:
        return len(self._share) * (self.plan.sequence_length * 2 * 4 + 8)

    @property
    def _share(self) -> range:
        return rank_slice(self.plan.effective_batch, self.rank, self.world_size)

    def _to_share(self, row: dict[str, Any]) -> StepShare:
        positions = np.frombuffer(row["positions"].as_buffer(), dtype=np.int64)
        shape = (len(positions), self.plan.sequence_length)
        arrays = (np.frombuffer(row[name].as_buffer(), dtype=np.int32) for name in ("tokens", "document_ids"))
        return StepShare(positions, Sequences(*(array.reshape(shape) for array in arrays)))


def _read_ahead(
    at_once: Iterator[StepShare], read: Callable[[int, int], list[StepShare]], portions: Iterator[tuple[int, int]]
) -> Generator[StepShare, None, None]:
    """`at_once`, then what `read` returns for each portion, one by one; the next one is read while this one is used.

    It is at the first portion as soon as this returns.
    """
    reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")

    def begin() -> list[Future[list[StepShare]]]:
        return [reader.submit(read, *portion) for portion in islice(portions, 1)]

    def one_by_one(pending: list[Future[list[StepShare]]]) -> Generator[StepShare, None, None]:
        try:
            yield from at_once
            while pending:
                shares = pending.pop().result()
                pending = begin()
                yield from shares
        finally:
            reader.shutdown(wait=False, cancel_futures=True)

    return one_by_one(begin())


class _StepSource(Datasource):
    """A row per step: positions, tokens and document ids as bytes, since a row is what Ray Data never divides."""

    def __init__(self, stream: StepStream, start_position: int, n_steps: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Ray's
        step = stream.plan.effective_batch
        self._stream = stream
        self._starts = range(start_position, start_position + n_steps * step, step)

    def estimate_inmemory_data_size(self) -> None:
        """Unknown, so that Ray Data does not plan with it."""

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """The one task."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        stream, starts = self._stream, self._starts
        return [ReadTask(lambda: (_block(stream, start) for start in starts), unknown)]


def _block(stream: StepStream, start_position: int) -> pa.Table:
    positions = stream.positions(start_position)
    sequences = stream.plan.read(positions)
    columns: dict[str, NDArray[Any]] = {
        "positions": positions,
        "tokens": sequences.tokens,
        "document_ids": sequences.document_ids,
    }
    return pa.table({name: pa.array([array.tobytes()], pa.large_binary()) for name, array in columns.items()})


@lru_cache(maxsize=64)
def _cache(folder: str) -> TokenCache:
    return TokenCache.open(folder)


@lru_cache(maxsize=16)
def _order(sizes: tuple[int, ...], weights: tuple[Weight, ...], seed: int) -> GlobalOrder:
    return GlobalOrder(sizes, weights, seed)
