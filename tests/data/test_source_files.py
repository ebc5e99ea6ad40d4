"""From the settings of a source to its files."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from savant_ray.config import HeldOutConfig, SourceConfig
from savant_ray.data.documents import DocumentRule
from savant_ray.data.record_reader import documents
from savant_ray.data.source_files import find_files
from savant_ray.errors import DataError
from savant_ray.reporting import RunReport
from savant_ray.reporting.console import PlainConsole
from tests.data.hub_on_loopback import MAIN, Hub


def parquet(*texts: str) -> bytes:
    """Return a Parquet file with these texts."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": list(texts)}), sink)
    return sink.getvalue().to_pybytes()


def texts_of(source: SourceConfig | HeldOutConfig, cache_dir: Path) -> list[str]:
    """Return the documents of a source."""
    files = find_files(source, cache_dir, lambda message: None)
    return [document.text for document in documents(files, rule=DocumentRule())]


def test_a_source_can_be_a_data_set_of_the_hub(hub: Hub, tmp_path: Path) -> None:
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


def test_a_source_that_the_hub_does_not_have_is_an_error(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="^hf://datasets/owner/other: does not exist"):
        texts_of(SourceConfig(path="hf://datasets/owner/other", weight=1), tmp_path)


@pytest.mark.parametrize("path", [".", "**/*", "**/*.txt", "*/*.txt"])
def test_what_a_run_has_written_into_the_folder_of_the_text_is_not_read_as_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path, ["books/one.txt", "books/two.txt", "cache/tokenizer-1.json", "cache/hub/notes.txt"])
    with RunReport(tmp_path / "run", console=PlainConsole(None)) as report:
        report.notify("started")
    write_files(tmp_path / "run/step_5", ["records.jsonl", "notes.txt"])
    noticed: list[str] = []
    files = find_files(SourceConfig(path=path, weight=1), tmp_path / "cache", noticed.append)
    assert [Path(file.path).name for file in files] == ["one.txt", "two.txt"] and not noticed
    (named,) = find_files(SourceConfig(path="run/step_*/*.jsonl", weight=1), tmp_path / "cache", noticed.append)
    assert Path(named.path).name == "records.jsonl"


def test_a_folder_of_text_that_is_the_cache_folder_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path, ["one.jsonl"])
    with pytest.raises(DataError, match=r"is data\.cache_dir.*keep the text in another folder"):
        find_files(SourceConfig(path=f"{tmp_path}/", weight=1), tmp_path, notify=print)
    (file,) = find_files(SourceConfig(path=f"{tmp_path}/*.jsonl", weight=1), tmp_path, notify=print)
    assert Path(file.path).name == "one.jsonl"


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


CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: [a.jsonl, "more/*.jsonl"]
  - split: held_out
    path: b.jsonl
