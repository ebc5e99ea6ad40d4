"""TensorBoard reads the numbers of the record, over all attempts of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from savant_ray.reporting import tensorboard
from savant_ray.reporting.record import METRICS, Record, read_records
from tests.reporting.events import attempt, checkpoint, sample, step_done, validation

NUMBERS = {
    "step": "train_loss learning_rate grad_norm tokens tokens_per_second share_of_peak memory_gb skipped_micro_batches "
    "data_wait_seconds step_seconds".split(),
    "validation": ["validation_loss", "bits_per_byte", "weights_moved"],
    "checkpoint": ["seconds", "stall_seconds"],
}


def launch(folder: Path, first: int, last: int) -> Record:
    """Record an attempt from after `first` to `last` that is killed: nothing is closed."""
    record = Record(folder)
    record.rewind(first, repeats_validation=False)
    record.append(attempt(first))
    for step in range(first + 1, last + 1):
        record.append(step_done(step, train_loss=10.0 / step))
    return record


@pytest.fixture(autouse=True)
def names_of_event_files_are_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a second they are ordered by a counter of the process, and 10 would come before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(1000))


def read(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder / tensorboard.FOLDER), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def steps_shown(folder: Path) -> list[int]:
    """Return the steps whose loss is shown, and check that every number of the record is shown once."""
    accumulator, lines = read(folder), list(read_records(folder / METRICS))
    for kind, names in NUMBERS.items():
        for name in names:
            recorded = [line for line in lines if line["event"] == kind and line[name] is not None]
            tag = f"{kind}/{name}"
            shown = accumulator.Scalars(tag) if recorded else []
            expected = [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in recorded]
            assert [(each.step, each.value) for each in shown] == expected, tag
    return [each.step for each in accumulator.Scalars("step/train_loss")]


def test_tensorboard_shows_the_numbers_of_the_record_and_the_samples(tmp_path: Path) -> None:
    record = launch(tmp_path, 0, 5)
    for event in (validation(5), checkpoint(5), sample(5, text=" # five\nplus"), step_done(6, share_of_peak=0.5)):
        record.append(event)
    record.close()
    assert steps_shown(tmp_path) == list(range(1, 7))
    accumulator = read(tmp_path)
    assert accumulator.Scalars("validation/validation_loss")[0].value == pytest.approx(5.1234)
    assert accumulator.Scalars("checkpoint/seconds")[0].step == 5
    assert [each.value for each in accumulator.Scalars("step/share_of_peak")] == [0.5]
    text = accumulator.Tensors("sample/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.splitlines() == ["    Question: X?", "    Answer: # five", "    plus"], "not taken for Markdown"


@pytest.mark.parametrize("told_again", [0, 2, 1000])
def test_tensorboard_shows_each_step_of_a_resumed_run_once(
    told_again: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorboard, "REWRITTEN_STEPS", told_again)
    for first, last in ((0, 20), (10, 30), (25, 40)):
        launch(tmp_path, first, last).close()
    assert steps_shown(tmp_path) == list(range(1, 41))


def test_events_that_a_killed_driver_did_not_flush_are_added(tmp_path: Path) -> None:
    abandoned = launch(tmp_path, 0, 20)
    for file in (tmp_path / tensorboard.FOLDER).iterdir():
        file.write_bytes(file.read_bytes()[:-70])
    launch(tmp_path, 20, 30).close()
    assert steps_shown(tmp_path) == list(range(1, 31))
    abandoned.close()


def test_steps_that_a_full_disk_refused_are_added_however_many_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorboard, "REWRITTEN_STEPS", 5)
    record = launch(tmp_path, 0, 20)
    (file,) = (tmp_path / tensorboard.FOLDER).iterdir()
    record.close()
    file.write_bytes(file.read_bytes()[:-70])
    folder = tmp_path / tensorboard.FOLDER
    folder.rename(tmp_path / "kept")
    folder.write_text("in the way")
    record = launch(tmp_path, 20, 60)
    assert any("tensorboard cannot be written" in warning for warning in record.warnings())
    folder.unlink()
    (tmp_path / "kept").rename(folder)
    record.rewind(60, repeats_validation=False)
    assert record.warnings() == []
    record.append(step_done(61))
    record.close()
    assert steps_shown(tmp_path) == list(range(1, 62))


@pytest.mark.parametrize("damage", [b"", bytes(100), b"\xff" * 100, b"\x08" + bytes(11) + b"\xff" * 12])
def test_a_damaged_tensorboard_file_is_not_an_error(damage: bytes, tmp_path: Path) -> None:
    launch(tmp_path, 0, 20).close()
    (file,) = (tmp_path / tensorboard.FOLDER).iterdir()
    file.with_name("events.out.tfevents.9999999999").write_bytes(damage)
    file.write_bytes(file.read_bytes() + damage)
    launch(tmp_path, 20, 30).close()
    assert len(list((tmp_path / tensorboard.FOLDER).iterdir())) == 3


def test_missing_tensorboard_files_are_written_again_from_the_record(tmp_path: Path) -> None:
    launch(tmp_path, 0, 1500).close()
    for file in (tmp_path / tensorboard.FOLDER).iterdir():
        file.unlink()
    launch(tmp_path, 1500, 1501).close()
    assert steps_shown(tmp_path) == list(range(1, 1502))


def test_an_unwritable_tensorboard_folder_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / tensorboard.FOLDER).write_text("in the way")
    launch(tmp_path, 0, 3).close()
    assert len(list(read_records(tmp_path / METRICS))) == 4
