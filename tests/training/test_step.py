"""A step's result depends on its sequences, not on how they are split."""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import savant_ray.training.step as module
from savant_ray.events import StepDone
from savant_ray.training.efficiency import Peak
from savant_ray.training.loop import train
from savant_ray.training.state import new_state
from savant_ray.training.step import MicroBatch, outlasts, take_step
from tests.training.tiny import (
    CPU,
    RecordingHost,
    local_batches,
    micro_batch,
    never,
    rank_micro_batches,
    tiny_config,
    tiny_state,
    weights,
    with_bad_losses,
)

N = 12


def step(state, micro_batches, grace_left=never):
    return take_step(state, micro_batches, learning_rate=1e-2, gradient_clip=1.0, grace_left=grace_left)


@pytest.mark.parametrize("batch_size", [1, 4, 5, 12])
def test_the_split_into_micro_batches_does_not_matter(batch_size: int) -> None:
    states = [tiny_state(tiny_config()) for _ in range(2)]
    whole = step(states[0], [micro_batch(np.arange(N))])
    parts = step(states[1], rank_micro_batches(0, N, 0, 1, batch_size))
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6) and parts.tokens == whole.tokens
    for a, b in zip(weights(states[0]).values(), weights(states[1]).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def _rank(rank: int, world_size: int, folder: str, backend: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    torch.set_num_threads(1)
    device = CPU
    if backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)  # as a worker does
    config = tiny_config(deterministic=False)
    state = new_state(config, device)

    def local_batch(first: int, batch_size: int) -> list[MicroBatch]:
        return [each.to(device) for each in rank_micro_batches(first, N, rank, world_size, batch_size)]

    results = []
    for k in range(3):
        hurry = rank == world_size - 1 and k == 2
        mine = local_batch(k * N, config.training.batch_size)
        result = step(state, mine, (lambda: 60.0) if hurry else never)
        results.append((result.loss, result.tokens, result.grad_norm, result.stop))
    final = weights(state)
    abandoned = step(state, local_batch(3 * N, 1), (lambda: 0.0) if rank == world_size - 1 else never)
    assert abandoned.abandoned and abandoned.stop and not abandoned.updated
    assert all(torch.equal(final[name], w) for name, w in weights(state).items()), "nothing changed on any rank"
    torch.save((results, {name: w.cpu() for name, w in final.items()}), f"{folder}/{world_size}-{rank}.pt")
    dist.destroy_process_group()


def run_ranks(world_size: int, folder: Path, backend: str = "gloo") -> list[tuple[list, dict[str, torch.Tensor]]]:
    folder.mkdir()
    mp.spawn(_rank, (world_size, str(folder), backend), nprocs=world_size)
    return [torch.load(folder / f"{world_size}-{rank}.pt") for rank in range(world_size)]


def assert_ranks_take_the_same_steps(ranks: list, alone: tuple[list, dict[str, torch.Tensor]]) -> None:
    for results, final in ranks:
        assert results == ranks[0][0], "every rank has the same figures"
        assert all(torch.equal(final[name], ranks[0][1][name]) for name in final), "and the same weights"
    for mine, one in zip(ranks[0][0], alone[0], strict=True):
        assert mine == pytest.approx(one, rel=1e-5)
    for name, tensor in ranks[0][1].items():
        torch.testing.assert_close(tensor, alone[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.rare
def test_one_and_five_workers_take_the_same_steps(tmp_path: Path) -> None:
    alone = run_ranks(1, tmp_path / "1")[0]
    for world_size in (5,):  # does not divide 12
        assert_ranks_take_the_same_steps(run_ranks(world_size, tmp_path / str(world_size)), alone)


@pytest.mark.parametrize("bad", [(0,), (2,), (0, 1), (0, 1, 2)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_with_bad_micro_batches_is_bit_for_bit_the_step_without_them(bad, value, monkeypatch) -> None:
    """First, last, some or all micro-batches; `tests/training/test_equal_bits.py` has the deterministic steps."""
    config = tiny_config(deterministic=False)
    micro_batches = rank_micro_batches(0, N, 0, 1, 4)
    with monkeypatch.context() as patch:
        patch.setattr(module, "cross_entropy_sum", with_bad_losses([micro_batches[i] for i in bad], value))
        disturbed = tiny_state(config)
        result = step(disturbed, micro_batches)
    clean = tiny_state(config)
    expected = step(clean, [b for i, b in enumerate(micro_batches) if i not in bad])

    assert result.skipped == len(bad)
    assert [s.positions for s in result.skipped_locally] == [micro_batches[i].positions for i in bad]
    assert not any(math.isfinite(s.loss) for s in result.skipped_locally)
    assert result.updated == expected.updated == (len(bad) < 3)
    assert result.tokens == expected.tokens and (result.loss == expected.loss or len(bad) == 3)
    assert all(torch.equal(a, b) for a, b in zip(weights(disturbed).values(), weights(clean).values(), strict=True))


def test_a_micro_batch_that_is_bad_only_the_second_time_is_skipped_as_well(monkeypatch) -> None:
    """As a GPU's results may differ from one computation to the next."""
    micro_batches = rank_micro_batches(0, N, 0, 1, 4)
    true_loss, calls = module.cross_entropy_sum, itertools.count()
    monkeypatch.setattr(
        module, "cross_entropy_sum", lambda *a: true_loss(*a) * (math.nan if next(calls) in (0, 4) else 1.0)
    )
    result = step(tiny_state(tiny_config(deterministic=False)), micro_batches)
    assert [s.positions for s in result.skipped_locally] == [micro_batches[0].positions, micro_batches[2].positions]
    assert result.updated


def test_a_bad_loss_in_a_step_without_time_to_repeat_it_abandons_the_step(monkeypatch) -> None:
    micro_batches = rank_micro_batches(0, N, 0, 1, 4)
    monkeypatch.setattr(module, "cross_entropy_sum", with_bad_losses(micro_batches[:1]))
    state = tiny_state(tiny_config(deterministic=False))
    before, left = weights(state), iter([None, None, None, 0.0, -1.0, -1.0])
    result = step(state, micro_batches, lambda: next(left))
    assert result.abandoned and not result.updated
    assert all(torch.equal(before[name], w) for name, w in weights(state).items())


def test_a_non_finite_gradient_norm_skips_the_update() -> None:
    state = tiny_state(tiny_config())
    before = weights(state)
    handle = state.model.head.weight.register_hook(lambda g: g * float("inf"))
    result = step(state, rank_micro_batches(0, N, 0, 1, 4))
    handle.remove()
    assert not result.updated and all(torch.equal(before[n], w) for n, w in weights(state).items())


def test_a_step_is_abandoned_only_if_its_rest_takes_longer_than_the_grace_period() -> None:
    assert not outlasts(None, elapsed=1e9, done=1, total=2), "no stop is requested"
    assert not outlasts(0.1, elapsed=0.0, done=0, total=16), "how long it takes is not known yet"
    assert outlasts(-1.0, elapsed=0.0, done=0, total=16), "but the time is up"
    assert outlasts(29.0, elapsed=2.0, done=1, total=16) and not outlasts(30.0, elapsed=2.0, done=1, total=16)
    assert not outlasts(2.0, elapsed=30.0, done=15, total=16)


def test_an_abandoned_step_does_not_change_the_next_one() -> None:
    straight, hurried = tiny_state(tiny_config()), tiny_state(tiny_config())
    left = iter([None, 60.0, 0.0, 0.0])
    assert step(hurried, rank_micro_batches(0, N, 0, 1, 4), lambda: next(left)).abandoned
    assert (
        step(hurried, rank_micro_batches(0, N, 0, 1, 4)).loss == step(straight, rank_micro_batches(0, N, 0, 1, 4)).loss
    )
    assert all(torch.equal(weights(straight)[name], w) for name, w in weights(hurried).items())


class Clock:
    """A clock that stands still, except while it is advanced."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-9  # so that no speed is infinite
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds

    def advanced_by(self, seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, by this clock `seconds` slower."""

        def slower(*inputs: Any, **named: Any) -> Any:
            self.advance(seconds)
            return function(*inputs, **named)

        return slower


def test_the_seconds_of_the_phases_of_a_step_are_right_and_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only the wait for data, three micro-batches and the update advance noticeably."""
    config = tiny_config(max_steps=3)
    state, host, clock = tiny_state(config), RecordingHost(), Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    monkeypatch.setattr(Peak, "measure", lambda _: None)  # its products would grow without limit by this clock
    state.model.head.weight.register_hook(lambda _: clock.advance(5.0))  # called in each backward pass
    monkeypatch.setattr(state.optimizer, "step", clock.advanced_by(8.0, state.optimizer.step))
    train(
        state, config, map(clock.advanced_by(4.0, lambda local_batch: local_batch), local_batches(state, config)), host
    )
    steps = [event for event in host.events if isinstance(event, StepDone)]
    assert len(steps) == 3
    for step_done in steps:
        parts = (step_done.data_wait_seconds, step_done.compute_seconds, step_done.update_seconds)
        assert parts == pytest.approx((4.0, 15.0, 8.0), rel=1e-6)
        assert step_done.reduce_seconds < 1e-6, "one rank"
        assert step_done.step_seconds == pytest.approx(27.0, rel=1e-6)


def _slow_exchange(rank: int, folder: str) -> None:
    """Take steps of which each collective takes 10 seconds by a clock; save their seconds, and those of the reduction."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    clock = Clock()
    time.perf_counter = clock
    for name in ("all_gather", "all_reduce", "all_to_all_single"):
        setattr(dist, name, clock.advanced_by(10.0, getattr(dist, name)))
    figures = []
    for deterministic in (False, True):
        state = tiny_state(tiny_config(deterministic=deterministic))
        started = clock.now
        result = step(state, rank_micro_batches(0, N, rank, 2, 4))
        figures.append((result.seconds.reduce, clock.now - started))
    Path(folder, f"{rank}.json").write_text(json.dumps(figures))
    dist.destroy_process_group()


@pytest.mark.slow
def test_the_exchange_between_ranks_is_in_the_seconds_of_the_reduction(tmp_path: Path) -> None:
    mp.spawn(_slow_exchange, (str(tmp_path),), nprocs=2)
    for rank in (0, 1):
        for reduction, whole_step in json.loads((tmp_path / f"{rank}.json").read_text()):
            assert reduction >= 20.0 and reduction == pytest.approx(whole_step, rel=1e-6)


def test_clipping_divides_by_the_tokens_and_keeps_the_norm_below_the_limit() -> None:
    large, small = torch.tensor([30.0, 40.0]), torch.tensor([3.0, 4.0])
    assert module.clip(large, tokens=10, max_norm=1.0) == pytest.approx(5.0)
    torch.testing.assert_close(large, torch.tensor([0.6, 0.8]))
    module.clip(small, tokens=10, max_norm=1.0)
    torch.testing.assert_close(small, torch.tensor([0.3, 0.4]))


def test_a_non_finite_gradient_gives_a_non_finite_norm() -> None:
    assert not math.isfinite(module.clip(torch.tensor([1.0, math.nan]), 1.0, 1.0))
    assert not math.isfinite(module.clip(torch.tensor([1.0, math.inf]), 1.0, 1.0))
