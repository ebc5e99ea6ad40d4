"""A rank's local batches: complete, in order, and the same with and without prefetching."""

from __future__ import annotations

import threading
from collections.abc import Generator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from savant_ray.config import Config
from savant_ray.data.stream import LocalSequences
from savant_ray.data.token_cache import Sequences
from savant_ray.errors import describe
from savant_ray.events import StepDone
from savant_ray.training.loop import train
from savant_ray.training.progress import PROGRESS, SLOW
from savant_ray.training.state import TrainingState
from savant_ray.training.step import MicroBatch
from savant_ray.worker.batch_reader import BatchReader
from tests.training.tiny import (
    LENGTH,
    RecordingHost,
    local_batches,
    micro_batch,
    rank_micro_batches,
    tiny_config,
    tiny_state,
    weights,
)

CUDA = torch.device("cuda")
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")],
    ),
]
TIMEOUT_SECONDS = 60


class TinyStream:
    """Reads the sequences of `tests.training.tiny` without Ray; `fails_at` is a step that cannot be read.

    If `is_masked`, tokens whose id is a multiple of 3 are masked.
    """

    def __init__(
        self,
        effective_batch: int = 12,
        sequences_per_step: int = 12,
        fails_at: int | None = None,
        is_masked: bool = False,
    ) -> None:
        self.effective_batch, self.sequences_per_step, self.fails_at = effective_batch, sequences_per_step, fails_at
        self.is_masked = is_masked
        self.first_micro_batch = 0
        self.closed = threading.Event()
        self.n_read = 0
        self.limit_factors: list[float] = []  # of the hang limit, while each step is read

    def steps(self, start_position: int, n_steps: int) -> Generator[LocalSequences, None, None]:
        try:
            for step in range(n_steps):
                if step == self.fails_at:
                    raise OSError("the disk is gone")
                self.n_read += 1
                self.limit_factors.append(PROGRESS.newest.limit_factor)
                yield self.read(start_position + step * self.effective_batch)
        finally:
            self.closed.set()

    def read(self, start: int) -> LocalSequences:
        positions = np.arange(start, start + self.sequences_per_step)
        sequences = Sequences.empty(len(positions), LENGTH)
        if len(positions):
            batch = micro_batch(positions)
            sequences.tokens[:], sequences.document_ids[:] = batch.tokens_BT.numpy(), batch.document_ids_BT.numpy()
            sequences.is_trained[:] = masked(batch).is_trained_BT.numpy() if self.is_masked else True
        return LocalSequences(positions, sequences)


def masked(batch: MicroBatch) -> MicroBatch:
    return replace(batch, is_trained_BT=batch.tokens_BT % 3 > 0)


def reader(state: TrainingState, config: Config, stream: TinyStream | None = None) -> BatchReader:
    n_steps = config.training.max_steps - state.step
    return BatchReader(stream or TinyStream(), state.position, n_steps, config, state.device)


def local_batch_of_step(step: int) -> list[MicroBatch]:
    return rank_micro_batches(12 * step, 12, 0, 1, 4)


def content(batches: list[MicroBatch]) -> list[tuple[Any, ...]]:
    names = ("tokens_BT", "document_ids_BT", "is_trained_BT")
    return [(*(getattr(batch, name).tolist() for name in names), batch.positions) for batch in batches]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n_steps", [0, 1, 5])
def test_every_step_is_read_once_in_order_onto_the_device(device: str, n_steps: int) -> None:
    config, stream = tiny_config(), TinyStream()
    batches = BatchReader(stream, 7, n_steps, config, torch.device(device))
    positions = []
    for local_batch in batches:
        assert all(batch.tokens_BT.device.type == batch.document_ids_BT.device.type == device for batch in local_batch)
        for batch in local_batch:
            assert content([batch]) == content([micro_batch(batch.positions)])
            assert batch.useful_flops > 0 and len(batch.positions) == config.training.batch_size
            positions += batch.positions
    assert positions == list(range(7, 7 + 12 * n_steps)) and stream.n_read == n_steps
    assert stream.closed.wait(TIMEOUT_SECONDS)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sequences_per_step", [1, 7, 12])
def test_local_batches_carry_the_loss_mask(device: str, sequences_per_step: int) -> None:
    stream = TinyStream(sequences_per_step=sequences_per_step, is_masked=True)
    for step, local_batch in enumerate(BatchReader(stream, 0, 3, tiny_config(), torch.device(device))):
        expected = [masked(batch) for batch in rank_micro_batches(12 * step, sequences_per_step, 0, 1, 4)]
        assert content(local_batch) == content(expected)
        assert all(batch.is_trained_BT.dtype == torch.bool for batch in local_batch)
        assert not all(batch.is_trained_BT.all() for batch in local_batch)


