"""Spikes: which steps are one, and what training does about them."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from savant_ray.config import Config
from savant_ray.data.order import positions_in_order, rank_slice
from savant_ray.errors import TrainingError
from savant_ray.events import Rewound, SpikeFound, StepDone
from savant_ray.training.loop import train
from savant_ray.training.spikes import MAX_SPIKES, MIN_STEPS, WINDOW, SpikeWindow
from savant_ray.training.state import TrainingState
from savant_ray.training.step import MicroBatch
from tests.training.tiny import (
    LENGTH,
    VOCABULARY,
    RecordingHost,
    assert_equal_weights,
    tiny_config,
    tiny_state,
    unmasked,
    weights,
)

BATCH = 4
SAVED = MIN_STEPS  # step of the checkpoint from which each test continues
QUIET = SAVED + 3  # steps before the first spike of a test
STEPS = QUIET + 9


def quiet_steps(n: int, seed: int = 0) -> list[tuple[float, float]]:
    """Return losses and gradient norms with normal and log-normal noise, which fall as at the start of a training."""
    noise = np.random.default_rng(seed)
    fall = 1 + 2 * np.exp(-np.arange(n) / 200)
    losses, norms = 2.0 * fall * (1 + 0.02 * noise.standard_normal(n)), fall * np.exp(0.1 * noise.standard_normal(n))
    return list(zip(losses.tolist(), norms.tolist(), strict=True))


def filled(steps: list[tuple[float, float]], effective_batch: int = 192) -> SpikeWindow:
    window = SpikeWindow(effective_batch)
    for loss, norm in steps:
        window.add(loss, norm)
    return window


def test_a_step_is_a_spike_more_than_six_deviations_above_the_mean_and_only_above() -> None:
    norms = [0.0] * 15 + [2.0]  # their limit is more than 8 times their mean
    window = filled([(2.0 + step % 2 * 0.2, norms[step % 16]) for step in range(WINDOW)])
    deviation = (WINDOW / (WINDOW - 1)) ** 0.5  # of ±1
    for factor, is_spike in ((5.99, False), (6.01, True), (-20.0, False)):
        assert (window.find(2.1 + factor * 0.1 * deviation, 0.1) is not None) == is_spike
        assert (window.find(2.1, 0.125 + factor * 2 * (1 / 16 * 15 / 16) ** 0.5 * deviation) is not None) == is_spike
    spike = window.find(3.0, 9.0)
    assert spike is not None and (spike.loss, spike.grad_norm) == (3.0, 9.0)
    assert 2.1 < spike.loss_limit < 3.0 and 0.125 < spike.grad_norm_limit < 9.0


def test_a_gradient_norm_is_a_spike_only_at_eight_times_the_mean_because_quiet_runs_have_some_at_seven_times() -> None:
    window = filled([(2.0, 1.0), (2.2, 1.2)] * (WINDOW // 2))
    assert window.find(2.1, 8.7) is None and window.find(2.1, 8.9) is not None


def test_nothing_is_a_spike_before_the_window_is_half_full() -> None:
    steps = quiet_steps(MIN_STEPS)
    assert filled(steps[:-1]).find(1e9, 1e9) is None and filled(steps).find(1e9, 1e9) is not None


@pytest.mark.parametrize("of", ["loss", "gradient norm", "both"])
def test_50_of_50_injected_spikes_are_found_at_any_step_and_quiet_steps_are_not(of: str) -> None:
    draw, found = random.Random(0), 0
    for case in range(50):
        steps = quiet_steps(1_000, seed=case)
        at, factor = draw.randrange(WINDOW, 1_000), 10 ** draw.uniform(1.2, 3)
        window = filled(steps[max(0, at - WINDOW - MIN_STEPS) : at])
        loss, norm = steps[at]
        found += (
            window.find(loss * (factor if of != "gradient norm" else 1), norm * (factor if of != "loss" else 1))
            is not None
        )
        assert window.find(loss, norm) is None
    assert found == 50


def test_a_large_spike_does_not_hide_a_smaller_one_after_it() -> None:
    window = filled(quiet_steps(500))
    limits = window.find(10.0, 1.0)
    window.add(1e6, 1e6)
    assert window.find(10.0, 1.0) is not None and window.find(2.0, 20.0) is not None
    assert limits is not None and window.find(10.0, 1.0).loss_limit == pytest.approx(limits.loss_limit, rel=0.01)


@pytest.mark.parametrize("factor", [1.5, 3.0, 100.0])
def test_a_loss_that_stays_high_is_a_spike_for_an_eighth_of_the_window_only(factor: float) -> None:
    steps = quiet_steps(500 + 3 * WINDOW)
    window = filled(steps[:500])
    spikes = []
    for loss, norm in steps[500:]:
        spikes.append(window.find(factor * loss, factor * norm) is not None)
        window.add(factor * loss, factor * norm)
    assert all(spikes[: MAX_SPIKES + 1]) and not any(spikes[MAX_SPIKES + 1 :])


def test_rounding_is_no_spike_where_all_values_are_equal() -> None:
    window = filled([(1.0, 0.5)] * WINDOW)
    assert window.find(1.0001, 0.50001) is None and window.find(1.02, 0.5) is not None


def test_steps_without_a_finite_loss_or_norm_leave_the_window_as_it_is() -> None:
    window = filled(quiet_steps(200))
    before = window.to_record()
    for value in (float("nan"), float("inf")):
        window.add(value, 1.0)
        window.add(2.0, value)
    assert window.to_record() == before


def test_a_restored_window_decides_as_the_saved_one_and_one_of_another_batch_is_empty() -> None:
    window = filled(quiet_steps(300))
    restored = SpikeWindow(192).restored(window.to_record())
    assert restored.to_record() == window.to_record() and restored.find(9.0, 1.0) == window.find(9.0, 1.0) is not None
    assert SpikeWindow(96).restored(window.to_record()).find(9.0, 1.0) is None
    assert SpikeWindow(192).restored(None).find(9.0, 1.0) is None


def spiky(**training: Any) -> Config:
    config = tiny_config(
        **(dict(max_steps=STEPS, batch_size=2, accumulation=2, warmup_fraction=0.0) | training)
    ).to_dict()
    config["checkpoint"]["every_steps"] = SAVED + 8
    return Config.from_dict(config)


def sequence(position: int, is_bad: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one document: a few tokens that are soon learned, or others that the model has never seen."""
    generator = torch.Generator().manual_seed(position)
    low, high = (20, VOCABULARY) if is_bad else (1, 4)
    return torch.randint(low, high, (LENGTH,), generator=generator), torch.zeros(LENGTH, dtype=torch.int64)


