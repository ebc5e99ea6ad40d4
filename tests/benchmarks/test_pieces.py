"""Attention, loss and generation are measured to the end, on a model of a few numbers."""

from __future__ import annotations

import pytest

from savant_ray.benchmarks import generation, pieces
from savant_ray.config import ModelConfig

SMALL = ModelConfig(vocab_size=60, dim=32, n_heads=2, n_loops=2, max_seq_len=32, window_size=8, global_every=2)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (pieces, generation):
        monkeypatch.setattr(module, "model_config", lambda device: SMALL)
        monkeypatch.setattr(module, "ROUNDS", 1)
    monkeypatch.setattr(pieces, "DOCUMENT", 10)
    monkeypatch.setattr(generation, "NEW", 3)


def test_attention_is_measured_for_both_kinds_of_loops_and_texts() -> None:
    figures = pieces.run_attention()
    assert len(figures) == 4 and all(figure["ratio"] > 0 for figure in figures.values())


def test_the_loss_is_measured() -> None:
    assert pieces.run_loss()["loss"]["ratio"] > 0


def test_generation_is_measured_for_one_prompt_and_for_several() -> None:
    figures = generation.run()
    assert {"generate_float32", "generate_float32_8_at_once"} <= set(figures)
    assert all(figure["ratio"] > 0 for figure in figures.values())
