"""The baseline computes the same results as the package, so that their times are comparable."""

from __future__ import annotations

import pytest
import torch

from savant_ray.benchmarks import baseline
from savant_ray.config import ModelConfig
from savant_ray.inference.generate import generate
from savant_ray.inference.sampling import Sampling
from savant_ray.model.loss import cross_entropy_sum, next_token_targets
from savant_ray.model.transformer import UniversalTransformer

CONFIG = ModelConfig(vocab_size=60, dim=32, n_heads=2, n_loops=4, max_seq_len=24, window_size=5, global_every=2)


@pytest.fixture
def models() -> tuple[baseline.Baseline, UniversalTransformer]:
    torch.manual_seed(0)
    model = UniversalTransformer(CONFIG)
    reference = baseline.Baseline(CONFIG)
    assert not reference.load_state_dict(model.state_dict(), strict=False).unexpected_keys
    return reference, model


def test_loss_and_gradients_of_padded_documents_are_those_of_packed_ones(
    models: tuple[baseline.Baseline, UniversalTransformer],
) -> None:
    reference, model = models
    documents = [torch.randint(1, 60, (length,)) for length in (7, 10, 5)]
    expected = baseline.loss_sum(reference, baseline.padded(documents, 24))
    expected.backward()
    tokens = torch.cat([*documents, torch.zeros(2, dtype=torch.int64)])[None]
    ids = torch.tensor([[0] * 7 + [1] * 10 + [2] * 5 + [-1] * 2])
    loss = cross_entropy_sum(model.hidden_states(tokens, ids), model.head.weight, next_token_targets(tokens, ids))
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    gradients = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-3, atol=1e-4)


def test_baseline_and_package_generate_the_same_tokens(models: tuple[baseline.Baseline, UniversalTransformer]) -> None:
    reference, model = models
    sampling = Sampling(60, end_of_document=99, never_sampled=frozenset(), max_new_tokens=15, temperature=0)
    assert baseline.generate(reference, [3, 4, 5], 15) == list(generate(model, [3, 4, 5], sampling))


def test_steps_of_the_baseline_lower_the_loss(models: tuple[baseline.Baseline, UniversalTransformer]) -> None:
    model, _ = models
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = baseline.padded([torch.randint(1, 60, (20,)) for _ in range(3)], 24)
    losses = [baseline.take_step(model, optimizer, [rows[:2], rows[2:]]) for _ in range(5)]
    assert losses[-1] < losses[0]
