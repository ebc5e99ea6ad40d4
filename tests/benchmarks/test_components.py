"""The benchmarks of attention, loss and generation run on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from savant_ray.benchmarks import components
from savant_ray.cli import main
from savant_ray.config import ModelConfig

SMALL = ModelConfig(vocab_size=60, dim=32, n_heads=2, n_loops=2, max_seq_len=32, window_size=8, global_every=2)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(components, "model_config", lambda device: SMALL)
    for name, value in {"ROUNDS": 1, "GENERATION_ROUNDS": 1, "DOCUMENT_TOKENS": 10, "NEW_TOKENS": 3}.items():
        monkeypatch.setattr(components, name, value)


def test_attention_is_measured_for_both_kinds_of_loops_and_texts() -> None:
    figures = components.run_attention()
    assert len(figures) == 4 and all(figure["ratio"] > 0 for figure in figures.values())


def test_the_loss_is_measured() -> None:
    assert components.run_loss()["loss"]["ratio"] > 0


def test_generation_is_measured_for_one_prompt_and_for_several() -> None:
    figures = components.run_generation()
    assert {"generate_float32", "generate_float32_8_at_once"} <= set(figures)
    assert all(figure["ratio"] > 0 for figure in figures.values())


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[str] = []
    monkeypatch.setattr(components, "run_loss", lambda: measured.append("loss"))
    for path, reason in {tmp_path / "missing" / "figures.json": "there is no folder", tmp_path: "is a folder"}.items():
        assert main(["benchmark", "loss", "--json", str(path)]) == 2
        assert f"argument --json: {path}" in (printed := capsys.readouterr().err) and reason in printed
    assert not measured
