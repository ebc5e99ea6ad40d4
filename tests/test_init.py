"""`savant init` writes a settings file for the user's text, with comments."""

from __future__ import annotations

from pathlib import Path

import pytest

from savant_ray.cli import main
from savant_ray.config import Config, load_config

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(*arguments: str, name: str = "mine.yaml") -> Config:
    """Return the settings in the file that `savant init` has written."""
    assert main(["init", *arguments]) == 0
    return load_config((), {}, Path(name))


def test_without_text_the_file_is_the_shipped_example_with_a_name_of_its_own(folder: Path) -> None:
    assert written().run.name == "checkpoints_mine"
    own, shipped = (folder / "mine.yaml").read_text(), (ROOT / "configs/own_data.yaml").read_text()
    assert own.replace("checkpoints_mine", "checkpoints_own_data") == shipped and "# a file, folder, glob" in own


def test_the_file_names_the_text_and_can_be_used_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a b.jsonl").write_text('{"text": "one"}\n')
    config = written("a b.jsonl", "--output", "other.yaml", name="other.yaml")
    assert [source.path for source in config.data.sources] == ["a b.jsonl"] and not config.data.sources[0].text_blocks
    assert config.run.name == "checkpoints_other"
    assert "savant data --config other.yaml" in capsys.readouterr().out.replace(".venv/bin/", "")


def test_several_texts_are_one_source(folder: Path) -> None:
    for name in ("a.jsonl", "it's #1: x.jsonl"):
        (folder / name).write_text('{"text": "one"}\n')
    (source,) = written("a.jsonl", "it's #1: x.jsonl", "s3://bucket/c.parquet").data.sources
    assert source.path == ["a.jsonl", "it's #1: x.jsonl", "s3://bucket/c.parquet"]


def test_plain_text_is_divided_at_blank_lines(folder: Path) -> None:
    (folder / "book.txt").write_text("one\n\ntwo\n")
    assert written("book.txt").data.sources[0].text_blocks


def test_missing_text_and_an_existing_file_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "missing.jsonl"]) == 3
    assert "missing.jsonl: no such file" in capsys.readouterr().err and not (folder / "mine.yaml").exists()
    (folder / "mine.yaml").write_text("run: {seed: 5}")
    assert main(["init"]) == 2
    assert "mine.yaml exists already" in capsys.readouterr().err
    assert (folder / "mine.yaml").read_text() == "run: {seed: 5}"
