"""What only a GPU does in a step: products that add to fp32 sums, a queue of micro-batches, and collectives by NCCL."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import savant_ray.training.step as step_module
from savant_ray.config import Config
from savant_ray.model import shared_weights
from savant_ray.model.shared_weights import add_product, adds_bf16_products_to_fp32
from savant_ray.training.device import (
    MAX_IN_FLIGHT,
    LaunchQueue,
    compile_block,
    prepare_device,
    use_deterministic_kernels,
)
from savant_ray.training.state import TrainingState, new_state
from savant_ray.training.step import MicroBatch, add_gradients, add_to_tree, take_step
from tests.training.test_step import assert_ranks_take_the_same_steps, run_ranks
from tests.training.tiny import MODEL, never, rank_micro_batches, tiny_config, weights, with_bad_losses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

ROOT = Path(__file__).parents[2]
CUDA = torch.device("cuda")
CONFIG = Config.from_dict(tiny_config().to_dict() | {"model": MODEL | {"dim": 128}})  # heads of 64, 341 wide


def on_gpu(micro_batches: list[MicroBatch]) -> list[MicroBatch]:
    return [micro_batch.to(CUDA) for micro_batch in micro_batches]


def test_a_bf16_product_is_added_to_an_fp32_sum_without_being_rounded() -> None:
    assert adds_bf16_products_to_fp32(CUDA), "otherwise gradients are added in a pass of their own"
    torch.manual_seed(0)
    left, right = (torch.randn(4096, n, device=CUDA).bfloat16() for n in (344, 256))
    total = torch.randn(344, 256, device=CUDA)
    expected, address = total.double() + left.double().mT @ right.double(), total.data_ptr()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    add_product(total, left, right)
    assert total.data_ptr() == address
    error = (total.double() - expected).norm() / expected.norm()
    assert error < 1e-5, "bf16 alone would round by 2e-3"
    assert torch.cuda.max_memory_allocated() - before < 344 * 256 * 4, "no temporary of the size of the sum"


@pytest.fixture
def without_mixed_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def missing(*_: object) -> None:
        raise RuntimeError("not implemented")

    adds_bf16_products_to_fp32.cache_clear()
    monkeypatch.setattr(shared_weights, "_add_bf16_product", missing)
    yield
    adds_bf16_products_to_fp32.cache_clear()


@pytest.mark.usefixtures("without_mixed_products")
def test_without_such_products_a_warning_is_shown_and_the_sum_is_right_to_bf16() -> None:
    left, right = (torch.randn(64, 32, device=CUDA).bfloat16() for _ in range(2))
    total = torch.randn(32, 32, device=CUDA)
    expected = total + (left.mT @ right).float()
    with pytest.warns(UserWarning, match="cannot add a bf16 product to an fp32 matrix"):
        add_product(total, left, right)
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed"])
def test_a_compiled_step_has_the_gradients_of_an_uncompiled_one(precision: str, recompute: bool) -> None:
    gradients = []
    for compiled in (False, True):
        state = new_state(CONFIG, CUDA, precision)
        state.model.recompute_loops = recompute
        compile_block(state.model, compiled, CUDA, precision)
        take_step(state, on_gpu(rank_micro_batches(0, 12, 0, 1, 4)), 0.0, 1.0, never)
        gradients.append(state.gradients.gradients.clone())
    assert (gradients[1] - gradients[0]).norm() < 2e-2 * gradients[0].norm()


@pytest.fixture
def deterministic_kernels() -> Iterator[None]:
    use_deterministic_kernels()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("compute", "kernels"), [(add_gradients, ()), (add_to_tree, ("deterministic_kernels",))])
def test_a_micro_batch_is_launched_without_a_wait_for_the_gpu(
    compute: Callable[[TrainingState, MicroBatch], torch.Tensor],
    kernels: tuple[str, ...],
    request: pytest.FixtureRequest,
) -> None:
    for fixture in kernels:
        request.getfixturevalue(fixture)
    state, (micro_batch, *_) = new_state(CONFIG, CUDA, "bf16"), on_gpu(rank_micro_batches(0, 12, 0, 1, 4))
    compile_block(state.model, "auto", CUDA, "bf16")
    first_loss = compute(state, micro_batch)  # compiles, and tries products
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # a wait raises RuntimeError
    try:
        second_loss = compute(state, micro_batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(second_loss, first_loss)


def test_few_micro_batches_are_in_the_queue_and_finished_ones_are_counted() -> None:
    queue = LaunchQueue(CUDA)
    for launched in range(8):
        queue.wait_for_room()
        assert launched - queue.finished < MAX_IN_FLIGHT
        torch.cuda._sleep(50_000_000)  # clock cycles, about 30 ms
        queue.add()
    assert queue.finished == 8 - MAX_IN_FLIGHT


@pytest.mark.parametrize("bad", [(0,), (2,), (0, 1, 2)])
def test_bad_micro_batches_are_left_out_on_a_gpu_as_well(bad: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    micro_batches = on_gpu(rank_micro_batches(0, 12, 0, 1, 4))
    states: list[TrainingState] = []
    results = []
    for is_bad in (True, False):
        states.append(new_state(CONFIG, CUDA, "bf16"))
        chosen = [micro_batches[i] for i in bad]
        with monkeypatch.context() as patch:
            if is_bad:
                patch.setattr(step_module, "cross_entropy_sum", with_bad_losses(chosen, math.nan))
            batch = micro_batches if is_bad else [b for i, b in enumerate(micro_batches) if i not in bad]
            results.append(take_step(states[-1], batch, 1e-2, 1.0, never))
    assert [skipped.positions for skipped in results[0].skipped_locally] == [micro_batches[i].positions for i in bad]
    assert results[0].updated == results[1].updated == (len(bad) < 3)
    for found, expected in zip(*(weights(state).values() for state in states), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("is_deterministic", [True, False])
def test_a_process_that_takes_deterministic_steps_has_deterministic_kernels(is_deterministic: bool) -> None:
    try:
        prepare_device(CUDA, 10_000, is_deterministic)
        assert torch.are_deterministic_algorithms_enabled() == is_deterministic
    finally:
        torch.use_deterministic_algorithms(False)


def deterministic_config(**training: str) -> Config:
    changed = tiny_config(deterministic=True, batch_size=2, accumulation=6, **training)
    return Config.from_dict(CONFIG.to_dict() | {"training": changed.to_dict()["training"]})


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed", "fp32"])
@pytest.mark.usefixtures("deterministic_kernels")
def test_deterministic_steps_have_the_same_bits_each_time_and_zeros_for_a_bad_micro_batch(
    precision: str, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = deterministic_config(optimizer=optimizer)
    batches = [on_gpu(rank_micro_batches(first, 12, 0, 1, 2)) for first in (0, 12)]
    monkeypatch.setattr(step_module, "cross_entropy_sum", with_bad_losses([batches[0][3]], math.nan))
    found = []
    for _ in range(3):
        state = new_state(config, CUDA, precision)
        compile_block(state.model, "auto", CUDA, precision)
        results = [take_step(state, batch, 1e-2, 1.0, never) for batch in batches]
        assert [result.skipped for result in results] == [1, 0] and all(result.updated for result in results)
        found.append(([(r.loss, r.grad_norm) for r in results], flat_state(state)))
    assert all(figures == found[0][0] and torch.equal(tensors, found[0][1]) for figures, tensors in found[1:])


def flat_state(state: TrainingState) -> torch.Tensor:
    """Return all weights and moments."""
    return torch.cat([tensor.float().flatten() for tensor in state.optimizer.tensors()])


IN_A_PROCESS_OF_ITS_OWN = """
import hashlib
from savant_ray.training.device import compile_block, prepare_device
from savant_ray.training.state import new_state
from savant_ray.training.step import take_step
from tests.training.test_gpu_step import CUDA, deterministic_config, flat_state, on_gpu
from tests.training.tiny import never, rank_micro_batches

prepare_device(CUDA, 10_000, is_deterministic=True)
state = new_state(deterministic_config(), CUDA, "bf16")
compile_block(state.model, True, CUDA, "bf16")
for first in (0, 12, 24):
    result = take_step(state, on_gpu(rank_micro_batches(first, 12, 0, 1, 2)), 1e-2, 1.0, never)
    print(result.loss, result.grad_norm)
print(hashlib.sha256(flat_state(state).cpu().numpy().tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_processes_that_compile_for_themselves_take_steps_of_the_same_bits(tmp_path: Path) -> None:
    command = [sys.executable, "-c", IN_A_PROCESS_OF_ITS_OWN]
    printed = [
        subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / name)},
            text=True,
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
        for name in ("one", "other")
    ]
    assert printed[0] == printed[1] and len(printed[0].splitlines()) == 4


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_with_nccl_take_the_steps_of_one(tmp_path: Path) -> None:
    alone = run_ranks(1, tmp_path / "1", "nccl")[0]
    assert_ranks_take_the_same_steps(run_ranks(2, tmp_path / "2", "nccl"), alone)
