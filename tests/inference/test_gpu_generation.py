"""Generation on a GPU: replayed CUDA graphs give what eager steps and the CPU give; skipped without a GPU."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch

from savant_ray.config import ModelConfig
from savant_ray.inference.cuda_graph import StepGraph
from savant_ray.inference.generate import generate, generate_many
from savant_ray.inference.sampling import Sampling, sample_tokens, uniform_number
from savant_ray.model.attention import Mask, attend
from savant_ray.model.transformer import UniversalTransformer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
CUDA = torch.device("cuda")
FAILED_CAPTURE = "generating without a CUDA graph"
PROMPTS = [[5], [6, 7, 8, 9, 10, 11, 12], list(range(3, 33)), [9, 9]]


def model_on(device: torch.device | str, dtype: torch.dtype = torch.float32, **changes: Any) -> UniversalTransformer:
    torch.manual_seed(3)
    shape = dict(vocab_size=50, dim=64, n_heads=4, n_loops=4, max_seq_len=64, window_size=8, global_every=2)
    model = UniversalTransformer(ModelConfig(**(shape | changes)))
    with torch.no_grad():
        model.head.weight.mul_(20)  # an untrained head is nearly flat
    return model.to(device, dtype)


def sampling(**changes: Any) -> Sampling:
    defaults = dict(vocab_size=40, end_of_document=1, never_sampled=frozenset({0, 2}), max_new_tokens=60, temperature=0)
    return Sampling(**(defaults | changes))


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that generates without CUDA graphs, on buffers of the same shapes."""

    def without_graphs(*arguments: Any) -> list[list[int]]:
        with monkeypatch.context() as patch:
            patch.setattr(StepGraph, "run", lambda _graph, function: function())
            return generate_many(*arguments)

    return without_graphs


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("positions", ["none", "rotary"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replayed_graphs_give_the_tokens_of_eager_steps(
    dtype: torch.dtype, positions: str, temperature: float, eager: Any
) -> None:
    model = model_on(CUDA, dtype, positions=positions)
    parameters = sampling(temperature=temperature, end_of_document=-1, max_new_tokens=330)  # buffers grow at 256
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=FAILED_CAPTURE)
        assert generate_many(model, PROMPTS, parameters) == eager(model, PROMPTS, parameters)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_answers_of_the_gpu_are_those_of_the_cpu_also_after_rows_have_ended(temperature: float) -> None:
    parameters = sampling(temperature=temperature, end_of_document=7, max_new_tokens=100)
    answers = [generate_many(model_on(device), PROMPTS, parameters) for device in ("cpu", CUDA)]
    assert answers[0] == answers[1] and min(map(len, answers[0])) < 100


def test_new_weights_and_other_models_are_used(eager: Any) -> None:
    model, other = model_on(CUDA), model_on(CUDA, window_size=3)
    parameters = sampling(end_of_document=-1)
    first = generate_many(model, PROMPTS, parameters)
    with torch.no_grad():
        model.embed.weight.copy_(model.embed.weight.flip(0))
    second = generate_many(model, PROMPTS, parameters)
    assert second == eager(model, PROMPTS, parameters) != first
    assert generate_many(other, PROMPTS, parameters) == eager(other, PROMPTS, parameters) != second


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_non_finite_logits_end_the_answer(number: float) -> None:
    model = model_on(CUDA)
    with torch.no_grad():
        model.embed.weight[45] = number  # 45 is never sampled
    answers = generate_many(model, [[45, 5], [5]], sampling(end_of_document=-1))
    assert answers == [[], list(generate(model, [5], sampling(end_of_document=-1)))]


def test_a_failed_capture_is_a_warning_and_the_tokens_are_right(monkeypatch: pytest.MonkeyPatch, eager: Any) -> None:
    model = model_on(CUDA)
    expected = eager(model, PROMPTS, sampling())
    honest = UniversalTransformer.decode

    def waits_for_the_device(self: UniversalTransformer, *arguments: Any) -> torch.Tensor:
        logits = honest(self, *arguments)
        float(logits[0, 0])  # not permitted in a capture
        return logits

    monkeypatch.setattr(UniversalTransformer, "decode", waits_for_the_device)
    with pytest.warns(UserWarning, match=FAILED_CAPTURE):
        assert generate_many(model, PROMPTS, sampling()) == expected
    monkeypatch.undo()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.cuda.empty_cache()
    assert generate_many(model, PROMPTS, sampling()) == expected, "graphs can be captured again"


def test_graphs_and_buffers_are_released() -> None:
    model = model_on(CUDA)
    generate_many(model, PROMPTS, sampling())  # cuBLAS allocates its workspaces
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(3):
        generate_many(model, PROMPTS, sampling(end_of_document=-1, max_new_tokens=300))
        next(generate(model, [5], sampling()))
    torch.cuda.empty_cache()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


def test_another_thread_may_use_the_gpu_during_a_capture(eager: Any) -> None:
    model, parameters = model_on(CUDA), sampling(end_of_document=-1, max_new_tokens=300)
    expected, done = eager(model, PROMPTS, parameters), threading.Event()

    def copy_batches() -> None:
        stream = torch.cuda.Stream()
        while not done.is_set():
            with torch.cuda.stream(stream):
                torch.randint(0, 9, (12, 1024)).pin_memory().to(CUDA, non_blocking=True).sum().item()

    thread = threading.Thread(target=copy_batches)
    thread.start()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=FAILED_CAPTURE)
            assert all(generate_many(model, PROMPTS, parameters) == expected for _ in range(5))
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("precision", ["fp32 weights", "bf16 weights"])
def test_autocast_of_a_validation_can_be_captured(precision: str, eager: Any) -> None:
    model = model_on(CUDA, torch.float32 if precision == "fp32 weights" else torch.bfloat16)
    parameters = sampling(end_of_document=-1)
    with warnings.catch_warnings(), torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
        warnings.filterwarnings("error", message=FAILED_CAPTURE)
        assert generate_many(model, PROMPTS, parameters) == eager(model, PROMPTS, parameters)


def test_the_deterministic_kernels_of_a_run_do_not_prevent_a_capture(eager: Any) -> None:
    model, parameters = model_on(CUDA), sampling(end_of_document=-1, temperature=1.0)
    expected = eager(model, PROMPTS, parameters)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=FAILED_CAPTURE)
            assert generate_many(model, PROMPTS, parameters) == expected
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_attention_to_bf16_keys_has_fp32_scores() -> None:
    torch.manual_seed(0)
    q, k, v = (4 * torch.randn(3, 4, length, 64, device=CUDA).bfloat16() for length in (1, 100, 100))
    masked = torch.rand(3, 1, 1, 100, device=CUDA) < 0.3
    exact = attend(q.double(), k.double(), v.double(), Mask(masked), 50.0)
    with torch.no_grad():
        found = attend(q, k, v, Mask(masked), 50.0)
    # A score of 500 in bf16 would be wrong by up to 1; bf16 probabilities and outputs by 0.4 %.
    assert (found.double() - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("temperature", [5e-324, 1e-9, 0.7, 1.7e308])
def test_the_gpu_draws_the_tokens_of_the_cpu(temperature: float) -> None:
    torch.manual_seed(0)
    logits = 5 * torch.randn(1, 32_000)
    logits[0, 100:200] = float("-inf")
    for index in range(100):
        numbers = [torch.tensor(x, dtype=torch.float64) for x in (temperature, uniform_number(7, index))]
        of_cpu = sample_tokens(logits, *numbers)
        assert torch.equal(sample_tokens(logits.to(CUDA), *(number.to(CUDA) for number in numbers)).cpu(), of_cpu)