class Host(RecordingHost):
    """A host whose sequences at positions `bad` of the complete order make a spike."""

    def __init__(self, config: Config, bad: set[int], rank: int = 0, world_size: int = 1, **others: Any) -> None:
        super().__init__(rank, **others)
        self.config, self.bad, self.world_size = config, bad, world_size

    def local_batches(self, state: TrainingState) -> Iterator[list[MicroBatch]]:
        settings, first, n_steps = self.config.training, state.position, self.config.training.max_steps - state.step
        return (self._local_batch(first + step * settings.effective_batch, state.left_out) for step in range(n_steps))

    def _local_batch(self, first: int, left_out: tuple[tuple[int, int], ...]) -> list[MicroBatch]:
        settings = self.config.training
        mine = rank_slice(settings.effective_batch, self.rank, self.world_size)
        positions = first + np.array(mine, dtype=np.int64)
        rows = positions_in_order(positions, left_out).tolist()
        parts = [slice(i, i + settings.batch_size) for i in range(0, len(rows), settings.batch_size)]
        return [
            unmasked(
                torch.stack([sequence(row, row in self.bad)[0] for row in rows[part]]),
                torch.stack([sequence(row, row in self.bad)[1] for row in rows[part]]),
                tuple(positions[part].tolist()),
                (mine.start + part.start) // settings.batch_size,
            )
            for part in parts
        ]

    def train(self, state: TrainingState) -> bool:
        return train(state, self.config, self.local_batches(state), self)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def positions_of(step: int, n_steps: int = 1) -> set[int]:
    """Return the positions of `step`, and of the steps after it, in a run that leaves nothing out."""
    return set(range((step - 1) * BATCH, (step - 1 + n_steps) * BATCH))


@cache
def quiet_checkpoint() -> dict[str, Any]:
    """Return the checkpoint after `SAVED` steps without spikes."""
    config = spiky()
    host = Host(config, set(), stop_at=SAVED)
    host.train(tiny_state(config))
    return host.checkpoint


def loaded(config: Config, checkpoint: dict[str, Any]) -> TrainingState:
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    state = tiny_state(config)
    state.load_checkpoint(torch.load(file, weights_only=True))
    return state


def trained(config: Config, bad: set[int], **others: Any) -> tuple[Host, TrainingState]:
    """Train on from the checkpoint of the quiet steps."""
    return resumed(Host(config, bad, **others), quiet_checkpoint())


