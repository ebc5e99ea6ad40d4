"""Generation: greedy equals full recomputation, a seed determines the text, forbidden ids are never sampled."""

from __future__ import annotations

import pytest
import torch

from savant_ray.evaluation.loss import bits_per_byte, loss_sums
from savant_ray.inference.generate import generate, generate_many
from savant_ray.inference.sampling import Sampling
from savant_ray.model.transformer import UniversalTransformer
from tests.training.tiny import LENGTH, micro_batch, tiny_config, tiny_state

PROMPT = [5, 6, 7]


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


def test_greedy_answers_equal_full_recomputation_of_the_prefix(model: UniversalTransformer) -> None:
    answer = list(generate(model, PROMPT, sampling(temperature=0, end_of_document=-1, max_new_tokens=3 * LENGTH)))
    text = list(PROMPT)
    for token in answer:
        logits = model(torch.tensor([text]))[0, -1]
        logits[[0, 2, *range(40, 50)]] = float("-inf")
        assert token == int(logits.argmax())
        text.append(token)
    assert len(answer) == 3 * LENGTH, "on past max_seq_len"


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
    parameters = sampling(temperature=temperature, end_of_document=-1, max_new_tokens=600)
    assert set(generate(model, PROMPT, parameters)) == {1, *range(3, 40)}


def test_a_long_prompt_processed_in_parts_has_the_same_answer(
    model: UniversalTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[3 + i % 30 for i in range(length)] for length in (5 * LENGTH, 3 * LENGTH + 1)]
    expected = generate_many(model, prompts, sampling(temperature=0))
    monkeypatch.setattr("savant_ray.inference.generate.MAX_PROMPT_SCORES", 7 * 5 * LENGTH)
    assert generate_many(model, prompts, sampling(temperature=0)) == expected


def test_forbidden_ids_are_never_sampled(model: UniversalTransformer) -> None:
    tokens = [t for seed in range(30) for t in generate(model, PROMPT, sampling(seed=seed, temperature=5.0))]
    assert len(tokens) > 300 and set(tokens) <= set(range(3, 40))


def test_the_end_of_the_document_ends_the_answer(model: UniversalTransformer) -> None:
    lengths = [len(list(generate(model, PROMPT, sampling(seed=s, temperature=5.0)))) for s in range(20)]
    assert min(lengths) < 60


def test_an_empty_prompt_is_refused(model: UniversalTransformer) -> None:
    with pytest.raises(ValueError, match="no tokens"):
        next(generate(model, [], sampling()))


def test_the_validation_loss_does_not_depend_on_micro_batches(model: UniversalTransformer) -> None:
    batches = [micro_batch(range(8)), micro_batch(range(3)), micro_batch(range(3, 8))]
    complete, first, second = (loss_sums(model, [(b.tokens_BT, b.document_ids_BT)]) for b in batches)
    torch.testing.assert_close(first + second, complete)


def test_bits_per_byte_of_a_uniform_guess_over_bytes_is_eight() -> None:
    assert bits_per_byte(5.545177444479562, target_tokens=100, text_bytes=100) == pytest.approx(8)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_model_with_non_finite_logits_generates_nothing(temperature: float, model: UniversalTransformer) -> None:
    with torch.no_grad():
        model.head.weight[3, 0] = float("nan")
    assert list(generate(model, PROMPT, sampling(temperature=temperature))) == []
