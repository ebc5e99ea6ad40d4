"""Reads one rank's sequences of each step, from any position of the global order, ahead of training with Ray Data.

A datasource with one read task contains plan, rank and start position, and yields one row per step. The task requests no
CPU and runs on the worker's node. A task that requests a CPU would never be scheduled, because training reserves them all.

The order is infinite and is read in portions. Each portion is a Ray Data execution of its own, which ends before its
steps are trained on; the next portion is read in the background meanwhile. A single execution for the whole run would be
simpler, but while its output is not consumed, Ray Data's scheduler thread polls and takes 87 % of a core from training
(measured, Ray 2.60).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
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
from savant_ray.data.order import GlobalOrder, Int64s, Weight, positions_in_order, rank_slice
from savant_ray.data.token_cache import Sequences, TokenCache

BYTES_PER_TOKEN = 4 + 4 + 1  # token and document id int32, loss mask bool
PORTION_BYTES = 32 << 20  # two portions are in memory at a time
MAX_PORTION_STEPS = 1024


@dataclass(frozen=True)
class StreamPlan:
    """Plain values that determine the sequence at each position; pickled to the workers."""

    folders: tuple[str, ...]  # token caches, the same path on every node
    weights: tuple[Weight, ...]  # of sequences
    seed: int
    effective_batch: int  # sequences per step over all workers
    left_out: tuple[tuple[int, int], ...] = ()  # sequences that are not read, as in `positions_in_order`

    @property
    def sizes(self) -> tuple[int, ...]:
        """Return the number of sequences in each source."""
        return tuple(_cache(folder).n_sequences for folder in self.folders)

    @property
    def sequence_length(self) -> int:
        """Return tokens per sequence."""
        return _cache(self.folders[0]).sequence_length

    def read(self, positions: NDArray[np.int64]) -> Sequences:
        """Return the sequences at positions `[N]`."""
        sources, rows = self.locate(positions)
        result = Sequences.empty(len(positions), self.sequence_length)
        for source in np.unique(sources):
            from_source = sources == source
            taken = _cache(self.folders[source]).take(rows[from_source])
            result.tokens[from_source], result.document_ids[from_source] = taken.tokens, taken.document_ids
            result.is_trained[from_source] = taken.is_trained
        return result

    def locate(self, positions: Int64s) -> tuple[Int64s, Int64s]:
        """Return source and row of each position."""
        return _order(self.sizes, self.weights, self.seed).locate(positions_in_order(positions, self.left_out))

    def documents(self, position: int) -> list[tuple[str, int]]:
        """Return file and line of each document in the sequence at this position."""
        (source,), (row,) = self.locate(np.array([position]))
        return _cache(self.folders[source]).documents(int(row))


@dataclass(frozen=True)
class LocalSequences:
    """One rank's sequences of one step and their positions `[N]` in the global order."""

    positions: NDArray[np.int64]
    sequences: Sequences