---
"""
CLONE = ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl"]


@pytest.mark.parametrize("scheme", ["", "file://"], ids=["path", "uri"])
@pytest.mark.parametrize(
    ("names", "split", "used"),
    [
        (CLONE, "train", CLONE[:2]),
        (CLONE, "test", CLONE[2:]),
        (["train.jsonl", "validation.jsonl", "books.jsonl"], "train", ["books.jsonl", "train.jsonl"]),
        (["orca_train.jsonl", "orca_test.jsonl"], "train", ["orca_train.jsonl"]),
        (["en/Train.jsonl", "de/train.jsonl", "en/Dev.jsonl"], "train", ["de/train.jsonl", "en/Train.jsonl"]),
        (["train/0.jsonl", "val/0.jsonl", "test/0.jsonl"], "validation", ["val/0.jsonl"]),
        (["training.jsonl", "test.jsonl"], "train", ["training.jsonl"]),
        (
            ["train_sft-0.jsonl", "train_gen-0.jsonl", "test_sft-0.jsonl"],
            "train",
            ["train_gen-0.jsonl", "train_sft-0.jsonl"],
        ),
        (["train_sft-0.jsonl", "train_gen-0.jsonl", "test_sft-0.jsonl"], "train_gen", ["train_gen-0.jsonl"]),
        (["a.jsonl", "b.jsonl", "more/c.jsonl", "README.md"], "train", ["a.jsonl", "more/c.jsonl"]),
        (["a.jsonl", "b.jsonl", "more/c.jsonl", "README.md"], "held_out", ["b.jsonl"]),
    ],
)
def test_of_a_folder_with_several_splits_one_is_used_and_named(
    tmp_path: Path, scheme: str, names: list[str], split: str, used: list[str]
) -> None:
    folder = write_files(tmp_path / "clone", names)
    noticed: list[str] = []
    files = find_files(SourceConfig(path=f"{scheme}{folder}", weight=1, split=split), tmp_path, noticed.append)
    assert [file.path.partition("/clone/")[2] for file in files] == used
    assert len(noticed) == 1 and "clone: of the splits" in noticed[0] and "used (see split)" in noticed[0]


@pytest.mark.parametrize("scheme", ["", "file://"], ids=["path", "uri"])
@pytest.mark.parametrize(
    ("names", "training", "validation"),
    [
        (["train.jsonl", "validation.jsonl", "test.jsonl"], ["train.jsonl"], ["validation.jsonl"]),
        (["train.jsonl", "dev.jsonl", "test.jsonl"], ["train.jsonl"], ["dev.jsonl"]),
        (CLONE, CLONE[:2], CLONE[2:]),
        (["a.jsonl", "b.jsonl", "valid.jsonl"], ["a.jsonl", "b.jsonl"], ["valid.jsonl"]),
    ],
)
def test_a_folder_can_be_the_source_and_the_validation_text(
    tmp_path: Path, scheme: str, names: list[str], training: list[str], validation: list[str]
) -> None:
    folder = f"{scheme}{write_files(tmp_path / 'clone', names)}"
    noticed: list[str] = []
    for settings, used in ((SourceConfig(path=folder, weight=1), training), (HeldOutConfig(path=folder), validation)):
        files = find_files(settings, tmp_path, noticed.append)
        assert [file.path.partition("/clone/")[2] for file in files] == used
    assert "train is used" in noticed[0] and "train is used" not in noticed[1]


def test_the_validation_split_of_a_saved_data_set_and_of_one_of_the_hub_is_used(hub: Hub, tmp_path: Path) -> None:
    saved = save_splits(tmp_path / "saved", ["train", "validation"])
    (file,) = find_files(HeldOutConfig(path=str(saved)), tmp_path, lambda message: None)
    assert file.path.endswith("saved/validation/data-00000-of-00001.arrow")
    names = ("data/train.parquet", "data/test.parquet", "data/val.parquet")
    hub.commits[MAIN] = {name: parquet(name) for name in names}
    on_hub = HeldOutConfig(path="hf://datasets/owner/name")
    noticed: list[str] = []
    find_files(on_hub, tmp_path, noticed.append)
    assert noticed == ["owner/name: of the splits test, train, val, val is used (see split)"]
    assert texts_of(on_hub, tmp_path) == ["data/val.parquet"]
    assert texts_of(on_hub.model_copy(update={"split": "train"}), tmp_path) == ["data/train.parquet"]


def test_splits_are_found_whatever_the_case_of_their_names(tmp_path: Path) -> None:
    saved = save_splits(tmp_path / "saved", ["Train", "Test"])
    for split, folder in (("train", "Train"), ("test", "Test"), ("Test", "Test")):
        (file,) = find_files(SourceConfig(path=str(saved), weight=1, split=split), tmp_path, lambda message: None)
        assert f"saved/{folder}/" in file.path


@pytest.mark.parametrize("names", [["train.jsonl"], ["a.jsonl"], ["test.jsonl"], ["train-0.jsonl", "extra.jsonl"]])
def test_validation_text_that_has_no_validation_split_is_used(tmp_path: Path, names: list[str]) -> None:
    folder = write_files(tmp_path / "clone", names)
    assert len(find_files(HeldOutConfig(path=str(folder)), tmp_path, lambda message: None)) == len(names)


@pytest.mark.parametrize(
    "names", [["a.jsonl", "b.jsonl"], ["test-0.jsonl", "test-1.jsonl"], ["train/a.jsonl", "b.jsonl"], ["latest.jsonl"]]
)
def test_a_folder_without_several_splits_is_used_completely(tmp_path: Path, names: list[str]) -> None:
    folder = write_files(tmp_path / "clone", names)
    noticed: list[str] = []
    assert len(find_files(SourceConfig(path=str(folder), weight=1), tmp_path, noticed.append)) == len(names)
    assert not noticed


def test_a_split_that_a_folder_does_not_have_is_an_error_with_its_splits(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "clone", CLONE[:1])
    with pytest.raises(DataError, match="clone: has no split validation; its splits: train"):
        find_files(SourceConfig(path=str(folder), weight=1, split="validation"), tmp_path, lambda message: None)
    only_tests = write_files(tmp_path / "tests", ["test.jsonl", "dev.jsonl"])
    with pytest.raises(DataError, match="tests: has no split train; its splits: dev, test"):
        find_files(SourceConfig(path=str(only_tests), weight=1), tmp_path, lambda message: None)


@pytest.mark.parametrize("scheme", ["", "file://"], ids=["path", "uri"])
def test_a_glob_takes_all_splits_that_it_matches_with_a_warning(tmp_path: Path, scheme: str) -> None:
    folder = write_files(tmp_path / "clone", CLONE)
    noticed: list[str] = []
    assert len(find_files(SourceConfig(path=f"{scheme}{folder}/data/*", weight=1), tmp_path, noticed.append)) == 3
    assert len(noticed) == 1 and "matches the splits test, train; all are used" in noticed[0]


def write_files(folder: Path, names: list[str]) -> Path:
    """Write a document into each file, and the card into the README."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(CARD if name == "README.md" else json.dumps({"text": name}) + "\n")
    return folder
