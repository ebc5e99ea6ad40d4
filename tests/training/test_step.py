"""A step's result depends on its sequences, not on how they are split."""

from __future__ import annotations

import itertools
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
from savant_ray.training.loop import train
from savant_ray.training.step import outlasts, take_step
from tests.training.tiny import RecordingHost, micro_batch, never, share, shares, tiny_config, tiny_state, weights

N = 12


def step(state, micro_batches, grace_left=never):
    return take_step(state, micro_batches, learning_rate=1e-2, gradient_clip=1.0, grace_left=grace_left)


@pytest.mark.parametrize("batch_size", [1, 4, 5, 12])
def test_the_split_into_micro_batches_does_not_matter(batch_size: int) -> None:
    states = [tiny_state(tiny_config()) for _ in range(2)]
    whole = step(states[0], [micro_batch(np.arange(N))])
    parts = step(states[1], share(0, N, 0, 1, batch_size))
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6) and parts.tokens == whole.tokens
    for a, b in zip(weights(states[0]).values(), weights(states[1]).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def _rank(rank: int, world_size: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    torch.set_num_threads(1)
    config = tiny_config()
    state = tiny_state(config)
    results = []
    for k in range(3):
        hurry = rank == world_size - 1 and k == 2
        mine = share(k * N, N, rank, world_size, config.training.batch_size)
        result = step(state, mine, (lambda: 60.0) if hurry else never)
        results.append((result.loss, result.tokens, result.grad_norm, result.stop))
    final = weights(state)
    given_up = step(state, share(3 * N, N, rank, world_size, 1), (lambda: 0.0) if rank == world_size - 1 else never)
    assert given_up.abandoned and given_up.stop and not given_up.updated
    assert all(torch.equal(final[name], w) for name, w in weights(state).items()), "nothing changed on any rank"
    torch.save((results, final), f"{folder}/{world_size}-{rank}.pt")
    dist.destroy_process_group()


def run_ranks(world_size: int, folder: Path) -> list[tuple[list, dict[str, torch.Tensor]]]:
    folder.mkdir()
    mp.spawn(_rank, (world_size, str(folder)), nprocs=world_size)
    return [torch.load(folder / f"{world_size}-{rank}.pt") for rank in range(world_size)]


@pytest.mark.slow
def test_one_two_three_and_five_workers_take_the_same_steps(tmp_path: Path) -> None:
    alone = run_ranks(1, tmp_path / "1")[0]
    for world_size in (2, 3, 5):  # 5 does not divide 12
        ranks = run_ranks(world_size, tmp_path / str(world_size))
        for results, final in ranks:
            assert results == ranks[0][0], "every rank has the same figures"
            assert all(torch.equal(final[name], ranks[0][1][name]) for name in final), "and the same weights"
        for mine, one in zip(ranks[0][0], alone[0], strict=True):
            assert mine == pytest.approx(one, rel=1e-5)
        for name, tensor in ranks[0][1].items():
            torch.testing.assert_close(tensor, alone[1][name], rtol=1e-3, atol=1e-4)


def _poisoned_rank(rank: int, folder: str, poison: bool) -> None:
    """Two ranks take two steps; in the first one, the first micro-batch of rank 1 is poisoned, or left out."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.set_num_threads(1)
    state, honest = tiny_state(tiny_config()), module.cross_entropy_sum
    shares = [share(k * N, N, rank, 2, 2) for k in range(2)]
    calls = itertools.count()
    if rank == 1 and poison:
        module.cross_entropy_sum = lambda *a: honest(*a) * (math.nan if next(calls) == 0 else 1.0)
    elif rank == 1:
        del shares[0][0]
    results = [step(state, mine) for mine in shares]
    figures = [(r.loss, r.tokens, r.grad_norm, r.updated) for r in results]
    torch.save((figures, results[0].skipped, len(results[0].skipped_locally), weights(state)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_poison_on_one_rank_only_is_as_if_that_micro_batch_had_not_been_there(tmp_path: Path) -> None:
    results = {}
    for poison in (True, False):
        folder = tmp_path / str(poison)
        folder.mkdir()
        mp.spawn(_poisoned_rank, (str(folder), poison), nprocs=2)
        results[poison] = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    clean = results[False][0]
    for rank, (figures, skipped, skipped_locally, final) in enumerate(results[True]):
        assert figures == clean[0] and skipped == 1 and skipped_locally == rank
        assert all(torch.equal(final[name], clean[3][name]) for name in final)


@pytest.mark.parametrize("bad", [(0,), (2,), (0, 1), (0, 1, 2)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_micro_batch_leaves_the_step_that_it_was_not_part_of(bad, value, monkeypatch) -> None:
    """First, last, some or all micro-batches: equal to a step from which they were left out."""
    micro_batches = share(0, N, 0, 1, 4)
    honest = module.cross_entropy_sum
    calls = iter(range(len(micro_batches)))
    monkeypatch.setattr(module, "cross_entropy_sum", lambda *a: honest(*a) * (value if next(calls) in bad else 1.0))
    poisoned = tiny_state(tiny_config())
    result = step(poisoned, micro_batches)
    monkeypatch.setattr(module, "cross_entropy_sum", honest)
    clean = tiny_state(tiny_config())
    expected = step(clean, [b for i, b in enumerate(micro_batches) if i not in bad])

    assert result.skipped == len(bad)
    assert [s.positions for s in result.skipped_locally] == [micro_batches[i].positions for i in bad]
    assert result.updated == expected.updated == (len(bad) < 3)
    assert all(torch.equal(a, b) for a, b in zip(weights(poisoned).values(), weights(clean).values(), strict=True))


def test_a_non_finite_gradient_norm_skips_the_update() -> None:
    state = tiny_state(tiny_config())
    before = weights(state)
    handle = state.model.head.weight.register_hook(lambda g: g * float("inf"))
    result = step(state, share(0, N, 0, 1, 4))
    handle.remove()
    assert not result.updated and all(torch.equal(before[n], w) for n, w in weights(state).items())


def test_a_step_is_given_up_only_when_its_rest_takes_longer_than_what_is_left() -> None:
    assert not outlasts(None, elapsed=1e9, done=1, total=2), "nobody wishes to stop"
    assert not outlasts(0.1, elapsed=0.0, done=0, total=16), "how long it takes is not known yet"
    assert outlasts(-1.0, elapsed=0.0, done=0, total=16), "but the time is up"
    assert outlasts(29.0, elapsed=2.0, done=1, total=16) and not outlasts(30.0, elapsed=2.0, done=1, total=16)
    assert not outlasts(2.0, elapsed=30.0, done=15, total=16)


def test_a_step_that_is_given_up_leaves_the_next_one_as_it_was() -> None:
    straight, hurried = tiny_state(tiny_config()), tiny_state(tiny_config())
    left = iter([None, 60.0, 0.0, 0.0])
    assert step(hurried, share(0, N, 0, 1, 4), lambda: next(left)).abandoned
    assert step(hurried, share(0, N, 0, 1, 4)).loss == step(straight, share(0, N, 0, 1, 4)).loss
    assert all(torch.equal(weights(straight)[name], w) for name, w in weights(hurried).items())


def test_the_seconds_of_a_step_are_booked_where_they_were_spent_and_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only the wait for data, three micro-batches, the reduction and the update advance noticeably."""
    config = tiny_config(max_steps=3)
    state, host = tiny_state(config), RecordingHost()
    now = 0.0

    def perf_counter() -> float:
        nonlocal now
        now += 1e-9  # the speed of a matrix product is measured, too
        return now

    monkeypatch.setattr(time, "perf_counter", perf_counter)

    def taking(seconds: float, act: Callable[..., Any]) -> Callable[..., Any]:
        def taken(*inputs: Any, **named: Any) -> Any:
            nonlocal now
            now += seconds
            return act(*inputs, **named)

        return taken

    monkeypatch.setattr(module, "add_gradients", taking(5.0, module.add_gradients))
    monkeypatch.setattr(module, "all_reduce_sum", taking(10.0, module.all_reduce_sum))
    monkeypatch.setattr(state.optimizer, "step", taking(8.0, state.optimizer.step))
    train(state, config, (taking(4.0, lambda each: each)(each) for each in shares(state, config)), host)
    steps = [event for event in host.events if isinstance(event, StepDone)]
    assert len(steps) == 3
    for step_done in steps:
        parts = (step_done.data_wait_seconds, step_done.compute_seconds, step_done.reduce_seconds)
        assert (*parts, step_done.update_seconds) == pytest.approx((4.0, 15.0, 10.0, 8.0), rel=1e-6)
        assert step_done.step_seconds == pytest.approx(37.0, rel=1e-6)
