"""The choice of a token: probabilities, forbidden ids, and random numbers that are the same everywhere."""

from __future__ import annotations

import pytest
import torch

from savant_ray.inference.sampling import Sampling, are_finite, logit_bias, sample_tokens, uniform_number


def chosen(logits: torch.Tensor, uniform: float, temperature: float = 1.0) -> int:
    as_tensors = (torch.tensor(number, dtype=torch.float64) for number in (temperature, uniform))
    return int(sample_tokens(logits[None], *as_tensors))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_tokens_are_drawn_with_the_probabilities_of_the_softmax(temperature: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(20)
    counts = [0] * 20
    for k in range(2000):
        counts[chosen(logits, (k + 0.5) / 2000, temperature)] += 1
    expected = 2000 * (logits.double() / temperature).softmax(0)
    assert counts == pytest.approx(expected.tolist(), abs=1)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2.0**-53])
@pytest.mark.parametrize("temperature", [5e-324, 1.0, 1.7e308])
def test_extreme_random_numbers_draw_no_forbidden_token(uniform: float, temperature: float) -> None:
    sampling = Sampling(vocab_size=900, end_of_document=1, never_sampled=frozenset({0, 7, 899, 5000}))
    torch.manual_seed(1)
    logits = 10 * torch.randn(1000) + logit_bias(sampling, 1000)
    token = chosen(logits, uniform, temperature)
    assert token < 900 and token not in sampling.never_sampled


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_one_number_that_is_not_finite_is_noticed(number: float) -> None:
    logits = torch.full((3, 50), 3e38)  # the sum would overflow
    logits[1, 30] = number
    assert are_finite(logits).tolist() == [True, False, True]


def test_random_numbers_are_those_of_splitmix64() -> None:
    """Computed by the published generator: its first output from seed 0 is the state that these outputs start from."""
    assert [uniform_number(0, index) for index in range(3)] == [
        0.6524484863740322,
        0.7012121095215252,
        0.3871241409757855,
    ]


def test_random_numbers_are_uniform_and_differ_between_seeds_and_tokens() -> None:
    numbers = torch.tensor([[uniform_number(seed, index) for index in range(100)] for seed in range(100)])
    histogram = torch.histc(numbers, bins=10, min=0, max=1)
    assert numbers.min() >= 0 and numbers.max() < 1 and (histogram - 1000).abs().max() < 150
    assert len(numbers.unique()) > 9_990
    correlations = torch.corrcoef(numbers) - torch.eye(100)
    assert correlations.abs().max() < 0.5
    assert uniform_number(-1, 0) == uniform_number(2**64 - 1, 0)
