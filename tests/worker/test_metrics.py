"""Events are exported as Ray's metrics, and an error in these does not stop training."""

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
    """Records values by name; accepts the arguments that Ray's own meters accept."""

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
    """Return the values of the metrics by name."""
    kept: dict[str, float] = {}
    monkeypatch.setattr(FakeMeter, "values", kept)
    monkeypatch.setattr(metrics, "Gauge", FakeGauge)
    monkeypatch.setattr(metrics, "Counter", FakeCounter)
    return kept


def skip(rank: int) -> MicroBatchSkipped:
    return MicroBatchSkipped(step=1, rank=rank, loss="nan", positions=(3, 4))


def test_every_metric_has_a_unique_name_and_a_field_of_its_event() -> None:
    for metric in METRICS:
        names = {"", *(field.name for field in dataclasses.fields(metric.event))}
        assert metric.field in names or isinstance(getattr(metric.event, metric.field), property), metric.name
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def test_metrics_have_the_values_of_step_validation_and_checkpoint_events(values: dict[str, float]) -> None:
    run_metrics = RunMetrics("run", 0)
    events = [attempt(workers=2), step_done(7, share_of_peak=0.4), validation(7), checkpoint(7)]
    for event in events:
        run_metrics.observe(event)
    assert values["savant_step"] == 7 and values["savant_workers"] == 2
    for metric in METRICS:
        for event in events:
            if type(event) is metric.event and (value := metric.value(event)):
                assert values[metric.name] == value


@pytest.mark.parametrize("name", ["checkpoints_savant", "a b#c?d%20 [1]{x}&;$", "-x", "x" * 100])
def test_a_name_that_ray_accepts_is_the_label(name: str) -> None:
    assert ascii_name(name) == name


def test_other_run_names_get_different_labels_that_ray_accepts() -> None:
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


def test_counters_add_up_tokens_and_failures(values: dict[str, float]) -> None:
    run_metrics = RunMetrics("run", 1)
    failed = CheckpointFailed(step=2, text="disk full")
    for event in (step_done(1, tokens=5), step_done(2, tokens=6, update_skipped=True), skip(1), skip(1), failed):
        run_metrics.observe(event)
    assert values["savant_tokens"] == 11 and values["savant_skipped_updates"] == 1
    assert values["savant_skipped_micro_batches"] == 2 and values["savant_failed_checkpoints"] == 1


def test_unknown_values_and_other_events_set_no_metric(values: dict[str, float]) -> None:
    run_metrics = RunMetrics("run", 0)
    run_metrics.observe(step_done(1, share_of_peak=None, tokens=0))
    run_metrics.observe(Notice(text="a notice"))
    assert "savant_share_of_peak" not in values and "savant_tokens" not in values


def test_every_rank_has_its_own_memory_and_wait_for_data(values: dict[str, float]) -> None:
    RunMetrics("run", 1).observe_rank(0.25, 1.5)
    assert values == {"savant_data_wait_seconds": 0.25, "savant_memory_gb": 1.5}


def test_an_error_in_ray_disables_the_metrics_and_does_not_reach_training(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = []

    def fail(*_: Any, **__: Any) -> Any:
        failures.append("no metrics agent")
        raise RuntimeError("no metrics agent")

    run_metrics = RunMetrics("run", 1)
    monkeypatch.setattr(metrics.Gauge, "set", fail)
    run_metrics.observe_rank(0.25, 1.5)
    run_metrics.observe(step_done(1))
    run_metrics.observe_rank(0.25, 1.5)
    assert len(failures) == 1, "Ray is not called again"
    monkeypatch.setattr(metrics.Gauge, "__init__", fail)
    RunMetrics("run", 0).observe(step_done(1))
    assert len(failures) == 2


def test_gauges_are_set_again_periodically_and_counters_are_not(
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
