"""The record has complete lines and each step once, also after a kill, a power failure or a full disk."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from savant_ray.events import Event, MicroBatchSkipped, RunResumed
from savant_ray.reporting.record import METRICS, SAMPLES, JsonLines, Record, read_records, to_line
from tests.reporting.events import attempt, checkpoint, sample, step_done, validation


def write(folder: Path, *events: Event, after: int | None = None, repeats_validation: bool = False) -> None:
    record = Record(folder)
    if after is not None:
        record.rewind(after, repeats_validation)
    for event in events:
        record.append(event)
    record.close()


def history(folder: Path, file: str = METRICS) -> list[tuple[str, Any]]:
    return [(line["event"], line.get("step")) for line in read_records(folder / file)]


def one_attempt(*steps: int) -> list[Event]:
    return [event for step in steps for event in (step_done(step), validation(step), sample(step), checkpoint(step))]


def test_an_event_is_one_line_that_begins_with_its_name_and_time(tmp_path: Path) -> None:
    write(tmp_path, step_done(3), RunResumed(step=2, path="/runs/x/step_2"))
    step, resume = map(json.loads, (tmp_path / METRICS).read_text().splitlines())
    assert list(step)[:4] == ["event", "time", "step", "train_loss"]
    assert {"learning_rate", "grad_norm", "tokens", "tokens_per_second", "skipped_micro_batches"} <= set(step)
    assert {"micro_batch_size", "memory_gb"} <= set(step)
    assert (resume["event"], resume["step"], resume["from"]) == ("resume", 2, "/runs/x/step_2")
    assert datetime.fromisoformat(step["time"]).utcoffset() == timedelta(0)


def test_an_event_is_written_as_soon_as_it_is_appended(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.append(step_done(1))
    assert history(tmp_path) == [("step", 1)]
    record.close()


def test_samples_are_also_written_to_a_separate_file(tmp_path: Path) -> None:
    text = 'ünïcode \u2028 "quotes"\n\x1b[31m'
    write(tmp_path, step_done(1), sample(1, text))
    (line,) = read_records(tmp_path / SAMPLES)
    assert (line["step"], line["text"]) == (1, text)
    assert history(tmp_path) == [("step", 1), ("sample", 1)]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_become_null(number: float, tmp_path: Path) -> None:
    write(tmp_path, step_done(1, train_loss=number))
    (line,) = read_records(tmp_path / METRICS)
    assert line["train_loss"] is None


@pytest.mark.parametrize("torn", ['{"event": "st', "{", '{"event": "step", "step": 9}', "\x00\x00"])
def test_an_incomplete_last_line_is_ignored_and_removed(torn: str, tmp_path: Path) -> None:
    write(tmp_path, *one_attempt(1, 2))
    whole = history(tmp_path)
    with (tmp_path / METRICS).open("a") as file:
        file.write(torn)
    assert history(tmp_path) == whole
    write(tmp_path, step_done(3))
    assert history(tmp_path) == [*whole, ("step", 3)]


@pytest.mark.parametrize("resumed_at", range(5))
def test_a_resumed_run_has_each_step_of_an_uninterrupted_run_once(resumed_at: int, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    whole.mkdir()
    resumed.mkdir()
    write(whole, *one_attempt(1, 2, 3, 4, 5, 6))
    write(resumed, *one_attempt(1, 2, 3, 4))
    write(resumed, *one_attempt(*range(resumed_at + 1, 7)), after=resumed_at)
    assert history(resumed) == history(whole)
    assert history(resumed, SAMPLES) == history(whole, SAMPLES)


def test_rewinding_keeps_events_of_attempts_and_removes_those_of_lost_steps(tmp_path: Path) -> None:
    skip = MicroBatchSkipped(step=8, rank=0, loss="nan", positions=(1, 2))
    write(tmp_path, attempt(0), step_done(7), skip, step_done(8))
    write(tmp_path, attempt(5), after=5)
    assert history(tmp_path) == [("attempt", 0), ("attempt", 5)]


def test_a_repeated_validation_is_in_the_record_once(tmp_path: Path) -> None:
    write(tmp_path, step_done(1), checkpoint(1), validation(1), sample(1))
    write(tmp_path, validation(1), sample(1), step_done(2), after=1, repeats_validation=True)
    assert history(tmp_path) == [("step", 1), ("checkpoint", 1), ("validation", 1), ("sample", 1), ("step", 2)]
    assert history(tmp_path, SAMPLES) == [("sample", 1)]


def test_events_that_a_killed_driver_did_not_receive_are_added_from_the_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, attempt(0), *one_attempt(1, 2))
    kept = [to_line(event) for event in (attempt(0), *one_attempt(2, 3, 4))]
    record = Record(tmp_path)
    record.backfill(kept)
    record.backfill(kept)
    record.close()
    assert history(tmp_path) == [("attempt", 0), *((e.kind, e.step) for e in one_attempt(1, 2, 3, 4))]
    assert history(tmp_path, SAMPLES) == [("sample", step) for step in (1, 2, 3, 4)]


def test_lines_that_several_checkpoints_contain_are_added_once(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.backfill(to_line(event) for event in (*one_attempt(1, 2), *one_attempt(1, 2, 3), *one_attempt(2, 3)))
    record.close()
    assert history(tmp_path) == [(e.kind, e.step) for e in one_attempt(1, 2, 3)]
    assert history(tmp_path, SAMPLES) == [("sample", step) for step in (1, 2, 3)]


def test_each_skipped_micro_batch_of_a_step_is_added_from_the_checkpoint(tmp_path: Path) -> None:
    skips = [
        MicroBatchSkipped(step=3, rank=rank, loss="nan", positions=(n, n + 1)) for rank, n in ((0, 0), (0, 2), (1, 4))
    ]
    write(tmp_path, skips[0])
    record = Record(tmp_path)
    record.backfill([to_line(skip) for skip in skips])
    record.close()
    assert [(line["rank"], line["positions"]) for line in read_records(tmp_path / METRICS)] == [
        (0, [0, 1]), (0, [2, 3]), (1, [4, 5])
    ]  # fmt: skip


def test_a_record_without_lost_steps_is_not_rewritten(tmp_path: Path) -> None:
    write(tmp_path, *one_attempt(1, 2))
    inode = (tmp_path / METRICS).stat().st_ino
    write(tmp_path, step_done(3), after=2)
    assert (tmp_path / METRICS).stat().st_ino == inode
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000,
        b'{"event": "step", "step": 3}',
        b'{"event": "step", "time": "2026-11-25T03:19:47.281+00:00"}',
        b'{"event": "step", "step": "3", "time": "2026-11-25T03:19:47.281+00:00"}',
        b'{"event": ["step"], "step": 3, "time": "2026-11-25T03:19:47.281+00:00"}',
        b'{"event": "step", "step": 3, "time": "2026-11-25T03:19:47.281+00:0{0"}',
        b'{"event": "step", "step": 3, "time": "2026-11-25T03:19:47"}',
        b'{"event": "end", "step": null, "time": "2026-11-25T03:19:47.281+00:00"}',
    ],
)
def test_a_line_that_is_not_an_event_is_removed(line: bytes, tmp_path: Path) -> None:
    write(tmp_path, step_done(1))
    with (tmp_path / METRICS).open("ab") as file:
        file.write(line + b"\n")
    write(tmp_path, after=1)
    assert history(tmp_path) == [("step", 1)]


def test_a_run_continues_although_a_bit_of_its_record_has_flipped(tmp_path: Path) -> None:
    write(tmp_path, step_done(1), step_done(2))
    content = (tmp_path / METRICS).read_bytes()
    for position in range(content.index(b', "train_loss"')):
        damaged = bytearray(content)
        damaged[position] ^= 1
        (tmp_path / METRICS).write_bytes(damaged)
        write(tmp_path, after=2)
        assert history(tmp_path)[-1] == ("step", 2)


def test_an_unpaired_surrogate_is_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    line = b'{"event": "notice", "time": "2026-11-25T03:19:47.281+00:00", "text": "\\ud83d"}\n'
    path.write_bytes(line + bytes(20) + b"\n")
    file = JsonLines(path)
    file.append({"event": "notice", "text": "\ud83d é"})
    file.close()
    assert [line["text"] for line in read_records(path)] == ["\ud83d", "\ud83d é"]
    assert "é" in path.read_text(encoding="utf-8")


def test_damaged_lines_are_removed_and_a_copy_of_the_file_is_kept(tmp_path: Path) -> None:
    write(tmp_path, step_done(1), step_done(2))
    with (tmp_path / METRICS).open("ab") as file:
        file.write(b"\0\0\0\n[1]\n" + json.dumps(to_line(step_done(3))).encode() + b'\n{"event": "st')
    write(tmp_path, step_done(4))
    assert history(tmp_path) == [("step", step) for step in (1, 2, 3, 4)]
    assert b"\0\0\0" in (tmp_path / f"{METRICS}.damaged").read_bytes()


def test_a_second_damage_does_not_replace_the_copy_of_the_first(tmp_path: Path) -> None:
    for damage in (b"\0\0\0\n", b"[1]\n"):
        write(tmp_path, step_done(1))
        with (tmp_path / METRICS).open("ab") as file:
            file.write(damage)
    write(tmp_path, step_done(2))
    copies = b"".join(path.read_bytes() for path in tmp_path.glob(f"{METRICS}.damaged*"))
    assert b"\0\0\0" in copies and b"[1]" in copies


@contextmanager
def nearly_full_disk(path: Path) -> Iterator[None]:
    """Let files grow to the size of `path` and 10 bytes more."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_lines_that_a_full_disk_refuses_are_written_when_there_is_room_again(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.append(step_done(1))
    with nearly_full_disk(tmp_path / METRICS):
        for step in (2, 3):
            record.append(step_done(step))
            assert history(tmp_path) == [("step", 1)] and (tmp_path / METRICS).read_bytes().endswith(b"}\n")
    record.append(step_done(4))
    record.close()
    assert history(tmp_path) == [("step", step) for step in (1, 2, 3, 4)]


def test_a_disk_that_is_full_when_lost_steps_are_removed_is_named_and_nothing_is_lost(tmp_path: Path) -> None:
    write(tmp_path, attempt(0), *(step_done(step) for step in range(1, 30)))
    recorded = history(tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    record = Record(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            record.rewind(20, repeats_validation=False)
        record.append(attempt(20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    record.close()
    assert history(tmp_path) == [*recorded, ("attempt", 20)]
    assert not list(tmp_path.glob("*.tmp"))


def test_lines_that_wait_for_room_on_the_disk_are_removed_when_their_steps_are_repeated(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.append(step_done(1))
    with nearly_full_disk(tmp_path / METRICS):
        for step in (2, 3):
            record.append(step_done(step))
    record.rewind(2, repeats_validation=False)
    record.append(step_done(3))
    record.close()
    assert history(tmp_path) == [("step", step) for step in (1, 2, 3)]