@dataclass(frozen=True)
class StepStream:
    """The sequences that rank `rank` of `world_size` reads."""

    plan: StreamPlan
    rank: int
    world_size: int
    micro_batch_rows: int = 1  # a rank reads whole groups of this many sequences of a step (`rank_slice`)
    in_process: bool = False  # all steps are read in this process when they are requested, without Ray Data

    def steps(self, start_position: int, n_steps: int) -> Generator[LocalSequences, None, None]:
        """Return an iterator over this rank's sequences of `n_steps` steps, the first of which begins at `start_position`.

        The first step is read in this process when it is requested, because the process of a read task takes 2 to 3 s to
        start; all others are read in Ray Data's read task. Reading begins with this call, stays one portion ahead of the
        portion in use, and ends when the iterator is closed. A rank without sequences yields empty arrays, so that all
        ranks take the same number of steps.
        """
        step = self.plan.effective_batch
        starts = range(start_position, start_position + n_steps * step, step)
        n_in_process = n_steps if self.in_process or not self.sequences_per_step else 1
        executor = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        portions = self._portions(starts[n_in_process:])
        futures = (executor.submit(self._read_portion, portion) for portion in portions)  # submitted when requested
        return self._in_order(starts[:n_in_process], next(futures, None), futures, executor)

    def read_step(self, start_position: int) -> LocalSequences:
        """Read this rank's sequences of the step that begins at `start_position`."""
        positions = self.positions(start_position)
        return LocalSequences(positions, self.plan.read(positions))

    def positions(self, start_position: int) -> NDArray[np.int64]:
        """Return this rank's positions in the step that begins at `start_position`."""
        return start_position + np.arange(self._slice.start, self._slice.stop)

    @property
    def sequences_per_step(self) -> int:
        """Return how many sequences of each step this rank reads."""
        return len(self._slice)

    @property
    def first_micro_batch(self) -> int:
        """Return the index of this rank's first micro-batch in each step."""
        return self._slice.start // self.micro_batch_rows

    @property
    def _slice(self) -> range:
        return rank_slice(self.plan.effective_batch, self.rank, self.world_size, self.micro_batch_rows)

    def _portions(self, starts: range) -> Iterator[range]:
        """Divide steps, given by their first positions, into portions."""
        step_bytes = self.sequences_per_step * (self.plan.sequence_length * BYTES_PER_TOKEN + 8)  # int64 position
        portion_steps = min(MAX_PORTION_STEPS, max(1, PORTION_BYTES // max(1, step_bytes)))
        for first in range(0, len(starts), portion_steps):
            yield starts[first : first + portion_steps]

    def _read_portion(self, starts: range) -> list[LocalSequences]:
        """Read the steps from `starts` with one Ray Data execution, which has ended when this returns."""
        with ray_data.settings(block_bytes=PORTION_BYTES):
            dataset = ray.data.read_datasource(
                _StepSource(self, starts),
                override_num_blocks=1,
                num_cpus=0,
                label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
            )
        with closing(ray_data.rows(dataset)) as rows:
            return [_from_row(row, self.plan.sequence_length) for row in rows]

    def _in_order(
        self,
        starts: range,
        pending: Future[list[LocalSequences]] | None,
        futures: Iterator[Future[list[LocalSequences]]],
        executor: ThreadPoolExecutor,
    ) -> Generator[LocalSequences, None, None]:
        """Yield the steps from `starts`, read in this process, then those of each portion while the next one is read."""
        try:
            yield from map(self.read_step, starts)
            while pending is not None:
                steps = pending.result()
                pending = next(futures, None)
                yield from steps
        finally:
            executor.shutdown(wait=False, cancel_futures=True)


class _StepSource(Datasource):
    """Datasource with one row per step: positions and sequences as bytes. Ray Data never splits a row."""

    def __init__(self, stream: StepStream, starts: range) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Ray's
        self._stream, self._starts = stream, starts

    def estimate_inmemory_data_size(self) -> None:
        """Return None: the size is unknown."""

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """Return the single read task."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        stream, starts = self._stream, self._starts
        return [ReadTask(lambda: (_to_row(stream.read_step(start)) for start in starts), unknown)]


def _to_row(step: LocalSequences) -> pa.Table:
    arrays: dict[str, NDArray[Any]] = {
        "positions": step.positions,
        "tokens": step.sequences.tokens,
        "document_ids": step.sequences.document_ids,
        "is_trained": step.sequences.is_trained,
    }
    return pa.table({name: pa.array([array.tobytes()], pa.large_binary()) for name, array in arrays.items()})


def _from_row(row: dict[str, Any], sequence_length: int) -> LocalSequences:
    """Return the sequences of a row without copying; the arrays are read-only."""
    positions = np.frombuffer(row["positions"].as_buffer(), dtype=np.int64)
    shape = (len(positions), sequence_length)
    tokens, document_ids = (
        np.frombuffer(row[name].as_buffer(), dtype=np.int32).reshape(shape) for name in ("tokens", "document_ids")
    )
    is_trained = np.frombuffer(row["is_trained"].as_buffer(), dtype=bool).reshape(shape)
    return LocalSequences(positions, Sequences(tokens, document_ids, is_trained))


@lru_cache(maxsize=64)
def _cache(folder: str) -> TokenCache:
    return TokenCache.open(folder)


@lru_cache(maxsize=16)
def _order(sizes: tuple[int, ...], weights: tuple[Weight, ...], seed: int) -> GlobalOrder:
    return GlobalOrder(sizes, weights, seed)
