"""Both processes train on the same documents, and the figures report their times."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from savant_ray.benchmarks import training
from savant_ray.benchmarks.registry import Figures, table
from savant_ray.benchmarks.training import Case
from savant_ray.config import Config, ModelConfig
from savant_ray.training.state import TrainingState, micro_batch_size
from savant_ray.training.step import StepResult, take_step

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(vocab_size=60, dim=32, n_heads=2, n_loops=2, max_seq_len=32, window_size=8)
    monkeypatch.setattr(training, "model_config", lambda device: config)


@pytest.mark.parametrize("case", [Case(10, 4), Case(32, 3)])
def test_baseline_and_package_train_on_the_same_documents(case: Case) -> None:
    theirs, ours = training._baseline(case, CPU)(), training._savant(case, CPU)()
    assert ours.tokens == case.n_documents * (case.document_tokens - 1)
    assert theirs == pytest.approx(math.log(60), rel=0.1) and ours.loss == pytest.approx(math.log(60), rel=0.1)


def test_a_step_that_does_not_fit_is_repeated_with_smaller_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []

    def narrow(state: TrainingState, *inputs: Any) -> StepResult:
        rows.append(state.batch_fit.rows)
        return dataclasses.replace(take_step(state, *inputs), out_of_memory=state.batch_fit.rows > 3)

    monkeypatch.setattr(training, "take_step", narrow)
    assert training._savant(Case(32, 3), CPU)().updated
    assert rows == [12, 12, 6, 3], "first the loops are recomputed"


def test_cases_for_a_gpu_have_the_default_micro_batch_size() -> None:
    guide = Config()
    for case in training.CASES_ON_A_GPU.values():
        per_row = guide.model.max_seq_len // case.document_tokens
        assert case.n_documents == per_row * guide.training.batch_size


def test_the_steps_that_show_the_cost_of_determinism_have_16_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the models of the benchmark
    for device, case in (("cpu", training.DETERMINISTIC_CASE), ("cuda", training.DETERMINISTIC_CASE_ON_A_GPU)):
        config = Config.from_dict(
            {"model": training.model_config(torch.device(device)).model_dump(), "training": {"deterministic": True}}
        )
        assert case.document_tokens == config.model.max_seq_len
        assert case.n_documents == 16 * micro_batch_size(config, torch.device(device))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("deterministic", [True, False])
def test_deterministic_steps_on_a_gpu_are_measured_with_deterministic_kernels(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "cap_memory", lambda *arguments: None)
    try:
        training._savant(Case(32, 3), torch.device("cuda"), deterministic)
        assert torch.are_deterministic_algorithms_enabled() == deterministic
    finally:
        torch.use_deterministic_algorithms(False)


def _figures(peaks: list[float]) -> Figures:
    return training._figures(
        "x", Case(10, 4), CPU, peaks, reference_times=[4.0, 2.0, 6.0], savant_times=[1.0, 1.0, 2.0]
    )


def test_the_figures_are_ratios_within_each_round() -> None:
    figures = _figures(peaks=[1e9, 1e9, 1e9])
    figure = figures["train_x"]
    assert figure["ratio"] == 3.0 and figure["spread"] == [2.0, 4.0] and figure["rounds"] == 3
    assert 0 < figure["share_of_peak"] < 1 and "40 against 10 useful tokens/s" in figure["detail"]
    assert table(figures).row_count == 1


def test_the_share_of_peak_is_at_most_one_even_if_the_peak_was_measured_too_low() -> None:
    figures = _figures(peaks=[1.0, 2.0, 1.0])
    assert figures["train_x"]["share_of_peak"] == 1.0