@pytest.mark.parametrize("device", DEVICES)
def test_micro_batches_are_numbered_from_the_first_of_the_rank(device: str) -> None:
    stream = TinyStream(sequences_per_step=10)
    stream.first_micro_batch = 5
    for local_batch in BatchReader(stream, 0, 2, tiny_config(deterministic=True), torch.device(device)):
        assert [(batch.index, len(batch.positions)) for batch in local_batch] == [(5, 4), (6, 4), (7, 2)]


def test_the_start_of_the_read_task_on_a_busy_machine_may_take_as_long_as_that_of_a_worker() -> None:
    for _ in range(2):  # a rewind starts another read task
        stream = TinyStream()
        for _ in BatchReader(stream, 0, 4, tiny_config(), torch.device("cpu")):
            PROGRESS.end_step()
        assert stream.limit_factors[1:] == [SLOW, 1.0, 1.0], "the first step is read without Ray Data"


@pytest.mark.parametrize("device", DEVICES)
def test_a_rank_without_sequences_has_an_empty_local_batch_for_each_step(device: str) -> None:
    stream = TinyStream(sequences_per_step=0)
    assert list(BatchReader(stream, 0, 3, tiny_config(), torch.device(device))) == [[], [], []]


@pytest.mark.parametrize("device", DEVICES)
def test_a_read_error_is_raised_instead_of_the_local_batch_and_names_the_activity(device: str) -> None:
    batches = iter(BatchReader(TinyStream(fails_at=1), 0, 3, tiny_config(), torch.device(device)))
    assert next(batches)
    with pytest.raises(OSError, match="the disk is gone") as error:
        next(batches)
    assert "reading the next step's sequences" in describe(error.value, "training")


@pytest.mark.parametrize("device", DEVICES)
def test_an_iterator_that_is_dropped_closes_the_stream(device: str) -> None:
    stream = TinyStream()
    batches = iter(BatchReader(stream, 0, 100, tiny_config(), torch.device(device)))
    next(batches)
    del batches
    assert stream.closed.wait(TIMEOUT_SECONDS) and stream.n_read <= 2, "at most one step ahead"


def test_a_stopped_and_resumed_run_trains_on_the_sequences_of_an_uninterrupted_one() -> None:
    config = tiny_config()
    straight, state = RecordingHost(), tiny_state(config)
    train(state, config, local_batches(state, config), straight)

    first, stopped = RecordingHost(stop_at=3), tiny_state(config)
    assert not train(stopped, config, reader(stopped, config), first)
    second, resumed = RecordingHost(), tiny_state(config)
    resumed.load_checkpoint(first.checkpoint)
    assert train(resumed, config, reader(resumed, config), second)
    losses = [event.train_loss for event in first.events + second.events if isinstance(event, StepDone)]
    assert losses == [event.train_loss for event in straight.events if isinstance(event, StepDone)]
    assert all(torch.equal(w, weights(resumed)[name]) for name, w in weights(state).items())
    assert len(first.rank_figures) == 3 and all(wait >= 0 and gb > 0 for wait, gb in first.rank_figures)


LONG_KERNEL = 2_000_000_000  # clock cycles, about a second


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_local_batch_is_complete_when_it_is_used_and_not_overwritten_before_the_step_is_done() -> None:
    used = []
    for local_batch in BatchReader(TinyStream(), 0, 4, tiny_config(), CUDA):
        torch.cuda._sleep(LONG_KERNEL)  # the step is queued, and the device uses its batch later
        used += [
            replace(
                batch,
                tokens_BT=batch.tokens_BT.clone(),
                document_ids_BT=batch.document_ids_BT.clone(),
                is_trained_BT=batch.is_trained_BT.clone(),
            )
            for batch in local_batch
        ]
    assert content(used) == content([micro_batch(batch.positions) for batch in used])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_next_local_batch_is_copied_while_the_step_still_computes() -> None:
    batches = iter(BatchReader(TinyStream(), 0, 3, tiny_config(), CUDA))
    next(batches)
    torch.cuda._sleep(5 * LONG_KERNEL)
    step_done = torch.cuda.Event()
    step_done.record()
    with torch.cuda.stream(torch.cuda.Stream()):
        following = content(next(batches))
    assert not step_done.query(), "the copy did not wait for the step"
    assert following == content(local_batch_of_step(1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_batch_reader_allocates_no_device_memory_after_its_construction() -> None:
    batches = BatchReader(TinyStream(), 0, 5, tiny_config(), CUDA)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert sum(1 for _ in batches) == 5 and torch.cuda.max_memory_allocated() == before
