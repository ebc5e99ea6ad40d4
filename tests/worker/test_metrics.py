"""What events say reaches Ray's metrics, and whatever happens to these, training goes on."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, ClassVar

import pytest

from savant_ray.events import CheckpointFailed, MicroBatchSkipped, Notice
from savant_ray.worker import metrics
from savant_ray.worker.metrics import METRICS, RunMetrics, ascii_name
from tests.reporting.events import attempt, checkpoint, step_done, validation


class FakeMeter:
    """Keeps what it is told, under its name; refuses what Ray's own refuses."""

    values: ClassVar[dict[str, float]] = {}

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.name, self.tag_keys = name, tag_keys

    def set_default_tags(self, tags: dict[str, str]) -> None:
        assert tuple(tags) == self.tag_keys and all(isinstance(value, str) for value in tags.values())
        self.tags = tags


class FakeGauge(FakeMeter):
    def set(self, value: float) -> None:
        self.values[self.name] = value


class FakeCounter(FakeMeter):
    def inc(self, value: float) -> None:
        assert value > 0
        self.values[self.name] = self.values.get(self.name, 0) + value


@pytest.fixture
def values(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What the metrics hold, by name."""
    kept: dict[str, float] = {}
    monkeypatch.setattr(FakeMeter, "values", kept)
    monkeypatch.setattr(metrics, "Gauge", FakeGauge)
    monkeypatch.setattr(metrics, "Counter", FakeCounter)
    return kept


def skip(rank: int) -> MicroBatchSkipped:
    return MicroBatchSkipped(step=1, rank=rank, loss="nan", positions=(3, 4))


def test_every_metric_names_a_field_of_its_event_and_no_name_comes_twice() -> None:
    for metric in METRICS:
        names = {"", *(field.name for field in dataclasses.fields(metric.event))}
        assert metric.field in names or isinstance(getattr(metric.event, metric.field), property), metric.name
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def test_steps_validations_and_checkpoints_are_shown_as_their_events_say(values: dict[str, float]) -> None:
    told = RunMetrics("run", 0)
    events = [attempt(workers=2), step_done(7, share_of_peak=0.4), validation(7), checkpoint(7)]
    for event in events:
        told.observe(event)
    assert values["savant_step"] == 7 and values["savant_workers"] == 2
    for metric in METRICS:
        for event in events:
            if type(event) is metric.event and (said := metric.value(event)):
                assert values[metric.name] == said


@pytest.mark.parametrize("name", ["checkpoints_savant", "a b#c?d%20 [1]{x}&;$", "-x", "x" * 100])
def test_a_name_that_ray_accepts_is_its_label_as_it_stands(name: str) -> None:
    assert ascii_name(name) == name


def test_other_names_get_labels_that_ray_accepts_and_that_stay_different() -> None:
    names = [
        "modèle",
        "modele\u0300",
        "modéle",
        "实验",
        "实验2",
        "🙂",
        "🙃",
        "é" * 120,
        "é" * 119,
        "x" * 101,
        "x" * 255,
    ]
    labels = [ascii_name(name) for name in names]
    assert all(label.isascii() and label.isprintable() and 0 < len(label) <= 100 for label in labels)
    assert len({*labels, *names}) == len(labels) + len(names)
    assert labels[0].startswith("modele-")


def test_tokens_and_faults_are_added_up(values: dict[str, float]) -> None:
    told = RunMetrics("run", 1)
    failed = CheckpointFailed(step=2, text="disk full")
    for event in (step_done(1, tokens=5), step_done(2, tokens=6, update_skipped=True), skip(1), skip(1), failed):
        told.observe(event)
    assert values["savant_tokens"] == 11 and values["savant_skipped_updates"] == 1
    assert values["savant_skipped_micro_batches"] == 2 and values["savant_failed_checkpoints"] == 1


def test_what_is_not_known_is_not_shown_and_other_events_are_no_ones(values: dict[str, float]) -> None:
    told = RunMetrics("run", 0)
    told.observe(step_done(1, share_of_peak=None, tokens=0))
    told.observe(Notice(text="read this"))
    assert "savant_share_of_peak" not in values and "savant_tokens" not in values


def test_every_rank_has_its_own_memory_and_wait_for_data(values: dict[str, float]) -> None:
    RunMetrics("run", 1).observe_rank(0.25, 1.5)
    assert values == {"savant_data_wait_seconds": 0.25, "savant_memory_gb": 1.5}


def test_metrics_that_fail_end_themselves_and_not_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no metrics agent")

    told = RunMetrics("run", 1)
    monkeypatch.setattr(metrics.Gauge, "set", fail)
    told.observe(step_done(1))
    told.observe(step_done(2))
    told.observe_rank(0.25, 1.5)
    monkeypatch.setattr(metrics, "_meter", fail)
    RunMetrics("run", 0).observe(step_done(1))


def test_a_gauge_is_set_again_because_ray_forgets_it_and_a_counter_is_not(
    values: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "REPEAT_SECONDS", 0.001)
    run_metrics = RunMetrics("tiny", 0)
    run_metrics.observe(validation(5))
    run_metrics.observe(skip(rank=0))
    for _ in range(2):
        values.pop("savant_validation_loss")
        deadline = time.monotonic() + 30
        while "savant_validation_loss" not in values:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    assert values == {"savant_validation_loss": 5.1234, "savant_skipped_micro_batches": 1}
