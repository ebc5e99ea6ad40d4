"""Loop statistics equal a direct computation."""

from __future__ import annotations

import pytest
import torch

from savant_ray.evaluation.loop_statistics import COLLAPSE_COSINE, LoopStatistics, loop_statistics, mean_cosine
from tests.training.tiny import micro_batch, tiny_config, tiny_state


def test_residuals_and_cosines_are_those_of_each_loop() -> None:
    model, batch = tiny_state(tiny_config()).model, micro_batch([1, 2, 3])
    with torch.no_grad():
        states = list(model.loop_states(batch.tokens_BT, batch.document_ids_BT, 3))
        assert torch.equal(model.ln_f(states[-1]), model.hidden_states(batch.tokens_BT, batch.document_ids_BT, 3))
    found = loop_statistics(model, batch.tokens_BT, batch.document_ids_BT, 3)
    assert len(found.residuals) == len(found.cosines) == 3
    for before, after, residual, cosine in zip(states, states[1:], found.residuals, found.cosines, strict=False):
        moved, rows = [], []
        for row, documents in enumerate(batch.document_ids_BT):
            there = [t for t in range(len(documents)) if documents[t] >= 0]
            moved += [float((after[row, t] - before[row, t]).norm() / before[row, t].norm()) for t in there]
            units = [after[row, t] / after[row, t].norm() for t in there]
            pairs = [float(a @ b) for i, a in enumerate(units) for j, b in enumerate(units) if i != j]
            rows.append(sum(pairs) / len(pairs))
        assert residual == pytest.approx(sum(moved) / len(moved), rel=1e-5)
        assert cosine == pytest.approx(sum(rows) / len(rows), abs=1e-5)


def test_equal_tokens_are_a_collapse_and_a_single_token_is_not() -> None:
    alike = torch.ones(2, 5, 4)
    assert mean_cosine(alike, torch.ones(2, 5, dtype=torch.bool)) == pytest.approx(1)
    assert mean_cosine(alike, torch.tensor([[True] + [False] * 4] * 2)) == 0
    assert mean_cosine(torch.eye(4)[None], torch.ones(1, 4, dtype=torch.bool)) == pytest.approx(0)
    assert (
        LoopStatistics((0.1,), (COLLAPSE_COSINE + 0.01,)).has_collapsed
        and not LoopStatistics((0.1,), (0.5,)).has_collapsed
    )
