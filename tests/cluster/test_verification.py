"""`savant verify` of a run that was trained under Ray."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from savant_ray.cli import main
from tests.cluster.conftest import Head, run_job, write_text

pytestmark = pytest.mark.slow
EQUAL = "steps 1 to 8 and the checkpoints step_4, step_8 are equal to the record of the run, bit for bit"


def test_a_run_under_ray_equals_its_repetition_for_which_ray_tokenizes_its_text_only_if_necessary(
    head: Head, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed = run_job(head, workplace)
    assert code == 0, printed
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("RAY_ADDRESS", head.address)
    assert main(["verify", "tiny"]) == 0
    printed = capsys.readouterr().out
    assert EQUAL in printed and "starting Ray" not in printed

    for cache in (workplace / "cache").glob("savant_dataset_*/"):
        shutil.rmtree(cache)
    assert main(["verify", "tiny", "--steps", "5.."]) == 0
    printed = capsys.readouterr().out
    assert "steps 5 to 8 and the checkpoint step_8 are equal" in printed and "starting Ray" in printed


@pytest.mark.rare
def test_a_run_whose_text_has_changed_is_not_repeated(
    head: Head, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed = run_job(head, workplace)
    assert code == 0, printed
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("RAY_ADDRESS", head.address)
    write_text(workplace / "dataset/savant_dataset_train.jsonl", 300, seed=3)
    assert main(["verify", "tiny"]) == 3
    assert "the text, its mixture or the tokenizer is not that of the attempt" in capsys.readouterr().err
