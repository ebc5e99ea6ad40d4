"""Arrays become micro-batches of the configured size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from savant_ray.data.token_cache import Sequences
from savant_ray.training.efficiency import document_lengths, useful_flops
from savant_ray.training.step import micro_batches
from tests.training.tiny import LENGTH, VOCABULARY, tiny_config


@pytest.mark.parametrize("n", [0, 1, 4, 7])
def test_sequences_become_micro_batches_of_the_batch_size_in_their_order(n: int) -> None:
    config = tiny_config()
    chance = np.random.default_rng(n)
    documents = np.sort(chance.integers(-1, 3, (n, LENGTH)).astype(np.int32))[:, ::-1]
    tokens = chance.integers(1, VOCABULARY, (n, LENGTH)).astype(np.int32)
    positions = np.arange(100, 100 + n)
    is_trained = chance.integers(2, size=(n, LENGTH)).astype(bool) | (documents < 0)
    parts = micro_batches(Sequences(tokens, documents, is_trained), positions, config)
    assert [len(part.positions) for part in parts] == [4] * (n // 4) + [n % 4] * (n % 4 > 0)
    assert [position for part in parts for position in part.positions] == positions.tolist()
    if n:
        assert np.array_equal(torch.cat([part.tokens_BT for part in parts]).numpy(), tokens)
        assert np.array_equal(torch.cat([part.document_ids_BT for part in parts]).numpy(), documents)
        assert np.array_equal(torch.cat([part.is_trained_BT for part in parts]).numpy(), is_trained)
    useful = useful_flops(config.model, document_lengths(documents), (~is_trained).sum()) if n else 0.0
    assert sum(part.useful_flops for part in parts) == pytest.approx(useful)
    tokens[:] = 0
    assert all((part.tokens_BT > 0).all() for part in parts), "copies"
