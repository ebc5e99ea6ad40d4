"""Generation: greedy equals full recomputation, a seed determines the text, forbidden ids are never sampled.

Most tests run as on a CPU and as on a GPU, where a recorded decoding step is replayed and tokens arrive in groups.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from savant_ray.config import ModelConfig
from savant_ray.evaluation.held_out_loss import bits_per_byte, loss_sums
from savant_ray.inference import decoder as decoder_module
from savant_ray.inference.generate import generate, generate_many
from savant_ray.inference.sampling import Sampling
from savant_ray.model import transformer
from savant_ray.model.transformer import UniversalTransformer
from tests.inference.recorded_graph import RecordedGraph
from tests.training.tiny import LENGTH, MODEL, micro_batch, tiny_config, tiny_state

PROMPT = [5, 6, 7]


@pytest.fixture(autouse=True, params=["eager", "replayed"])
def execution(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "replayed":
        monkeypatch.setattr(decoder_module, "StepGraph", RecordedGraph)
    return request.param


@pytest.fixture
def model() -> UniversalTransformer:
    model = tiny_state(tiny_config()).model
    with torch.no_grad():
        model.head.weight.mul_(20)  # an untrained head is nearly flat
    return model


def sampling(**changes: object) -> Sampling:
    defaults = dict(
        vocab_size=40, end_of_document=1, never_sampled=frozenset({0, 2}), max_new_tokens=60, temperature=1.0
    )
    return Sampling(**(defaults | changes))


def recomputed(
    model: UniversalTransformer, prompt: list[int], answer: list[int], n_loops: int | None = None
) -> list[int]:
    """Return the most likely token after each prefix of the text, without a cache.

    It is the answer if and only if the answer is the greedy one.
    """
    hidden = model.hidden_states(torch.tensor([prompt + answer]), n_loops=n_loops)
    logits = model.head(hidden)[0, len(prompt) - 1 : -1]
    logits[:, [0, 2, *range(40, 50)]] = float("-inf")
    return logits.argmax(dim=-1).tolist()


def test_greedy_answers_equal_full_recomputation_of_the_prefix(model: UniversalTransformer) -> None:
    answer = list(generate(model, PROMPT, sampling(temperature=0, end_of_document=-1, max_new_tokens=3 * LENGTH)))
    assert len(answer) == 3 * LENGTH, "on past max_seq_len"
    assert answer == recomputed(model, PROMPT, answer)


@pytest.mark.parametrize("positions", ["none", "rotary"])
@pytest.mark.parametrize("window_size", [1, 4, 100])
@pytest.mark.parametrize("n_loops", [1, 2, 5])
def test_greedy_answers_to_prompts_of_different_lengths_equal_full_recomputation(
    n_loops: int, window_size: int, positions: str
) -> None:
    model = model_with(window_size=window_size, positions=positions)
    prompts = [[5], [3 + i % 30 for i in range(25)], PROMPT]
    parameters = sampling(temperature=0, end_of_document=-1, max_new_tokens=20)
    answers = generate_many(model, prompts, parameters, n_loops)
    assert [len(answer) for answer in answers] == [20] * 3
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer == recomputed(model, prompt, answer, n_loops)


class RecordedShapes(TorchDispatchMode):
    """Records the shapes of the weights of matrix products and of the tensors that are cast."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[tuple[int, ...]] = []
        self.casts: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator is torch.ops.aten.mm.default:
            self.weights.append(tuple(args[1].shape))
        elif operator is torch.ops.aten._to_copy.default:
            self.casts.append(tuple(args[0].shape))
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("positions", ["none", "rotary"])
def test_weights_laid_out_as_on_a_gpu_give_the_same_tokens(positions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with(positions=positions)
    prompts = [[5], [3 + i % 30 for i in range(25)], PROMPT]
    parameters = sampling(temperature=0, end_of_document=-1, max_new_tokens=40)
    with monkeypatch.context() as gpu, RecordedShapes() as recorded:
        gpu.setitem(transformer.WEIGHT_PACKING, "cpu", transformer.WEIGHT_PACKING["cuda"])
        answers = generate_many(model, prompts, parameters)
    assert [len(answer) for answer in answers] == [40] * 3
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer == recomputed(model, prompt, answer)
    dim, vocab_size = model.config.dim, model.config.vocab_size
    assert set(recorded.weights) == {(dim, 3 * dim), (dim, dim), (dim, 2 * 64), (64, dim), (dim, vocab_size)}


def test_under_autocast_the_weights_are_cast_once_for_an_answer(model: UniversalTransformer) -> None:
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), RecordedShapes() as recorded:
        assert len(list(generate(model, PROMPT, sampling(end_of_document=-1, max_new_tokens=9)))) == 9
    assert recorded.casts.count(tuple(model.recurrent_block.ffn[0].weight.shape)) == 1


