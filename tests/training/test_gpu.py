"""The same promises on a GPU; skipped without one. Needs neither Ray nor a network."""

from __future__ import annotations

import pytest
import torch

from savant_ray.inference.generate import Sampling, generate
from savant_ray.training.memory import GIB, cap_memory, memory_used_gb
from savant_ray.training.state import new_state
from savant_ray.training.step import MicroBatch, take_step
from tests.training.tiny import CPU, never, share, tiny_config, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def on(device: torch.device, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
    return [MicroBatch(b.tokens_BT.to(device), b.document_ids_BT.to(device), b.positions) for b in micro_batches]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16-mixed", 2e-2), ("bf16", 2e-2)])
def test_a_step_on_the_gpu_is_the_step_on_the_cpu(precision: str, tolerance: float) -> None:
    losses = []
    for device in (CPU, torch.device("cuda")):
        state = new_state(tiny_config(), device, "fp32" if device == CPU else precision)
        for k in range(3):
            result = take_step(state, on(device, share(k * 12, 12, 0, 1, 4)), 1e-2, 1.0, never)
        losses.append(result.loss)
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)


def test_the_cap_holds(request: pytest.FixtureRequest) -> None:
    device = torch.device("cuda")
    request.addfinalizer(lambda: torch.cuda.set_per_process_memory_fraction(1.0, device))
    assert cap_memory(device, 0.5) is None
    torch.empty(int(0.3 * GIB), dtype=torch.uint8, device=device)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        torch.empty(int(0.6 * GIB), dtype=torch.uint8, device=device)
    assert 0.25 < memory_used_gb(device) < 0.5
    assert "capped at that" in (cap_memory(device, 10_000) or "")


def test_greedy_generation_is_the_cpus() -> None:
    sampling = Sampling(50, end_of_document=1, never_sampled=frozenset({0}), max_new_tokens=40, temperature=0)
    answers = []
    for device in (CPU, torch.device("cuda")):
        model = new_state(tiny_config(), device, "fp32").model
        answers.append(list(generate(model, [3, 4, 5], sampling)))
    assert answers[0] == answers[1]


def test_the_guides_model_takes_a_step_of_twelve_sequences_below_10_gib() -> None:
    from savant_ray.config import Config

    device = torch.device("cuda")
    cap_memory(device, 10.0)
    state = new_state(Config(), device)
    state.model.recompute_loops = True
    before = weights(state)["embed.weight"][:10].cpu()
    tokens = torch.randint(0, 10, (12, 1024), device=device)
    result = take_step(state, [MicroBatch(tokens, torch.zeros_like(tokens), ())] * 2, 2e-5, 1.0, never)
    assert result.updated and memory_used_gb(device) < 10.0
    assert not torch.equal(weights(state)["embed.weight"][:10].cpu(), before)
