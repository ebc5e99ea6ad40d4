"""From the settings of a source to its files."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from savant_ray.config import SourceConfig
from savant_ray.data.documents import DocumentRule
from savant_ray.data.record_reader import documents
from savant_ray.data.source_files import find_files
from savant_ray.errors import DataError
from tests.data.test_hub import MAIN, Hub, hub  # noqa: F401 - a fixture


def parquet(*texts: str) -> bytes:
    """Return a Parquet file with these texts."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": list(texts)}), sink)
    return sink.getvalue().to_pybytes()


def texts_of(source: SourceConfig, cache_dir: Path) -> list[str]:
    """Return the documents of a source."""
    files = find_files(source, cache_dir, lambda message: None)
    return [document.text for document in documents(files, rule=DocumentRule())]


def test_a_source_can_be_a_data_set_of_the_hub(hub: Hub, tmp_path: Path) -> None:  # noqa: F811
    hub.commits[MAIN] = {
        "data/train-00000-of-00002.parquet": parquet("one", "two"),
        "data/train-00001-of-00002.parquet": parquet("three"),
        "data/test-00000-of-00001.parquet": parquet("held out"),
        "README.md": b"# No configs",
    }
    source = SourceConfig(path="hf://datasets/owner/name", weight=1)
    assert texts_of(source, tmp_path) == ["one", "two", "three"]
    assert texts_of(source.model_copy(update={"split": "test"}), tmp_path) == ["held out"]


@pytest.mark.parametrize(
    ("source", "texts"),
    [
        (SourceConfig(path="notes.md", weight=1), ["a\n\nb"]),
        (SourceConfig(path="notes.md", weight=1, text_blocks=True), ["a", "b"]),
        (SourceConfig(path="rows.txt", weight=1, format="csv"), ["x", "y"]),
    ],
)
def test_format_and_blocks_are_settings_of_a_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: SourceConfig, texts: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.md").write_text("a\n\nb")
    Path("rows.txt").write_text("text\nx\ny\n")
    assert texts_of(source, tmp_path) == texts


def test_a_source_that_the_hub_does_not_have_is_an_error(hub: Hub, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(DataError, match="^hf://datasets/owner/other: does not exist"):
        texts_of(SourceConfig(path="hf://datasets/owner/other", weight=1), tmp_path)


def save_splits(folder: Path, splits: list[str]) -> Path:
    """Write what `datasets.DatasetDict.save_to_disk` writes."""
    table = pa.table({"text": ["a"]})
    for split in splits:
        (folder / split).mkdir(parents=True)
        with pa.ipc.new_stream(str(folder / split / "data-00000-of-00001.arrow"), table.schema) as writer:
            writer.write_table(table)
        (folder / split / "state.json").write_text("{}")
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    return folder


@pytest.mark.parametrize("scheme", ["", "file://"], ids=["path", "uri"])
def test_of_a_saved_data_set_with_several_splits_one_is_used(tmp_path: Path, scheme: str) -> None:
    path = f"{scheme}{save_splits(tmp_path / 'saved', ['train', 'test', 'training'])}"
    noticed: list[str] = []
    (train,) = find_files(SourceConfig(path=path, weight=1), tmp_path, noticed.append)
    assert train.path.endswith("saved/train/data-00000-of-00001.arrow")
    assert len(noticed) == 1 and "of the splits test, train, training, train is used" in noticed[0]
    (test,) = find_files(SourceConfig(path=path, weight=1, split="test"), tmp_path, noticed.append)
    assert test.path.endswith("saved/test/data-00000-of-00001.arrow")
    with pytest.raises(DataError, match="saved: has no split dev; its splits: test, train, training"):
        find_files(SourceConfig(path=path, weight=1, split="dev"), tmp_path, noticed.append)
    assert len(find_files(SourceConfig(path=f"{path}/*/*.arrow", weight=1), tmp_path, noticed.append)) == 3
