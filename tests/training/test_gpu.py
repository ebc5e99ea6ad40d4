"""The same promises on a GPU; skipped without one. Needs neither Ray nor a network."""

from __future__ import annotations

import gzip
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from savant_ray.config import Config
from savant_ray.evaluation.held_out_loss import loss_sums
from savant_ray.events import Event, ValidationDone
from savant_ray.inference.generate import generate
from savant_ray.inference.sampling import Sampling
from savant_ray.model.attention import Mask, attend, build_masks, causal_mask
from savant_ray.model.flex import has_flex
from savant_ray.model.loss import IGNORED, cross_entropy_sum
from savant_ray.training.device import (
    GIB,
    Precision,
    cap_memory,
    compile_block,
    memory_used_gb,
    peak_memory_gb,
    update_memory_cap,
)
from savant_ray.training.host_copies import HostCopy
from savant_ray.training.loop import step_with_oom_retry, train
from savant_ray.training.memory import estimated_gb, expected_fit
from savant_ray.training.profiling import StepProfiler
from savant_ray.training.state import TrainingState, new_state
from savant_ray.training.step import MicroBatch, take_step
from tests.training.test_fitting import validator
from tests.training.tiny import (
    CPU,
    MODEL,
    RecordingHost,
    local_batches,
    never,
    rank_micro_batches,
    tiny_config,
    unmasked,
    weights,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


CUDA = torch.device("cuda")
FLEX = torch.cuda.is_available() and has_flex(CUDA, 64)  # not without a compiler, Python.h, or on an old card


def on(device: torch.device, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
    return [micro_batch.to(device) for micro_batch in micro_batches]


def config_with(head_dim: int) -> Config:
    """`flex_attention` takes heads of 16 and more; those of the tiny model have 8."""
    return Config.from_dict(tiny_config().to_dict() | {"model": MODEL | {"dim": 2 * head_dim}})


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16"])
@pytest.mark.parametrize("head_dim", [8, 16, 64])
def test_a_step_on_the_gpu_is_the_step_on_the_cpu(head_dim: int, precision: str) -> None:
    """Losses, the first step's gradients, and what three steps change in the weights, relative to fp32 on the CPU.

    The limits are three times what bf16 differs by on a CPU: 0.012 in gradients and 0.08 in the change of weights.
    """
    config = config_with(head_dim)
    assert has_flex(CUDA, head_dim) == (FLEX and head_dim >= 16)
    expected, found = three_steps(config, CPU, "fp32"), three_steps(config, CUDA, precision)
    of_losses, of_gradients, of_changes = (1e-4, 1e-3, 2e-2) if precision == "fp32" else (2e-2, 4e-2, 0.25)
    assert found.losses == pytest.approx(expected.losses, rel=of_losses)
    assert relative_difference(found.gradients, expected.gradients) < of_gradients
    assert relative_difference(found.changes, expected.changes) < of_changes


class ThreeSteps(NamedTuple):
    """The loss of each step, the first step's gradients and the change of all weights, both flat."""

    losses: list[float]
    gradients: torch.Tensor
    changes: torch.Tensor


def three_steps(config: Config, device: torch.device, precision: Precision) -> ThreeSteps:
    state = new_state(config, device, precision)
    before, gradients, losses = flat_weights(state), torch.empty(0), []
    for k in range(3):
        result = take_step(state, on(device, rank_micro_batches(k * 12, 12, 0, 1, 4)), 1e-2, 1.0, never)
        losses.append(result.loss)
        if k == 0:
            gradients = state.gradients.gradients.cpu().clone()
    return ThreeSteps(losses, gradients, flat_weights(state) - before)


def flat_weights(state: TrainingState) -> torch.Tensor:
    return torch.cat([tensor.float().flatten().cpu() for tensor in weights(state).values()])


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference as a fraction of the norm of what is expected."""
    return float((found - expected).norm() / expected.norm())


@pytest.mark.skipif(not FLEX, reason="flex_attention needs g++, Python.h and compute capability 8.0")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("window_size", [None, 100])
@pytest.mark.parametrize("length", [256, 500])
def test_attention_and_its_gradients_are_those_of_all_scores_at_once(
    length: int, window_size: int | None, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, length, 64, device=CUDA, dtype=dtype, requires_grad=True) for _ in range(3))
    documents = torch.randint(0, 3, (2, length), device=CUDA).sort(dim=1).values
    same = documents[:, None, :, None] == documents[:, None, None, :]
    dense = Mask(~(same & causal_mask(length, length, window_size, CUDA)))
    here = build_masks(documents, window_size or length, 64).for_loop(window_size is None)
    assert here.blocks is not None
    ways = [attend(q, k, v, mask, 2.0) for mask in (dense, here)]
    gradients = [torch.autograd.grad(out.float().square().sum(), (q, k, v)) for out in ways]
    torch.testing.assert_close(ways[1], ways[0], rtol=tolerance, atol=tolerance)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("head_dim", [128, 192, 256, 512])
def test_attention_with_wide_heads_is_that_of_all_scores_at_once(
    head_dim: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Kernels for wide heads need more shared memory than some GPUs have; there the mask is dense."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 300, head_dim, device=CUDA, dtype=dtype, requires_grad=True) for _ in range(3))
    documents = torch.randint(0, 3, (1, 300), device=CUDA).sort(dim=1).values
    same = documents[:, None, :, None] == documents[:, None, None, :]
    dense = Mask(~(same & causal_mask(300, 300, 100, CUDA)))
    here = build_masks(documents, 100, head_dim).for_loop(is_global=False)
    ways = [attend(q, k, v, mask, 2.0) for mask in (dense, here)]
    gradients = [torch.autograd.grad(out.float().square().sum(), (q, k, v)) for out in ways]
    torch.testing.assert_close(ways[1], ways[0], rtol=tolerance, atol=tolerance)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=tolerance, atol=4 * tolerance)


def test_the_loss_and_its_gradients_are_those_of_full_fp32_logits() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 128, 64, device=CUDA, requires_grad=True)
    head = torch.randn(1000, 64, device=CUDA, requires_grad=True)
    targets = torch.randint(0, 1000, (4, 128), device=CUDA)
    targets[:, -5:] = IGNORED
    full = F.cross_entropy((x @ head.mT).flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    ways = [full, cross_entropy_sum(x, head, targets)]
    torch.testing.assert_close(ways[1].float(), ways[0], rtol=1e-5, atol=1e-3)
    gradients = [torch.autograd.grad(loss, (x, head)) for loss in ways]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


@pytest.fixture
def uncapped_afterwards() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.usefixtures("uncapped_afterwards")
def test_the_cap_holds() -> None:
    device = torch.device("cuda")
    assert cap_memory(device, 2.0) is None
    kept = torch.empty(int(0.6 * GIB), dtype=torch.uint8, device=device)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        torch.empty(int(1.3 * GIB), dtype=torch.uint8, device=device)
    assert 0.6 < memory_used_gb(device) < 2.0 and kept.numel()
    assert "capped at that" in (cap_memory(device, 10_000) or "")


HOLDER = """
import sys, torch
held = torch.empty(3 * 2**30, dtype=torch.uint8, device="cuda")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.usefixtures("uncapped_afterwards")
def test_the_memory_of_another_process_does_not_count() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin is not None and other.stdout is not None and other.stdout.readline() == "held\n"
        assert cap_memory(CUDA, 4.0) is None
        kept = torch.empty(int(1.5 * GIB), dtype=torch.uint8, device=CUDA)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            torch.empty(int(2.5 * GIB), dtype=torch.uint8, device=CUDA)
        assert 1.5 < memory_used_gb(CUDA) < 4.0 and kept.numel()
        other.stdin.close()


@pytest.mark.usefixtures("uncapped_afterwards")
def test_what_is_kept_beyond_the_limit_is_given_back_after_the_first_step() -> None:
    cap_memory(CUDA, 6.0)
    kept = torch.empty(int(2.5 * GIB), dtype=torch.uint8, device=CUDA)
    del kept  # to the allocator, not to the device
    assert "had been reserved for them" in (update_memory_cap(CUDA, 2.0) or "")
    assert torch.cuda.memory_reserved(CUDA) < 2.0 * GIB
    assert update_memory_cap(CUDA, 2.0) is None


def test_greedy_generation_is_the_cpus() -> None:
    sampling = Sampling(50, end_of_document=1, never_sampled=frozenset({0}), max_new_tokens=40, temperature=0)
    answers = []
    for device in (CPU, torch.device("cuda")):
        model = new_state(config_with(head_dim=16), device, "fp32").model
        answers.append(list(generate(model, [3, 4, 5], sampling)))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("compiled", [False, "auto"])
@pytest.mark.usefixtures("uncapped_afterwards")
def test_the_guides_model_takes_a_step_of_twelve_sequences_below_10_gib(compiled: bool | str) -> None:
    device = torch.device("cuda")
    torch.ones(512, 512, device=device).mm(torch.ones(512, 512, device=device))  # cuBLAS takes its memory
    cap_memory(device, 10.0)
    state = new_state(Config(), device)
    compile_block(state.model, compiled, device, state.settings.precision)
    before = weights(state)["embed.weight"][:10].cpu()
    tokens = torch.randint(0, 10, (12, 1024), device=device)
    micro_batches = [unmasked(tokens, torch.zeros_like(tokens))] * 2
    result = step_with_oom_retry(state, micro_batches, 2e-5, 1.0, RecordingHost())
    assert result.updated and memory_used_gb(device) < 10.0
    assert not torch.equal(weights(state)["embed.weight"][:10].cpu(), before)


@pytest.mark.skipif(not FLEX, reason="flex_attention needs g++, Python.h and compute capability 8.0")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_validation_compiles_nothing_that_training_does_not(recompute: bool, compiled: bool) -> None:
    """Neither the block nor, if it is not compiled, its attention; and it has the loss of a forward pass."""
    config = Config.from_dict(
        config_with(head_dim=16).to_dict()
        | {"training": tiny_config(precision="bf16", recompute_loops=recompute).to_dict()["training"]}
    )
    torch._dynamo.reset()
    state = new_state(config, CUDA)
    compile_block(state.model, compiled, CUDA, state.settings.precision)
    for first in (0, 12):
        take_step(state, on(CUDA, rank_micro_batches(first, 12, 0, 1, 4)), 1e-2, 1.0, never)
    before = int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    events: list[Event] = []
    validator(config, events)(state)
    assert int(torch._dynamo.utils.counters["stats"]["unique_graphs"]) == before > 0
    loss, tokens = loss_sums(state.model, on(CUDA, rank_micro_batches(0, 12, 0, 1, 4))).tolist()
    assert [event.validation_loss for event in events if isinstance(event, ValidationDone)] == pytest.approx(
        [loss / tokens], rel=1e-2
    )


@pytest.mark.parametrize("limit_gb", [6.0, 8.0, 10.0, 12.0, 16.0, 24.0])
@pytest.mark.usefixtures("uncapped_afterwards")
def test_what_is_expected_to_fit_under_a_limit_fits(limit_gb: float) -> None:
    """Two micro-batches of the default model, of the size and with the recomputation of the table in the guide."""
    config = Config.from_dict({"training": {"vram_limit_gb": limit_gb}})
    fit = expected_fit(config)
    assert fit is not None
    if torch.cuda.get_device_properties(CUDA).total_memory < limit_gb * GIB:
        pytest.skip(f"the GPU has less than {limit_gb:g} GiB")
    torch.cuda.empty_cache()
    cap_memory(CUDA, limit_gb)
    state = new_state(config, CUDA)
    state.set_batch_fit(fit)
    compile_block(state.model, "auto", CUDA, state.settings.precision)
    tokens = torch.randint(0, 10, (fit.rows, 1024), device=CUDA)
    documents = torch.arange(1024, device=CUDA).expand(fit.rows, 1024) // 250
    for _ in range(2):
        result = take_step(state, [unmasked(tokens, documents)] * 2, 2e-5, 1.0, never)
        assert result.updated and not result.out_of_memory
    assert memory_used_gb(CUDA) < limit_gb
    print(
        f"{limit_gb:g} GiB, {fit}: {peak_memory_gb(CUDA):.2f} GiB of tensors, estimate {estimated_gb(config, fit):.2f}"
    )


def test_a_profile_on_a_gpu_has_its_kernels_and_a_snapshot_of_its_memory() -> None:
    config = tiny_config(profile={"first_step": 2, "steps": 2})
    host, state = RecordingHost(), new_state(config, CUDA)
    train(state, config, (on(CUDA, batch) for batch in local_batches(state, config)), host)
    trace, memory = (host.files[f"profile/rank0-step2{end}"] for end in (".pt.trace.json.gz", "-memory.pickle"))
    events = json.loads(gzip.decompress(trace))["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events)
    assert sum(event["name"] == "update" and event.get("cat") == "user_annotation" for event in events) == 2
    snapshot = pickle.loads(memory)
    assert snapshot["segments"] and any(entry["action"] == "alloc" for entry in snapshot["device_traces"][0])


def test_allocations_after_a_profile_are_not_recorded() -> None:
    config, host = tiny_config(profile={"first_step": 1}), RecordingHost()
    with StepProfiler(config.training, new_state(config, CUDA), host) as profiler:
        profiler.before_step(1)
        profiler.after_step(1)
        torch.ones(123_457, device=CUDA)
        entries = torch.cuda.memory._snapshot()["device_traces"][0]
        assert not any(entry["action"] == "alloc" and entry["size"] >= 4 * 123_457 for entry in entries)
    assert "profile/rank0-step1-memory.pickle" in host.files


def test_a_copy_of_bf16_weights_takes_one_joined_tensor_of_device_memory() -> None:
    state = new_state(config_with(head_dim=64), CUDA, "bf16")
    largest = 4 * max(p.numel() for p in state.model.parameters())
    copies = HostCopy()
    copies.update(state)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    copies.update(state)
    assert torch.cuda.max_memory_allocated() - before <= largest + 4096  # blocks are multiples of 512 bytes
