"""Checkpoints are written during training: the state at the save, one at a time, and no failure is ignored."""

from __future__ import annotations

import copy
import functools
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from savant_ray.events import CheckpointFailed, CheckpointSaved, Event
from savant_ray.storage import protocol
from savant_ray.storage.local import LocalStorage
from savant_ray.training.checkpoint import RECORDS, read_checkpoint, write_checkpoint
from savant_ray.training.host_copies import HostCopy
from savant_ray.worker import saving
from savant_ray.worker.saving import Saver
from tests.training.tiny import tiny_config, tiny_state


class RayTrain:
    """Records the reports."""

    def __init__(self) -> None:
        self.reported: list[tuple[int, Any]] = []

    def report(self, metrics: dict[str, Any], checkpoint: Any, **_: Any) -> None:
        self.reported.append((metrics["step"], checkpoint and Path(checkpoint.path).name))


class SlowDisk:
    """A storage that writes only after `may_write` is set, or fails with `error`."""

    def __init__(self) -> None:
        self.may_write = threading.Event()
        self.error: Exception | None = None

    def write(self, *arguments: Any) -> Path:
        assert self.may_write.wait(10)
        if self.error is not None:
            raise self.error
        return write_checkpoint(*arguments)


@pytest.fixture
def ray_train(monkeypatch: pytest.MonkeyPatch) -> RayTrain:
    ray_train = RayTrain()
    monkeypatch.setattr(saving.ray.train, "report", ray_train.report)
    return ray_train


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> SlowDisk:
    disk = SlowDisk()
    monkeypatch.setattr(protocol, "write_checkpoint", disk.write)
    return disk


@pytest.fixture
def events() -> list[Event]:
    return []


@pytest.fixture
def lines() -> list[dict[str, Any]]:
    return []


@pytest.fixture
def saver(tmp_path: Path, lines: list[dict[str, Any]], events: list[Event]) -> Saver:
    def emit(event: Event) -> int:
        events.append(event)
        return 0  # the driver has recorded all checkpoints

    return Saver(LocalStorage(tmp_path), {}, lines, emit)


def content(step: int) -> dict[str, Any]:
    return {"step": step, "savant": {"data_fingerprint": "abc", "format_version": 1}}


def test_the_written_checkpoint_is_the_state_at_the_save_while_training_continues(
    saver: Saver, disk: SlowDisk, ray_train: RayTrain, events: list[Event], tmp_path: Path
) -> None:
    state = tiny_state(tiny_config())
    expected = copy.deepcopy(state.to_checkpoint())
    saver.begin(0, "periodic", functools.partial(HostCopy().update, state), {"train_loss": 1.0})
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.zero_()
            state.optimizer.state[parameter]["exp_avg"].fill_(7)
    disk.may_write.set()
    saver.finish()
    written = read_checkpoint(tmp_path / "step_0")
    for name, weight in expected["model_state_dict"].items():
        assert torch.equal(written["model_state_dict"][name], weight)
    for index, moments in expected["optimizer_state_dict"]["state"].items():
        assert torch.equal(written["optimizer_state_dict"]["state"][index]["exp_avg"], moments["exp_avg"])
    assert ray_train.reported == [(0, "step_0")]
    (saved,) = events
    assert isinstance(saved, CheckpointSaved) and 0 <= saved.stall_seconds < saved.seconds


def test_a_save_waits_for_the_previous_one(saver: Saver, disk: SlowDisk, ray_train: RayTrain) -> None:
    saver.begin(1, "periodic", lambda: content(1), {})
    threading.Timer(0.2, disk.may_write.set).start()
    reported_before = []

    def copy_state() -> dict[str, Any]:
        reported_before.extend(ray_train.reported)
        return content(2)

    saver.begin(2, "stop", copy_state, {})
    assert reported_before == [(1, "step_1")]
    saver.finish()
    assert ray_train.reported == [(1, "step_1"), (2, "step_2")] and saver.saved_step == 2


def test_a_storage_failure_is_reported_and_the_next_checkpoint_has_the_records_of_both(
    saver: Saver,
    disk: SlowDisk,
    ray_train: RayTrain,
    lines: list[dict[str, Any]],
    events: list[Event],
    tmp_path: Path,
) -> None:
    disk.may_write.set()
    disk.error = OSError("no space left")
    lines.append({"event": "step", "step": 1})
    saver.begin(1, "periodic", lambda: content(1), {})
    assert not saver.finish()
    assert ray_train.reported == [(1, None)] and saver.saved_step == 0, "the other ranks wait for the report"
    assert isinstance(events[0], CheckpointFailed) and "no space left" in events[0].text
    disk.error = None
    lines.append({"event": "step", "step": 2})
    saver.begin(2, "periodic", lambda: content(2), {})
    assert saver.finish()
    records = (tmp_path / "step_2" / RECORDS).read_text().splitlines()
    assert [json.loads(line)["step"] for line in records] == [1, 2] and lines == []


def test_each_checkpoint_contains_all_lines_that_the_driver_may_not_have_recorded(
    ray_train: RayTrain, lines: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The driver dies after it has recorded the second of six checkpoints; old checkpoints are deleted."""
    unrecorded = iter([1, 1, 2, 3, 4, 5])  # after the first one, it records each while the next one is written
    saver = Saver(LocalStorage(tmp_path), {}, lines, lambda event: next(unrecorded))
    contents: list[list[int]] = []
    for step in range(1, 7):
        lines.append({"event": "step", "step": step})
        saver.begin(step, "periodic", functools.partial(content, step), {})
        lines.append({"event": "step", "step": step + 0.5})  # of a later step than the checkpoint
        assert saver.finish()
        records = (tmp_path / f"step_{step}" / RECORDS).read_text().splitlines()
        contents.append([json.loads(line)["step"] for line in records])
    assert contents[:3] == [[1], [1, 1.5, 2], [1.5, 2, 2.5, 3]]
    assert contents[-1] == [1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6], "the second may not have been recorded"


def test_any_other_error_ends_the_run_and_no_rank_waits(saver: Saver, disk: SlowDisk, ray_train: RayTrain) -> None:
    disk.may_write.set()
    disk.error = ValueError("a programming error")
    saver.begin(1, "periodic", lambda: content(1), {})
    with pytest.raises(ValueError, match="programming error"):
        saver.finish()
    assert ray_train.reported == [(1, None)]


def test_other_ranks_report_without_a_checkpoint(saver: Saver, ray_train: RayTrain, events: list[Event]) -> None:
    saver.begin(1, "periodic", None, {})
    saver.finish()
    assert ray_train.reported == [(1, None)] and events == []
