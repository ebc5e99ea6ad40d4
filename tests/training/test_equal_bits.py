"""With `training.deterministic`, a step has the same bits on any number of ranks."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import savant_ray.training.state as state_module
import savant_ray.training.step as step_module
from savant_ray.config import Config
from savant_ray.optim.tree_sum import Node, TreeSum
from savant_ray.training import rank_comparison
from savant_ray.training.device import set_threads
from savant_ray.training.loop import train
from savant_ray.training.rank_comparison import RanksDifferError, differing
from savant_ray.training.reduction import sum_trees
from savant_ray.training.seeds import loops_of_step
from savant_ray.training.state import TrainingState, micro_batch_size, new_state
from savant_ray.training.step import MicroBatch, take_step
from tests.training.tiny import (
    CPU,
    MODEL,
    RecordingHost,
    local_batches,
    micro_batch,
    never,
    rank_micro_batches,
    tiny_config,
    weights,
    with_bad_losses,
)

SEQUENCES = 14
DAMAGES = ("weights", "exp_avg", "exp_avg_sq", "average")
Figures = tuple[list[tuple[float, float, int, bool]], str]


def taken_steps(config: Config, rank: int, world_size: int, rows: int | None = None, n_steps: int = 2) -> Figures:
    """Return loss, gradient norm, skipped micro-batches and whether it updated of each step, and a hash of the weights."""
    state = new_state(config, CPU)
    if rows is not None:
        state.set_batch_fit(dataclasses.replace(state.batch_fit, rows=rows))
    figures = []
    for step in range(n_steps):
        batch = rank_micro_batches(step * SEQUENCES, SEQUENCES, rank, world_size, micro_batch_size(config, CPU))
        result = take_step(state, batch, 1e-2, 1.0, never, loops_of_step(config, step + 1))
        figures.append((result.loss, result.grad_norm, result.skipped, result.updated))
    return figures, digest(state)


def digest(state: TrainingState) -> str:
    """Return the SHA-256 of all weights and of their average."""
    tensors = [*weights(state).values(), *(state.average.weights.values() if state.average else ())]
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def all_cases(rank: int, world_size: int) -> dict[str, Any]:
    """Return the figures of this rank in each case."""
    seven = tiny_config(batch_size=2, accumulation=7)
    cases: dict[str, Any] = {
        "seven micro-batches": taken_steps(seven, rank, world_size, n_steps=3),
        "three, so that a fourth rank has none": taken_steps(tiny_config(batch_size=5), rank, world_size),
        "a single one": taken_steps(tiny_config(batch_size=SEQUENCES), rank, world_size),
        "each computed in two parts": taken_steps(seven, rank, world_size, rows=1),
        "muon": taken_steps(tiny_config(batch_size=2, accumulation=7, optimizer="muon"), rank, world_size),
        "twice the loops in some steps": taken_steps(
            tiny_config(batch_size=2, accumulation=7, double_loops_fraction=0.5), rank, world_size
        ),
        "average of the weights": taken_steps(
            tiny_config(batch_size=2, accumulation=7, ema_decay=0.9), rank, world_size
        ),
    }
    limit, state_module.MAX_CPU_ELEMENTS = state_module.MAX_CPU_ELEMENTS, 2 * 16 * 16
    cases["other settings of batch size and accumulation"] = taken_steps(
        tiny_config(batch_size=7, accumulation=2), rank, world_size, n_steps=3
    )
    state_module.MAX_CPU_ELEMENTS = limit
    true_loss = step_module.cross_entropy_sum
    for name, bad in {"first": [0], "last": [12], "some": [2, 8, 10], "all": list(range(0, 14, 2))}.items():
        step_module.cross_entropy_sum = with_bad_losses([micro_batch([p, p + 1]) for p in bad])
        cases[f"no finite loss: {name}"] = taken_steps(seven, rank, world_size)
        step_module.cross_entropy_sum = true_loss
    cases["sums in small segments"] = [
        sum_of_leaves(rank, world_size, n, segment) for n in (1, 11) for segment in (4, 7)
    ]
    return cases


def sum_of_leaves(rank: int, world_size: int, n: int, segment: int) -> list[float]:
    """Return the sum of n leaves of 23 numbers, most of which the last rank has."""
    values = torch.randn(n, 23, generator=torch.Generator().manual_seed(n)) * 1e3
    cuts = [*(index * (n > 1) for index in range(world_size)), n]
    leaves = [range(*pair) for pair in pairwise(cuts)]
    tree, result = TreeSum(), torch.full((23,), math.nan)
    for index in leaves[rank]:
        tree.add(Node(index, 1), values[index])
    sum_trees(tree, leaves, result, segment)
    return result.tolist()


def flip_bit(tensor: torch.Tensor) -> None:
    """Flip a bit of the mantissa of the last element of an fp32 tensor."""
    tensor.detach().view(-1)[-1:].view(torch.int32).bitwise_xor_(1 << 20)


def damaged_run(rank: int, world_size: int, damage: str) -> tuple[str, list[tuple[int, str]]]:
    """Train with a bit of the last rank flipped after step 2; return the error and the checkpoints."""
    settings = tiny_config(batch_size=2, accumulation=6, compare_ranks_every=2, ema_decay=0.9).to_dict()
    settings["checkpoint"]["every_steps"] = 3
    config = Config.from_dict(settings)
    state, host = new_state(config, CPU), RecordingHost(rank)

    def ordered_batches() -> Iterator[list[MicroBatch]]:
        for step, local_batch in enumerate(local_batches(state, config, rank, world_size)):
            if step == 2 and rank == world_size - 1:
                assert state.average is not None
                parameter = state.model.embed.weight
                tensors = {"weights": parameter, "average": state.average.weights["embed.weight"]}
                flip_bit(tensors[damage] if damage in tensors else state.optimizer.state[parameter][damage])
            yield local_batch

    try:
        train(state, config, ordered_batches(), host)
    except RanksDifferError as error:
        return str(error), host.saved
    return "", host.saved


def steps_with_another_norm(rank: int, world_size: int, factor: float, deterministic: bool) -> Figures:
    """Return the figures of steps in which ranks other than 0 compute a gradient norm that is `factor` times too large."""
    true_norm = torch.linalg.vector_norm
    if rank:
        torch.linalg.vector_norm = lambda *inputs: true_norm(*inputs) * factor
    try:
        return taken_steps(
            tiny_config(batch_size=2, accumulation=7, deterministic=deterministic), rank, world_size, n_steps=3
        )
    finally:
        torch.linalg.vector_norm = true_norm


def other_norms(rank: int, world_size: int) -> list[Figures]:
    """Return the figures with norms that differ in the last bit, or lead to another decision, by ranks other than 0."""
    return [
        steps_with_another_norm(rank, world_size, factor, deterministic)
        for deterministic in (True, False)
        for factor in (1.0, 1 + 2**-22, math.inf)
    ]


def _rank(rank: int, folder: str, world_sizes: tuple[int, ...]) -> None:
    """Compute all cases as this rank of each of the world sizes that has it."""
    torch.set_num_threads(1)
    for world_size in (size for size in world_sizes if rank < size):
        rendezvous = f"file://{folder}/rendezvous{world_size}"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
        damages = {damage: damaged_run(rank, world_size, damage) for damage in DAMAGES}
        figures = all_cases(rank, world_size), damages, other_norms(rank, world_size)
        torch.save(figures, f"{folder}/{rank}of{world_size}.pt")
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world_sizes", [(2, 3, 4), pytest.param((5, 6), marks=pytest.mark.rare)])
def test_losses_norms_and_weights_are_equal_on_any_number_of_ranks_and_a_rank_that_differs_is_named(
    world_sizes: tuple[int, ...], tmp_path: Path
) -> None:
    expected = all_cases(0, 1)
    mp.spawn(_rank, (str(tmp_path), world_sizes), nprocs=max(world_sizes))
    for world_size in world_sizes:
        for rank in range(world_size):
            found, damages, norms = torch.load(tmp_path / f"{rank}of{world_size}.pt")
            different = [name for name in expected if repr(found[name]) != repr(expected[name])]
            assert not different, f"rank {rank} of {world_size}"
            assert norms[0] == norms[1] == norms[2] and norms[3] == norms[4] == norms[5], "rank 0's norm counts"
            subject = "ranks 0 and 1 have" if world_size == 2 else f"rank {world_size - 1} has"
            for error, saved in damages.values():
                assert error.startswith(f"{subject} different weights or optimizer state after step 3: "), error
                assert not saved, "the checkpoint of step 3 is not written"


def test_the_cases_differ_where_they_should_and_only_there() -> None:
    cases = all_cases(0, 1)
    seven = cases["seven micro-batches"]
    assert cases["other settings of batch size and accumulation"] == seven
    assert cases["no finite loss: some"][0][0][2:] == (3, True)
    assert cases["no finite loss: all"][0][0][2:] == (7, False)
    hashes = [figures[1] for name, figures in cases.items() if isinstance(figures, tuple)]
    assert len(set(hashes)) == len(hashes) - 1


def test_a_micro_batch_without_a_finite_loss_is_as_one_without_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(batch_size=2, accumulation=7)
    batch = rank_micro_batches(0, SEQUENCES, 0, 1, 2)
    masked = [without_targets(each) if each.index in (0, 3) else each for each in batch]
    expected, state = new_state(config, CPU), new_state(config, CPU)
    clean = take_step(expected, masked, 1e-2, 1.0, never)
    monkeypatch.setattr(step_module, "cross_entropy_sum", with_bad_losses([micro_batch([0, 1]), micro_batch([6, 7])]))
    result = take_step(state, batch, 1e-2, 1.0, never)
    assert (result.loss, result.tokens, result.grad_norm) == (clean.loss, clean.tokens, clean.grad_norm)
    assert [skipped.positions for skipped in result.skipped_locally] == [(0, 1), (6, 7)] and digest(state) == digest(
        expected
    )


def without_targets(batch: MicroBatch) -> MicroBatch:
    return dataclasses.replace(batch, is_trained_BT=torch.zeros_like(batch.is_trained_BT))


def test_a_run_resumed_with_another_batch_size_and_the_same_micro_batches_is_bit_for_bit_the_same_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(state_module, "MAX_CPU_ELEMENTS", 2 * 16 * 16)  # micro-batches of 2

    def trained(batch_size: int, accumulation: int, checkpoint: Any = None, stop_at: int | None = None) -> Any:
        config = tiny_config(batch_size=batch_size, accumulation=accumulation)
        state, host, n = new_state(config, CPU), RecordingHost(stop_at=stop_at), config.training.effective_batch
        if checkpoint is not None:
            state.load_checkpoint(checkpoint)
        first, n_steps = state.position, config.training.max_steps - state.step
        train(state, config, (rank_micro_batches(first + step * n, n, 0, 1, 2) for step in range(n_steps)), host)
        return digest(state), host

    expected, (_, stopped) = trained(4, 3)[0], trained(4, 3, stop_at=3)
    for batch_size, accumulation in ((2, 6), (6, 2), (12, 1)):
        assert trained(batch_size, accumulation, stopped.checkpoint)[0] == expected


@pytest.mark.parametrize(("batch_size", "accumulation"), [(12, 16), (24, 8), (192, 1), (1, 192)])
def test_on_a_cpu_a_large_model_has_the_same_micro_batches_for_any_batch_size(
    batch_size: int, accumulation: int
) -> None:
    config = Config.from_dict({"training": {"batch_size": batch_size, "accumulation": accumulation}})
    assert micro_batch_size(config, CPU) == 1


@pytest.mark.parametrize(
    ("checksums", "expected"),
    [
        ([5, 5, 6], "rank 2 has"),
        ([6, 5, 5, 7], "ranks 0, 3 have"),
        ([5, 6], "ranks 0 and 1 have"),
        ([5, 6, 5, 6], "ranks 0 and 1 and 2 and 3 have"),
    ],
)
def test_the_ranks_that_differ_from_the_majority_are_named(checksums: list[int], expected: str) -> None:
    assert differing(checksums) == expected


def test_a_comparison_of_ranks_needs_little_memory_beside_a_large_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    elements = 1 << 10
    monkeypatch.setattr(rank_comparison, "SEGMENT", elements)
    config = Config.from_dict(tiny_config().to_dict() | {"model": MODEL | {"vocab_size": 20_000}})
    state = new_state(config, CPU)
    before = rank_comparison.checksum(state)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        assert rank_comparison.checksum(state) == before
    allocated = [event.cpu_memory_usage for event in profile.events()]
    assert 0 < max(allocated) <= 8 * elements < state.model.embed.weight.numel()
    flip_bit(state.model.embed.weight)
    assert rank_comparison.checksum(state) != before


@pytest.fixture
def four_cores() -> Iterator[None]:
    """Give this process four threads, as Ray gives a worker with four cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("setting", "of_checkpoint", "threads", "note"),
    [
        ("auto", None, 4, None),
        ("auto", 4, 4, None),
        ("auto", 2, 2, "each worker uses 2 of its 4 cores, as for the checkpoint"),
        ("auto", 8, 4, "each worker has 4 cores, and the checkpoint was computed with 8 threads per worker"),
        (3, None, 3, None),
        (6, 2, 6, None),
    ],
)
@pytest.mark.usefixtures("four_cores")
def test_a_resumed_run_keeps_its_threads_if_the_worker_has_the_cores(
    setting: int | str, of_checkpoint: int | None, threads: int, note: str | None
) -> None:
    found = set_threads(setting, of_checkpoint)
    assert torch.get_num_threads() == threads
    assert found is None if note is None else (found or "").startswith(note)


@pytest.mark.usefixtures("four_cores")
def test_a_checkpoint_records_the_number_of_threads() -> None:
    assert new_state(tiny_config(), CPU).to_checkpoint()["savant"]["threads"] == 4
