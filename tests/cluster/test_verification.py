"""`savant verify` of a run whose text has to be tokenized again; `test_runs.py` verifies one whose token cache exists."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from savant_ray.cli import main
from tests.cluster.conftest import Head, run_job, write_text

pytestmark = [pytest.mark.slow, pytest.mark.rare]


def test_ray_tokenizes_a_missing_text_again_and_changed_text_is_refused(
    head: Head, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed = run_job(head, workplace, scaling__num_workers=2)
    assert code == 0, printed
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("RAY_ADDRESS", head.address)
    for cache in (workplace / "cache").glob("savant_dataset_*/"):
        shutil.rmtree(cache)
    assert main(["verify", "tiny", "--steps", "5.."]) == 0
    printed = capsys.readouterr().out
    assert "steps 5 to 8 and the checkpoint step_8 are equal" in printed and "starting Ray" in printed

    write_text(workplace / "dataset/savant_dataset_train.jsonl", 300, seed=3)
    assert main(["verify", "tiny"]) == 3
    assert "the text, its mixture or the tokenizer is not that of the attempt" in capsys.readouterr().err