@pytest.mark.parametrize("window_size", [4, 300])
def test_buffers_grow_with_the_text(window_size: int) -> None:
    model = model_with(window_size=window_size, positions="rotary")
    prompts = [[3 + i % 30 for i in range(length)] for length in (240, 180)]
    parameters = sampling(temperature=0, end_of_document=-1, max_new_tokens=350)
    answers = generate_many(model, prompts, parameters)
    assert [len(answer) for answer in answers] == [350] * 2
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer == recomputed(model, prompt, answer)


def model_with(**changes: Any) -> UniversalTransformer:
    torch.manual_seed(3)
    model = UniversalTransformer(ModelConfig(**(MODEL | {"n_loops": 4} | changes)))
    with torch.no_grad():
        model.head.weight.mul_(20)
    return model


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_batch_of_prompts_has_the_answers_of_each_prompt_alone(
    model: UniversalTransformer, temperature: float
) -> None:
    prompts = [[5], [6, 7, 8, 9, 10, 11, 12], [5, 6, 7], list(range(3, 33))]
    parameters = sampling(temperature=temperature, max_new_tokens=3 * LENGTH)
    together = generate_many(model, prompts, parameters)
    assert together == [list(generate(model, prompt, parameters)) for prompt in prompts]
    assert len({len(answer) for answer in together}) > 1, "some end before others"


def test_the_seed_determines_the_text(model: UniversalTransformer) -> None:
    texts = [tuple(generate(model, PROMPT, sampling(seed=seed))) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-45, 1e-9])
def test_at_temperatures_near_0_the_most_likely_token_is_drawn(temperature: float, model: UniversalTransformer) -> None:
    greedy = list(generate(model, PROMPT, sampling(temperature=0)))
    assert list(generate(model, PROMPT, sampling(temperature=temperature))) == greedy


@pytest.mark.parametrize("temperature", [1e9, 1e45, 1.7e308])
def test_at_very_high_temperatures_every_allowed_token_is_drawn(
    temperature: float, model: UniversalTransformer
) -> None:
    parameters = sampling(temperature=temperature, end_of_document=-1, max_new_tokens=350)
    assert set(generate(model, PROMPT, parameters)) == {1, *range(3, 40)}


def test_a_long_prompt_processed_in_parts_has_the_same_answer(
    model: UniversalTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[3 + i % 30 for i in range(length)] for length in (5 * LENGTH, 3 * LENGTH + 1)]
    expected = generate_many(model, prompts, sampling(temperature=0))
    monkeypatch.setattr("savant_ray.inference.decoder.MAX_PROMPT_SCORES", 7 * 5 * LENGTH)
    assert generate_many(model, prompts, sampling(temperature=0)) == expected


def test_forbidden_ids_are_never_sampled(model: UniversalTransformer) -> None:
    tokens = [t for seed in range(12) for t in generate(model, PROMPT, sampling(seed=seed, temperature=5.0))]
    assert len(tokens) > 200 and set(tokens) <= set(range(3, 40))


def test_the_end_of_the_document_ends_the_answer(model: UniversalTransformer) -> None:
    lengths = [len(list(generate(model, PROMPT, sampling(seed=s, temperature=5.0)))) for s in range(8)]
    assert min(lengths) < 60


def test_an_empty_prompt_is_refused(model: UniversalTransformer) -> None:
    with pytest.raises(ValueError, match="no tokens"):
        next(generate(model, [], sampling()))