def resumed(
    host: Host, checkpoint: dict[str, Any], files: dict[str, bytes] | None = None
) -> tuple[Host, TrainingState]:
    """Train on from a checkpoint in a run folder with these files."""
    state = loaded(host.config, checkpoint)
    for content in (files or {}).values():
        state.left_out = tuple((first, n_sequences) for first, n_sequences in json.loads(content))
    host.checkpoint, host.step = checkpoint, state.step
    host.train(state)
    return host, state


def losses(*hosts: Host) -> dict[int, float]:
    """Return the loss of each step; that of a step that was repeated counts once."""
    return {event.step: event.train_loss for host in hosts for event in host.of(StepDone)}


def test_a_quiet_run_has_no_spikes_and_trains_as_without_them() -> None:
    results = {action: trained(spiky(on_spike=action), set()) for action in ("warn", "skip", "rewind")}
    for host, state in results.values():
        assert not host.of(SpikeFound) and not host.of(Rewound)
        assert losses(host) == losses(results["warn"][0])
        assert_equal_weights(state, results["warn"][1])


@pytest.mark.parametrize("action", ["warn", "skip"])
def test_a_spike_is_an_event_with_the_steps_sequences_and_is_trained_on_only_with_warn(action: str) -> None:
    host, state = trained(spiky(on_spike=action), positions_of(QUIET + 1), stop_at=QUIET + 1)
    (spike,) = host.of(SpikeFound)
    assert (spike.step, spike.first_position, spike.n_sequences) == (QUIET + 1, QUIET * BATCH, BATCH)
    assert spike.train_loss > spike.loss_limit and spike.update_skipped == (action == "skip")
    last = host.of(StepDone)[-1]
    assert (last.step, last.train_loss, last.update_skipped) == (spike.step, spike.train_loss, spike.update_skipped)
    assert state.step == QUIET + 1
    before = trained(spiky(), set(), stop_at=QUIET)[1]
    changed = any(not torch.equal(weight, weights(before)[name]) for name, weight in weights(state).items())
    assert changed == (action == "warn")


@pytest.mark.parametrize(("spike_at", "saved"), [(QUIET + 1, SAVED), (STEPS, SAVED + 8)])
def test_a_rewound_run_is_bit_for_bit_one_whose_text_lacks_the_spikes_sequences(spike_at: int, saved: int) -> None:
    config = spiky(on_spike="rewind")
    host, state = trained(config, positions_of(spike_at))
    (rewound,) = host.of(Rewound)
    assert (rewound.step, rewound.spike.step) == (saved, spike_at)
    assert rewound.spike.first_position == (spike_at - 1) * BATCH and not host.of(SpikeFound)
    assert [event.step for event in host.of(StepDone)] == [*range(SAVED + 1, spike_at), *range(saved + 1, STEPS + 1)]
    assert host.saved == [(SAVED + 8, "periodic"), (STEPS, "final")], "each step is saved once"

    other, clean = Host(config, host.bad), loaded(config, quiet_checkpoint())
    clean.left_out = state.left_out
    other.train(clean)
    assert not other.of(Rewound) and losses(other) == losses(host)
    assert_equal_weights(state, clean)


def test_without_a_checkpoint_the_step_takes_other_sequences_and_the_weights_are_those_of_a_rewound_run() -> None:
    config, bad = spiky(on_spike="rewind"), positions_of(QUIET + 1)
    host, state = Host(config, bad), loaded(config, quiet_checkpoint())
    host.train(state)
    (rewound,) = host.of(Rewound)
    assert rewound.step == QUIET
    with_checkpoint, other = uninterrupted("rewind")
    assert losses(host) == losses(with_checkpoint)
    assert_equal_weights(state, other)


@cache
def uninterrupted(action: str) -> tuple[Host, TrainingState]:
    """Return a run with a spike in the step after the quiet ones."""
    return trained(spiky(on_spike=action), positions_of(QUIET + 1))


@pytest.mark.parametrize("stop_at", [QUIET - 1, QUIET, QUIET + 1, QUIET + 3])
@pytest.mark.parametrize("action", ["warn", "skip", "rewind"])
def test_a_run_that_stops_before_in_or_after_a_spike_resumes_bit_for_bit(action: str, stop_at: int) -> None:
    config, bad = spiky(on_spike=action), positions_of(QUIET + 1)
    straight_host, straight = uninterrupted(action)
    first, _ = trained(config, bad, stop_at=stop_at)
    second, state = resumed(Host(config, bad), first.checkpoint, first.files)
    assert losses(first, second) == losses(straight_host)
    assert state.left_out == straight.left_out == (((QUIET * BATCH, BATCH),) if action == "rewind" else ())
    assert len(first.of(SpikeFound) + second.of(SpikeFound)) == (action != "rewind")
    assert_equal_weights(state, straight)


