"""`training.ema_decay`: an exponential moving average of the weights, which is evaluated in their place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from savant_ray.config import Config
from savant_ray.driver.checks import checkpoint_bytes
from savant_ray.model.transformer import n_parameters
from savant_ray.training.checkpoint import read_checkpoint, write_checkpoint
from savant_ray.training.device import GIB
from savant_ray.training.loop import train
from savant_ray.training.memory import estimated_gb
from savant_ray.training.state import BatchFit, TrainingState
from savant_ray.training.step import take_step
from tests.training.tiny import (
    RecordingHost,
    local_batches,
    never,
    rank_micro_batches,
    tiny_config,
    tiny_state,
    weights,
)

KINDS = [("fp32", "adamw"), ("bf16", "adamw"), ("fp32", "muon")]
DECAY = 0.8


def average(state: TrainingState) -> dict[str, Tensor]:
    assert state.average is not None
    return {name: weight.clone() for name, weight in state.average.weights.items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def trained(config: Config, host: RecordingHost, checkpoint: dict[str, Any] | None = None) -> TrainingState:
    state = tiny_state(config)
    if checkpoint is not None:
        state.load_checkpoint(checkpoint)
    train(state, config, local_batches(state, config), host)
    return state


@pytest.mark.parametrize(("precision", "optimizer"), KINDS)
def test_the_average_is_that_of_the_formula_over_the_fp32_weights(precision: str, optimizer: str) -> None:
    state = tiny_state(tiny_config(precision=precision, optimizer=optimizer, ema_decay=0.25))
    expected = weights(state)
    assert equal(average(state), expected), "it begins with the initial weights"
    for step in range(6):
        take_step(state, rank_micro_batches(step * 12, 12, 0, 1, 4), 1e-2, 1.0, never)
        decay = min(0.25, (2 + step) / (11 + step))
        expected = {name: decay * expected[name] + (1 - decay) * weight for name, weight in weights(state).items()}
    for name, weight in average(state).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-8)
    assert not equal(average(state), weights(state))


@pytest.mark.parametrize(("precision", "optimizer"), KINDS)
def test_a_resumed_run_has_the_average_of_an_uninterrupted_one(precision: str, optimizer: str, tmp_path: Path) -> None:
    config = tiny_config(precision=precision, optimizer=optimizer, ema_decay=DECAY)
    straight = trained(config, RecordingHost())
    stopped = RecordingHost(stop_at=3)
    trained(config, stopped)
    saved = read_checkpoint(write_checkpoint(tmp_path, stopped.checkpoint, {}))
    resumed = trained(config, RecordingHost(), saved)
    assert equal(average(resumed), average(straight)) and equal(weights(resumed), weights(straight))


def test_the_average_does_not_change_the_training() -> None:
    with_average, without = (trained(tiny_config(ema_decay=decay), RecordingHost()) for decay in (DECAY, None))
    assert equal(weights(with_average), weights(without))
    assert without.to_checkpoint().keys() == with_average.to_checkpoint().keys() - {"ema_state_dict"}
    assert "average_updates" not in without.to_checkpoint()["savant"]


def test_a_step_without_an_update_does_not_change_the_average() -> None:
    state = tiny_state(tiny_config(ema_decay=DECAY))
    take_step(state, rank_micro_batches(0, 12, 0, 1, 4), 1e-2, 1.0, never)
    before, n_updates = average(state), state.to_checkpoint()["savant"]["average_updates"]
    take_step(state, [], 1e-2, 1.0, never)
    assert equal(average(state), before) and state.to_checkpoint()["savant"]["average_updates"] == n_updates == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_average_takes_the_place_of_the_weights_and_both_are_restored_bit_for_bit(precision: str) -> None:
    state = trained(tiny_config(precision=precision, ema_decay=DECAY), RecordingHost())
    own, averaged = weights(state), average(state)
    with pytest.raises(KeyError), state.averaged_weights():
        assert equal(weights(state), averaged)
        raise KeyError
    assert equal(weights(state), own) and equal(average(state), averaged)
    without = tiny_state(tiny_config(precision=precision))
    own = weights(without)
    with without.averaged_weights():
        assert equal(weights(without), own)


def test_an_average_begins_with_the_weights_of_a_checkpoint_that_has_none_and_ends_where_it_is_turned_off() -> None:
    hosts = RecordingHost(), RecordingHost()
    for host, decay in zip(hosts, (None, DECAY), strict=True):
        trained(tiny_config(max_steps=3, ema_decay=decay), host)
    without, with_average = (host.checkpoint for host in hosts)

    state = tiny_state(tiny_config(ema_decay=DECAY))
    assert state.load_checkpoint(without) == ["the average of the weights begins at step 3: the checkpoint has none"]
    assert equal(average(state), weights(state)) and state.to_checkpoint()["savant"]["average_updates"] == 0
    state = tiny_state(tiny_config())
    (note,) = state.load_checkpoint(with_average)
    assert note == "the average of the weights is dropped: training.ema_decay is null"
    assert "ema_state_dict" not in state.to_checkpoint()


def test_weights_that_are_loaded_alone_are_their_own_average() -> None:
    state = trained(tiny_config(ema_decay=DECAY), RecordingHost())
    other = tiny_state(tiny_config(ema_decay=DECAY))
    other.load_weights(weights(state))
    assert equal(average(other), weights(state))


def test_the_average_counts_in_the_estimates_of_memory_and_disk() -> None:
    without, with_average = (Config.from_dict({"training": {"ema_decay": decay}}) for decay in (None, 0.999))
    fit = BatchFit.from_config(without, torch.device("cuda"))
    more = 4 * n_parameters(without.model)
    assert estimated_gb(with_average, fit) - estimated_gb(without, fit) == pytest.approx(more / GIB)
    assert checkpoint_bytes(with_average) - checkpoint_bytes(without) == more