def test_the_validation_loss_does_not_depend_on_micro_batches(model: UniversalTransformer) -> None:
    batches = [micro_batch(range(8)), micro_batch(range(3)), micro_batch(range(3, 8))]
    complete, first, second = (loss_sums(model, [batch]) for batch in batches)
    torch.testing.assert_close(first + second, complete)


def test_bits_per_byte_of_a_uniform_guess_over_bytes_is_eight() -> None:
    assert bits_per_byte(5.545177444479562, target_tokens=100, trained_bytes=100) == pytest.approx(8)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_model_with_non_finite_logits_generates_nothing(temperature: float, model: UniversalTransformer) -> None:
    for number in ("nan", "inf", "-inf"):
        with torch.no_grad():
            model.head.weight[3, 0] = float(number)
        assert list(generate(model, PROMPT, sampling(temperature=temperature))) == []


def test_non_finite_logits_of_one_prompt_do_not_change_the_others(model: UniversalTransformer) -> None:
    with torch.no_grad():
        model.embed.weight[45] = float("nan")  # 45 is never sampled
    prompts = [[45, 5], PROMPT, [7, 45], [8]]
    parameters = sampling(temperature=0, end_of_document=-1)
    answers = generate_many(model, prompts, parameters)
    assert [len(answer) for answer in answers] == [0, 60, 0, 60]
    for number in (1, 3):
        assert answers[number] == recomputed(model, prompts[number], answers[number])


def test_ended_answers_are_no_longer_computed(model: UniversalTransformer) -> None:
    prompts = [[prompt] for prompt in range(3, 11)]
    endless = generate_many(model, prompts, sampling(end_of_document=-1))
    count = {token: sum(token in answer for answer in endless) for token in range(3, 40)}
    end = max((token for token in count if count[token] < 8), key=lambda token: count[token])
    assert count[end] >= 4, "most answers end, but not all"
    answers = [answer[: answer.index(end)] if end in answer else answer for answer in endless]
    rows: list[int] = []
    model.head.register_forward_hook(lambda _module, inputs, _output: rows.append(len(inputs[0])))
    assert generate_many(model, prompts, sampling(end_of_document=end)) == answers
    assert rows[0] == 8 and rows[-1] <= 4


def test_a_stop_request_ends_the_answers_early(model: UniversalTransformer, execution: str) -> None:
    stops = iter([False, False, True])
    parameters = sampling(end_of_document=-1, max_new_tokens=1000)
    answers = generate_many(model, [PROMPT, [5]], parameters, stop_requested=lambda: next(stops))
    assert [len(answer) for answer in answers] == [1 + (1 if execution == "eager" else decoder_module.GPU_GROUP)] * 2


def test_new_weights_are_used_by_the_next_answer(model: UniversalTransformer) -> None:
    parameters = sampling(temperature=0, end_of_document=-1)
    before = list(generate(model, PROMPT, parameters))
    with torch.no_grad():
        model.head.weight.copy_(model.head.weight.flip(1))
    after = list(generate(model, PROMPT, parameters))
    assert len(after) == 60 and after == recomputed(model, PROMPT, after) != before


def test_one_seed_draws_the_same_tokens_in_a_batch_of_any_size(model: UniversalTransformer) -> None:
    alone = list(generate(model, PROMPT, sampling(seed=5)))
    assert generate_many(model, [PROMPT] * 5, sampling(seed=5)) == [alone] * 5
    assert generate_many(model, [[9, 8], PROMPT, [7] * 20], sampling(seed=5))[1] == alone


def test_a_recorded_step_is_replayed(model: UniversalTransformer, execution: str) -> None:
    """Guard the tests of this file: without it `replayed` could test the eager steps again."""
    RecordedGraph.n_recorded = RecordedGraph.n_replayed = 0
    list(generate(model, PROMPT, sampling(end_of_document=-1, max_new_tokens=50)))
    found = (RecordedGraph.n_recorded, RecordedGraph.n_replayed)
    assert found == ((0, 0) if execution == "eager" else (1, 48))  # the prompt gives the first token
