"""With `training.schedule: wsd` a run can be lengthened, and decayed from any checkpoint before its decay, exactly."""

from __future__ import annotations

from typing import Any

import pytest

from savant_ray.config import Config, TrainingConfig
from savant_ray.events import StepDone
from tests.training.tiny import RecordingHost, assert_equal_weights, tiny_config, trained


def wsd(max_steps: int, **training: Any) -> Config:
    return tiny_config(schedule="wsd", max_steps=max_steps, warmup_steps=2, decay_fraction=0.25, **training)


def steps(host: RecordingHost) -> list[tuple[int, float, float]]:
    return [(event.step, event.train_loss, event.learning_rate) for event in host.events if isinstance(event, StepDone)]


def test_a_run_that_is_lengthened_before_its_decay_equals_one_that_was_planned_with_that_length() -> None:
    planned, planned_host = trained(wsd(16))
    _, first = trained(wsd(8), stop_at=6)
    lengthened, second = trained(wsd(16), first.checkpoint)
    assert steps(first) + steps(second) == steps(planned_host)
    assert_equal_weights(lengthened, planned)


@pytest.mark.parametrize(("stop_at", "max_steps"), [(3, 4), (6, 8), (9, 12)])
def test_a_run_that_is_decayed_early_equals_one_that_was_planned_with_that_length(stop_at: int, max_steps: int) -> None:
    planned, planned_host = trained(wsd(max_steps))
    _, first = trained(wsd(40), stop_at=stop_at)
    decayed, second = trained(wsd(max_steps), first.checkpoint)
    assert steps(first) + steps(second) == steps(planned_host) and steps(second)[-1][2] == 0
    assert_equal_weights(decayed, planned)


def test_the_last_step_before_the_decay_is_saved() -> None:
    _, host = trained(wsd(8))
    assert host.saved == [(6, "before the decay of the learning rate"), (8, "final")]


def test_warm_up_and_decay_are_numbers_of_steps() -> None:
    settings = TrainingConfig(max_steps=1_000, schedule="wsd")
    assert (settings.n_warmup_steps, settings.n_decay_steps, settings.last_stable_step) == (50, 200, 800)
    cosine = TrainingConfig(max_steps=1_000, warmup_steps=0)
    assert (cosine.n_warmup_steps, cosine.n_decay_steps, cosine.last_stable_step) == (0, None, None)
    assert TrainingConfig(max_steps=2, schedule="wsd").n_decay_steps == 1
