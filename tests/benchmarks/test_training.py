"""Both contestants train on the same documents, and the figures say what their times were."""

from __future__ import annotations

import math

import pytest
import torch

from savant_ray.benchmarks import training
from savant_ray.benchmarks.registry import table
from savant_ray.benchmarks.training import Case
from savant_ray.config import ModelConfig

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(vocab_size=60, dim=32, n_heads=2, n_loops=2, max_seq_len=32, window_size=8)
    monkeypatch.setattr(training, "model_config", lambda device: config)


@pytest.mark.parametrize("case", [Case(10, 4), Case(32, 3)])
def test_both_take_a_step_on_the_same_documents(case: Case) -> None:
    theirs, ours = training._baseline(case, CPU)(), training._ours(case, CPU)()
    assert ours.tokens == case.n_documents * (case.document_tokens - 1)
    assert theirs == pytest.approx(math.log(60), rel=0.1) and ours.loss == pytest.approx(math.log(60), rel=0.1)


def test_the_figures_are_ratios_of_neighbouring_rounds() -> None:
    figures = training._figures("x", Case(10, 4), CPU, peak=[1e9, 1e9, 1e9], slow=[4.0, 2.0, 6.0], fast=[1.0, 1.0, 2.0])
    figure = figures["train_x"]
    assert figure["ratio"] == 3.0 and figure["spread"] == [2.0, 4.0] and figure["rounds"] == 3
    assert 0 < figure["share_of_peak"] < 1 and "40 against 10 useful tokens/s" in figure["detail"]
    assert table(figures).row_count == 1
