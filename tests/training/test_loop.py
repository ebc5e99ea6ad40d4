"""The loop: when it saves and validates, and that a stopped run continues bit for bit."""

from __future__ import annotations

import io
import itertools

import pytest
import torch

from savant_ray.config import Config
from savant_ray.errors import TrainingError
from savant_ray.events import Notice, StepDone
from savant_ray.training.host_copies import WeightChanges
from savant_ray.training.loop import train
from tests.training.tiny import RecordingHost, local_batches, tiny_config, tiny_state, weights


def with_cadence(config: Config, checkpoint: int, validation: int) -> Config:
    settings = config.to_dict()
    settings["checkpoint"]["every_steps"], settings["validation"]["every_steps"] = checkpoint, validation
    return Config.from_dict(settings)


def losses(host: RecordingHost) -> dict[int, float]:
    return {event.step: event.train_loss for event in host.events if isinstance(event, StepDone)}


def test_checkpoints_and_validations_follow_their_interval_and_the_last_step() -> None:
    config = with_cadence(tiny_config(max_steps=7), checkpoint=2, validation=3)
    host, state = RecordingHost(), tiny_state(config)
    assert train(state, config, local_batches(state, config), host)
    assert host.saved == [(2, "periodic"), (4, "periodic"), (6, "periodic"), (7, "final")]
    assert host.validated == [3, 6, 7]
    assert list(losses(host)) == [1, 2, 3, 4, 5, 6, 7]


def test_training_learns() -> None:
    config = tiny_config(max_steps=30, learning_rate=3e-2)
    host, state = RecordingHost(), tiny_state(config)
    train(state, config, ([next(local_batches(tiny_state(config), config))[0]] for _ in range(30)), host)
    assert losses(host)[30] < losses(host)[1] - 1.0


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16"])
@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_a_stopped_run_resumes_bit_for_bit(precision: str, stop_at: int) -> None:
    config = tiny_config(precision=precision)
    straight_host, straight = RecordingHost(), tiny_state(config)
    train(straight, config, local_batches(straight, config), straight_host)

    first_host, first = RecordingHost(stop_at=stop_at), tiny_state(config)
    assert not train(first, config, local_batches(first, config), first_host)
    assert first_host.saved == [(stop_at, "stop")]
    file = io.BytesIO()
    torch.save(first_host.checkpoint, file)
    file.seek(0)

    second_host, second = RecordingHost(), tiny_state(config)
    second.load_checkpoint(torch.load(file, weights_only=True))
    assert (second.step, second.position) == (stop_at, stop_at * 12)
    assert train(second, config, local_batches(second, config), second_host)
    assert losses(first_host) | losses(second_host) == losses(straight_host)
    assert all(torch.equal(w, weights(second)[name]) for name, w in weights(straight).items())


@pytest.mark.parametrize("stop_at", [3, 6])
def test_a_validation_that_a_stop_cut_short_is_made_up_for_and_its_step_saved_once(stop_at: int) -> None:
    config = with_cadence(tiny_config(), checkpoint=2, validation=3)
    first, state = RecordingHost(stop_at=stop_at, in_validation=True), tiny_state(config)
    assert not train(state, config, local_batches(state, config), first)
    assert [step for step, _ in first.saved] == ([2, 3] if stop_at == 3 else [2, 4, 6])
    second, resumed = RecordingHost(), tiny_state(config)
    resumed.load_checkpoint(first.checkpoint)
    assert train(resumed, config, local_batches(resumed, config), second)
    assert first.validated + second.validated == [3, 6]
    saved = [step for step, _ in first.saved + second.saved]
    assert len(saved) == len(set(saved)), "Ray Train drops a checkpoint that is reported twice"


def test_a_stop_before_the_first_step_saves_nothing_again() -> None:
    config = with_cadence(tiny_config(), checkpoint=2, validation=2)
    first, state = RecordingHost(stop_at=2), tiny_state(config)
    assert not train(state, config, local_batches(state, config), first) and first.saved == [(2, "stop")]
    second = RecordingHost(stop_at=2, in_validation=True)
    assert not train(state, config, local_batches(state, config), second)
    assert second.saved == [] and second.events == []


def test_a_step_that_would_outlast_the_grace_period_is_given_up_and_the_one_before_saved() -> None:
    config = tiny_config()
    host, state = RecordingHost(stop_at=4, grace=0.0), tiny_state(config)
    host.grace_left = lambda: -1.0 if host.step == 3 else None
    assert not train(state, config, local_batches(state, config), host)
    assert host.saved == [(3, "stop")] and list(losses(host)) == [1, 2, 3]
    assert "step 4 would outlast" in next(event.text for event in host.events if isinstance(event, Notice))


def test_training_continues_when_a_checkpoint_fails_and_a_later_one_is_written() -> None:
    config = with_cadence(tiny_config(), checkpoint=2, validation=1000)
    host, state = RecordingHost(), tiny_state(config)
    host.storage_refuses = True
    train(state, config, itertools.islice(local_batches(state, config), 5), host)
    host.storage_refuses = False
    train(state, config, local_batches(state, config), host)
    assert host.saved == [(6, "final")] and list(losses(host)) == [1, 2, 3, 4, 5, 6]


class RefusedOnce(RecordingHost):
    """A host whose storage refuses the first checkpoint only."""

    def finish_saving(self) -> bool:
        kept = super().finish_saving()
        self.storage_refuses = self.storage_refuses and kept
        return kept


def test_a_stop_in_the_validation_of_a_step_that_the_storage_refused_saves_it_again() -> None:
    config = with_cadence(tiny_config(), checkpoint=3, validation=3)
    host, state = RefusedOnce(stop_at=3, in_validation=True), tiny_state(config)
    host.storage_refuses = True
    assert not train(state, config, local_batches(state, config), host)
    assert host.saved == [(3, "stop")] and host.checkpoint["step"] == 3


def test_a_run_that_no_longer_learns_ends_with_an_error() -> None:
    config = tiny_config(max_steps=50, max_skipped_steps=3)
    host, state = RecordingHost(), tiny_state(config)
    with torch.no_grad():
        state.model.head.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="3 steps in a row"):
        train(state, config, local_batches(state, config), host)
    assert state.step == 3 and host.saved == []


def test_nearly_all_bf16_weights_change_at_the_default_learning_rate() -> None:
    config = tiny_config(precision="bf16", learning_rate=2e-5, warmup_fraction=0.0, max_steps=10_000)
    host, state = RecordingHost(), tiny_state(config)
    changes = WeightChanges()
    assert changes.measure(state) is None
    steps = local_batches(state, config)
    train(state, config, (next(steps) for _ in range(100)), host)
    assert changes.measure(state) >= 0.95