def test_weights_that_an_error_of_the_hardware_has_damaged_are_not_saved_by_a_stop_in_the_step_that_shows_it() -> None:
    class Damaging(Host):
        def local_batches(self, state: TrainingState) -> Iterator[list[MicroBatch]]:
            for batch in super().local_batches(state):
                if state.step == QUIET:
                    with torch.no_grad():
                        state.model.head.weight.mul_(-1000)
                yield batch

    config = spiky(on_spike="rewind")
    first, _ = resumed(Damaging(config, set(), stop_at=QUIET + 1), quiet_checkpoint())
    (rewound,) = first.of(Rewound)
    assert (rewound.step, rewound.spike.step) == (SAVED, QUIET + 1) and not first.saved
    _, state = resumed(Host(config, set()), first.checkpoint, first.files)
    undamaged = loaded(config, quiet_checkpoint())
    undamaged.left_out = state.left_out
    Host(config, set()).train(undamaged)
    assert state.left_out == ((QUIET * BATCH, BATCH),) and state.step == STEPS
    assert_equal_weights(state, undamaged)


def test_sequences_of_several_spikes_are_left_out() -> None:
    bad = positions_of(QUIET + 1) | positions_of(QUIET + 5)
    host, state = trained(spiky(on_spike="rewind"), bad)
    # The second spike's step comes one step earlier, because the sequences of the first one are left out.
    assert [event.spike.step for event in host.of(Rewound)] == [QUIET + 1, QUIET + 4]
    assert state.left_out == ((QUIET * BATCH, BATCH), ((QUIET + 3) * BATCH, BATCH))


def test_the_same_spike_after_several_rewinds_ends_the_run_with_advice() -> None:
    config = spiky(on_spike="rewind")
    host = Host(config, positions_of(QUIET + 1, n_steps=100))
    with pytest.raises(TrainingError, match=r"step 68 has a spike .* the sequences of 3 others .*\n?.*learning_rate"):
        resumed(host, quiet_checkpoint())
    assert [event.step for event in host.of(Rewound)] == [SAVED] * 3 and not host.saved


def test_what_was_left_out_later_in_the_order_does_not_count_as_recent_rewinds() -> None:
    config = spiky(on_spike="rewind")
    host, state = Host(config, positions_of(QUIET + 1)), loaded(config, quiet_checkpoint())
    state.left_out = later = tuple(((STEPS + n) * BATCH, BATCH) for n in range(3))
    host.train(state)
    assert state.step == STEPS and state.left_out == (*later, (QUIET * BATCH, BATCH))


def test_skipping_too_many_spikes_in_a_row_ends_the_run_with_advice() -> None:
    config = spiky(on_spike="skip", max_skipped_steps=3)
    host = Host(config, positions_of(QUIET + 1, n_steps=100))
    with pytest.raises(TrainingError, match=r"3 steps in a row .* set training.on_spike to warn"):
        resumed(host, quiet_checkpoint())


def test_a_resume_with_another_text_forgets_the_window_and_what_was_left_out() -> None:
    host, _ = trained(spiky(on_spike="rewind"), positions_of(QUIET + 1))
    state = tiny_state(host.config)
    state.data_fingerprint = "another"
    state.load_checkpoint(host.checkpoint)
    assert state.left_out == () and state.spike_window.find(1e9, 1e9) is None


def _rank(rank: int, world_size: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    torch.set_num_threads(1)
    host, state = trained(
        spiky(on_spike="rewind"), set(sorted(positions_of(QUIET + 1))[-2:]), rank=rank, world_size=world_size
    )
    rewound = [(event.step, event.spike.step) for event in host.of(Rewound)]
    torch.save((rewound, state.left_out, weights(state)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_all_ranks_rewind_together_if_one_has_the_spikes_sequences(tmp_path: Path) -> None:
    mp.spawn(_rank, (2, str(tmp_path)), nprocs=2)
    (first, left_out, final), (other, other_left_out, other_final) = (
        torch.load(tmp_path / f"{r}.pt") for r in range(2)
    )
    assert first == [(SAVED, QUIET + 1)] and other == [] and left_out == other_left_out == ((QUIET * BATCH, BATCH),)
    assert all(torch.equal(final[name], other_final[name]) for name in final)
