"""The number of loops of a step depends on settings, seed and step only, and the model's own depth stays that of answers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from savant_ray.config import Config
from savant_ray.events import StepDone
from savant_ray.training.seeds import loops_of_step
from tests.training.tiny import RecordingHost, assert_equal_weights, tiny_config, trained


def config_of(n_loops: int, seed: int = 0, **training: Any) -> Config:
    settings = tiny_config(**training).to_dict()
    settings["model"]["n_loops"], settings["run"]["seed"] = n_loops, seed
    return Config.from_dict(settings)


def losses(host: RecordingHost) -> list[float]:
    return [event.train_loss for event in host.events if isinstance(event, StepDone)]


def test_by_default_every_step_has_the_loops_of_the_model() -> None:
    assert {loops_of_step(config_of(3), step) for step in range(1, 100)} == {3}


def test_a_fraction_of_the_steps_has_twice_the_loops() -> None:
    counts = Counter(loops_of_step(config_of(4, double_loops_fraction=0.4), step) for step in range(1, 10_001))
    assert counts.keys() == {4, 8} and counts[8] / 10_000 == pytest.approx(0.4, abs=0.02)


def test_another_seed_draws_other_numbers_of_loops() -> None:
    drawn = [
        [loops_of_step(config_of(4, seed, double_loops_fraction=0.5), step) for step in range(50)] for seed in (0, 1)
    ]
    assert drawn[0] != drawn[1]


def test_a_resumed_run_with_twice_the_loops_in_some_steps_equals_an_uninterrupted_one() -> None:
    config = config_of(3, double_loops_fraction=0.5, max_steps=8)
    uninterrupted, host = trained(config)
    for stop_at in (1, 4):
        _, first = trained(config, stop_at=stop_at)
        resumed, second = trained(config, first.checkpoint)
        assert losses(first) + losses(second) == losses(host)
        assert_equal_weights(resumed, uninterrupted)


def test_steps_with_twice_the_loops_are_those_of_a_model_with_so_many_loops() -> None:
    deep, deep_host = trained(config_of(4, max_steps=4))
    double, double_host = trained(config_of(2, double_loops_fraction=1.0, max_steps=4))
    assert losses(deep_host) == losses(double_host)
    assert_equal_weights(deep, double)


def test_steps_with_twice_the_loops_do_not_change_the_number_of_loops_of_an_answer() -> None:
    config = config_of(2, double_loops_fraction=1.0, max_steps=2)
    state, _ = trained(config)
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        own = state.model(tokens)
        assert torch.equal(own, state.model.head(state.model.hidden_states(tokens, n_loops=2)))
        assert not torch.equal(own, state.model.head(state.model.hidden_states(tokens, n_loops=4)))
