"""A rank reads its sequences of each step from any start, with any number of workers, without reserving a CPU."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from savant_ray.data.cache_builder import prepare
from savant_ray.data.documents import Document
from savant_ray.data.order import GlobalOrder
from savant_ray.data.sources import expand
from savant_ray.data.stream import LocalSequences, StepStream, StreamPlan
from savant_ray.data.tokenizer import Tokenizer
from tests.data.without_ray import cache_of

pytestmark = pytest.mark.slow

SEQUENCE_LENGTH = 32
DOCUMENTS = 117


@pytest.fixture(scope="module")
def plan(real_ray: None, tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Tokenizer) -> StreamPlan:
    """Two sources of 117 and 40 documents, each of which fills a row."""
    folder = tmp_path_factory.mktemp("plan")
    folders = []
    for name, count in (("train", DOCUMENTS), ("logic", 40)):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{name} {i:03d}".ljust(31, ".")}) + "\n" for i in range(count)))
        cache = prepare(expand(str(path)), byte_tokenizer, SEQUENCE_LENGTH, folder / "cache", part_bytes=1_000)
        assert cache.n_sequences == count
        folders.append(str(cache.folder))
    return StreamPlan(tuple(folders), (0.8, 0.2), seed=5, effective_batch=192)


def one_source(plan: StreamPlan, effective_batch: int) -> StreamPlan:
    """Return a plan of the 117 documents only."""
    return StreamPlan(plan.folders[:1], (1.0,), plan.seed, effective_batch)


def assert_same(local: LocalSequences, plan: StreamPlan) -> None:
    expected = plan.read(local.positions)
    assert np.array_equal(local.sequences.tokens, expected.tokens)
    assert np.array_equal(local.sequences.document_ids, expected.document_ids)
    assert np.array_equal(local.sequences.is_trained, expected.is_trained)


def read_texts(plan: StreamPlan, tokenizer: Tokenizer, steps_read: list[LocalSequences]) -> list[str]:
    return [tokenizer.decode(tokens.tolist()) for local in steps_read for tokens in local.sequences.tokens]


def test_a_plan_can_be_pickled_before_and_after_reading(plan: StreamPlan) -> None:
    plan.read(np.arange(3))
    copy = pickle.loads(pickle.dumps(plan))
    assert copy == plan
    assert len(pickle.dumps(plan)) < 1_000
    assert copy.sizes == (DOCUMENTS, 40)


def test_a_plan_reads_the_sequences_that_the_order_locates(plan: StreamPlan, byte_tokenizer: Tokenizer) -> None:
    positions = np.array([0, 3, 10**12, 7])
    sequences = plan.read(positions)
    sources, rows = GlobalOrder(plan.sizes, plan.weights, plan.seed).locate(positions)
    for at, position in enumerate(positions):
        ((file, line),) = plan.documents(int(position))
        text = byte_tokenizer.decode(sequences.tokens[at].tolist())
        assert file == ("train.jsonl", "logic.jsonl")[sources[at]]
        assert text.startswith(f"{file.removesuffix('.jsonl')} {line - 1:03d}.")
    assert rows[0] < DOCUMENTS


@pytest.mark.usefixtures("real_ray")
def test_a_stream_carries_the_loss_mask(tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    documents = [Document(number, f"{number:07d}", "", ((number % 7, 7),)) for number in range(1, 30)]
    cache = cache_of(documents, byte_tokenizer, 8, tmp_path)
    plan = StreamPlan((str(cache.folder),), (1.0,), seed=1, effective_batch=6)
    steps_read = list(StepStream(plan, 1, 2).steps(0, 4))
    assert len(steps_read) == 4
    for local in steps_read:
        assert_same(local, plan)
        numbers = [int(byte_tokenizer.decode(tokens.tolist())) for tokens in local.sequences.tokens]
        assert (~local.sequences.is_trained).sum(axis=1).tolist() == [number % 7 for number in numbers]


@pytest.mark.parametrize("start", [0, 1_001])
def test_a_stream_yields_the_sequences_of_the_order_from_any_start(plan: StreamPlan, start: int) -> None:
    steps_read = list(StepStream(plan, 1, 3).steps(start, 5))
    expected = [start + 192 * step + offset for step in range(5) for offset in range(64, 128)]
    assert [position for local in steps_read for position in local.positions.tolist()] == expected
    for local in steps_read:
        assert_same(local, plan)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8, 12])
def test_the_positions_of_a_step_do_not_depend_on_the_number_of_workers(plan: StreamPlan, world_size: int) -> None:
    streams = [StepStream(plan, rank, world_size) for rank in range(world_size)]
    for step in range(3):
        positions = np.concatenate([stream.positions(50 + 192 * step) for stream in streams])
        assert positions.tolist() == list(range(50 + 192 * step, 50 + 192 * (step + 1)))


def test_groups_of_sequences_are_not_divided_among_workers(plan: StreamPlan) -> None:
    for world_size in (1, 3, 5, 17):
        streams = [StepStream(plan, rank, world_size, micro_batch_rows=12) for rank in range(world_size)]
        groups = [
            (stream.first_micro_batch + index, positions.tolist())
            for stream in streams
            for index, positions in enumerate(np.split(stream.positions(50), range(12, stream.sequences_per_step, 12)))
            if len(positions)
        ]
        assert groups == [(index, list(range(50 + 12 * index, 62 + 12 * index))) for index in range(16)]


def test_a_stream_leaves_sequences_out_and_names_the_documents_of_those_in_their_place(plan: StreamPlan) -> None:
    shorter = dataclasses.replace(plan, left_out=((100, 192), (300, 5)))
    rows_read = [row for local in StepStream(shorter, 0, 1).steps(0, 3) for row in local.sequences.tokens.tolist()]
    positions = [*range(100), *range(292, 492), *range(497, 773)]
    assert rows_read == plan.read(np.array(positions)).tokens.tolist()
    assert [shorter.documents(p) for p in (99, 100, 300)] == [plan.documents(p) for p in (99, 292, 497)]


def test_three_workers_together_read_the_sequences_of_one(plan: StreamPlan, byte_tokenizer: Tokenizer) -> None:
    alone = [read_texts(plan, byte_tokenizer, [local]) for local in StepStream(plan, 0, 1).steps(11, 2)]
    ranks = [list(StepStream(plan, rank, 3).steps(11, 2)) for rank in range(3)]
    for step in range(2):
        assert read_texts(plan, byte_tokenizer, [of_rank[step] for of_rank in ranks]) == alone[step]


def test_a_rank_without_sequences_yields_all_steps_empty(plan: StreamPlan) -> None:
    small = one_source(plan, effective_batch=1)
    ranks = [list(StepStream(small, rank, 2).steps(4, 3)) for rank in range(2)]
    assert [[len(local.positions) for local in of_rank] for of_rank in ranks] == [[1, 1, 1], [0, 0, 0]]
    assert ranks[1][0].sequences.tokens.shape == (0, SEQUENCE_LENGTH)


@pytest.mark.parametrize("effective_batch", [1, 7])
def test_stopping_after_every_step_neither_skips_nor_repeats_a_sequence(
    plan: StreamPlan, byte_tokenizer: Tokenizer, effective_batch: int
) -> None:
    small = one_source(plan, effective_batch)
    steps = -(-2 * DOCUMENTS // effective_batch)
    read = [
        small.read(StepStream(small, 0, 1).positions(step * effective_batch)).tokens  # a new process per step
        for step in range(steps)
    ]
    texts = [byte_tokenizer.decode(tokens.tolist()) for tokens in np.concatenate(read)]
    for epoch in range(2):
        counts = Counter(texts[epoch * DOCUMENTS : (epoch + 1) * DOCUMENTS])
        assert sorted(counts) == [f"train {i:03d}".ljust(31, ".") for i in range(DOCUMENTS)]
        assert set(counts.values()) == {1}


def test_stopped_and_resumed_streams_yield_the_same_as_an_uninterrupted_one(
    plan: StreamPlan, byte_tokenizer: Tokenizer
) -> None:
    small = one_source(plan, effective_batch=7)
    uninterrupted = read_texts(small, byte_tokenizer, list(StepStream(small, 0, 1).steps(0, 34)))
    resumed: list[str] = []
    for step, n_steps in ((0, 1), (1, 15), (16, 18)):
        stream = StepStream(small, 0, 1).steps(7 * step, 100)
        resumed += read_texts(small, byte_tokenizer, [next(stream) for _ in range(n_steps)])
        stream.close()
    assert resumed == uninterrupted
    assert set(Counter(uninterrupted[:DOCUMENTS]).values()) == {1}


def test_reading_works_while_workers_reserve_all_cpus(plan: StreamPlan) -> None:
    import ray

    @ray.remote(num_cpus=2)
    class Holder:
        def read(self) -> list[int]:
            steps_read = StepStream(plan, 0, 2).steps(5, 3)
            return [len(local.positions) for local in steps_read]

    holder = Holder.remote()
    assert ray.get(holder.read.remote(), timeout=60) == [96, 96, 96]
    ray.kill(holder)


def test_reading_stays_exactly_one_portion_ahead_from_the_start(
    plan: StreamPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    portion = 4
    read, requested = tmp_path / "read", tmp_path / "requested"
    read.mkdir()
    requested.mkdir()

    class Watched(StepStream):
        """Writes a file for each step that is read, with the number of steps requested by then."""

        def positions(self, start_position: int) -> np.ndarray:
            step = start_position // self.plan.effective_batch
            (read / str(step)).write_text(str(len(list(requested.iterdir()))))
            return super().positions(start_position)

    def wait_until_read(steps: int) -> None:
        deadline = time.monotonic() + 60
        while len(list(read.iterdir())) < steps:
            assert time.monotonic() < deadline, f"{steps} steps are read before more are requested"
            time.sleep(0.02)

    monkeypatch.setattr("savant_ray.data.stream.MAX_PORTION_STEPS", portion)
    stream = Watched(plan, 0, 1).steps(0, 1_000_000)
    wait_until_read(portion)  # step 0 is read when it is requested
    for step in range(4 * portion):
        (requested / str(step)).touch()
        next(stream)
        wait_until_read(1 + portion * (1 + -(-step // portion)))
    stream.close()
    for path in read.iterdir():
        of = (int(path.name) - 1) // portion
        assert int(path.read_text()) > portion * (of - 1), "a portion is read once the one before it is in use"


def test_the_first_step_does_not_wait_for_a_process_of_ray_data(plan: StreamPlan, tmp_path: Path) -> None:
    may_read, own_process = tmp_path / "may-read", os.getpid()

    class Delayed(StepStream):
        """Reads in other processes only when a file is there."""

        def positions(self, start_position: int) -> np.ndarray:
            deadline = time.monotonic() + 60
            while os.getpid() != own_process and not may_read.exists():
                assert time.monotonic() < deadline
                time.sleep(0.02)
            return super().positions(start_position)

    stream = Delayed(plan, 1, 2).steps(192, 3)
    steps_read = [next(stream)]
    may_read.touch()
    for local in [*steps_read, *stream]:
        assert_same(local, plan)


@pytest.mark.parametrize("n_steps", [0, -3])
def test_a_finished_run_reads_nothing(plan: StreamPlan, n_steps: int) -> None:
    small = one_source(plan, effective_batch=1)
    for rank in (0, 1):
        assert list(StepStream(small, rank, 2).steps(4, n_steps)) == [], "with a local and without"


@pytest.mark.parametrize("n_steps", [0, 1, 2])
def test_closing_after_any_step_leaves_no_thread(
    plan: StreamPlan, monkeypatch: pytest.MonkeyPatch, n_steps: int
) -> None:
    monkeypatch.setattr("savant_ray.data.stream.MAX_PORTION_STEPS", 1)
    stream = StepStream(plan, 0, 1).steps(0, 100)
    for _ in range(n_steps):
        next(stream)
    stream.close()
    del stream
    deadline = time.monotonic() + 60
    while any(thread.name.startswith("read-ahead") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_consecutive_portions_have_no_gap(plan: StreamPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("savant_ray.data.stream.MAX_PORTION_STEPS", 4)
    positions = np.concatenate([local.positions for local in StepStream(plan, 0, 1).steps(77, 10)])
    assert np.array_equal(positions, 77 + np.arange(10 * 192))


def test_ray_data_runs_nothing_between_portions(plan: StreamPlan) -> None:
    """During an execution, its scheduler thread polls and uses most of a core."""
    stream = StepStream(plan, 0, 1).steps(0, 100)
    next(stream), next(stream)  # the first does not wait for Ray Data
    deadline = time.monotonic() + 30
    while executors() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert executors() == []
    assert sum(1 for _ in stream) == 98


def executors() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("StreamingExecutor")]
