"""Data sets of the Hugging Face Hub, from a small copy of it on the loopback interface."""

from __future__ import annotations

from pathlib import Path

import pytest

from savant_ray.data.hub import HubDataset, download, files_of_split
from savant_ray.errors import DataError
from tests.data.hub_on_loopback import COPY, MAIN, OLD, Hub


def fetch(uri: str, cache_dir: Path, split: str = "train", notices: list[str] | None = None) -> list[bytes]:
    """Return the contents of the files of a data set."""
    dataset = HubDataset.parse(uri)
    assert dataset is not None
    notify = (notices if notices is not None else []).append
    return [path.read_bytes() for path in download(dataset, [split], cache_dir, notify, lambda done, total: None)]


@pytest.mark.parametrize(
    ("uri", "dataset"),
    [
        ("hf://datasets/owner/name", HubDataset("owner/name")),
        ("hf://datasets/owner/name/", HubDataset("owner/name")),
        ("hf://datasets/owner/name/20231101.en", HubDataset("owner/name", "20231101.en")),
        ("hf://datasets/owner/name@v1.0", HubDataset("owner/name", None, "v1.0")),
        ("hf://datasets/owner/name/stories@v1.0", HubDataset("owner/name", "stories", "v1.0")),
        ("hf://datasets/owner/name@v1.0/stories", HubDataset("owner/name", "stories", "v1.0")),
        ("hf://datasets/owner/name@refs/pr/3", HubDataset("owner/name", None, "refs/pr/3")),
        ("hf://datasets/owner/name/train.jsonl", None),
        ("hf://datasets/owner/name/data/x.parquet", None),
        ("hf://datasets/owner/name/*", None),
        ("hf://datasets/owner", None),
        ("s3://bucket/owner/name", None),
        ("owner/name", None),
    ],
)
def test_a_uri_names_a_data_set_its_config_and_its_revision(uri: str, dataset: HubDataset | None) -> None:
    assert HubDataset.parse(uri) == dataset


CARD = """---
license: mit
configs:
- config_name: stories
  data_files:
  - split: train
    path: data/stories/train-*
  - split: test
    path: [data/stories/test-*, "extra/**/test.jsonl"]
- config_name: code
  default: true
  data_dir: code
- config_name: flat
  data_files: "*.jsonl"
---
# A data set
"""
STORIES = ["data/stories/train-00000-of-00002.parquet", "data/stories/train-00001-of-00002.parquet"]
NAMES = [
    *STORIES,
    "data/stories/test-00000-of-00001.parquet",
    "extra/a/b/test.jsonl",
    "code/train/0000.parquet",
    "code/validation/0000.parquet",
    "all.jsonl",
    "README.md",
    ".cache/train.parquet",
]


@pytest.mark.parametrize(
    ("names", "card", "config", "split", "files"),
    [
        (NAMES, CARD, "stories", "train", STORIES),
        (NAMES, CARD, "stories", "test", ["data/stories/test-00000-of-00001.parquet", "extra/a/b/test.jsonl"]),
        (NAMES, CARD, None, "validation", ["code/validation/0000.parquet"]),
        (NAMES, CARD, "flat", "train", ["all.jsonl"]),
        (["data/train-00000-of-00001.parquet"], "", None, "train", ["data/train-00000-of-00001.parquet"]),
        (["train.csv", "test.csv"], "", "default", "test", ["test.csv"]),
        (["code/train/0000.parquet", "text/train/0000.parquet"], "", "text", "train", ["text/train/0000.parquet"]),
        (["default/partial-train/0000.parquet"], "", None, "train", ["default/partial-train/0000.parquet"]),
        (["data/train_sft-00000-of-00003.parquet"], "", None, "train_sft", ["data/train_sft-00000-of-00003.parquet"]),
        (["tiny_codes.jsonl", "README.md"], "no front matter", None, "train", ["tiny_codes.jsonl"]),
        (["a.jsonl", "train.parquet"], "---\n[\n---", None, "train", ["train.parquet"]),
        (NAMES, "---\nconfigs: 3\n---", "stories", "train", STORIES),
    ],
)
def test_the_files_of_a_split_come_from_the_card_or_from_the_names(
    names: list[str], card: str, config: str | None, split: str, files: list[str]
) -> None:
    assert files_of_split(names, card, config, [split]).files == files


def test_without_a_default_config_the_configs_are_listed() -> None:
    names = ["code/train/0000.parquet", "text/test/0000.parquet"]
    found = files_of_split(names, "", None, ["train"])
    assert not found.files and found.available == ["code (train)", "text (test)"]


def test_the_files_of_a_split_are_downloaded_once_for_each_commit(hub: Hub, tmp_path: Path) -> None:
    assert fetch("hf://datasets/owner/name", tmp_path) == [b"one", b"two"]
    requests = len(hub.downloaded)
    assert fetch("hf://datasets/owner/name", tmp_path) == [b"one", b"two"]
    assert len(hub.downloaded) == requests, "nothing was requested again"
    assert fetch("hf://datasets/owner/name@v1.0", tmp_path) == [b"old"]
    assert fetch(f"hf://datasets/owner/name@{OLD}", tmp_path) == [b"old"]


def test_a_new_commit_of_the_branch_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    assert fetch("hf://datasets/owner/name", tmp_path) == [b"one", b"two"]
    hub.commits["d" * 40] = {"data/train-00000-of-00001.parquet": b"new"}
    hub.refs["main"] = "d" * 40
    assert fetch("hf://datasets/owner/name", tmp_path) == [b"new"]


def test_the_parquet_copy_of_the_hub_is_used_for_files_of_an_unknown_format(hub: Hub, tmp_path: Path) -> None:
    hub.commits |= {MAIN: {"archive.rar": b"?"}, COPY: {"default/train/0000.parquet": b"copy"}}
    hub.refs["refs/convert/parquet"] = COPY
    assert fetch("hf://datasets/owner/name", tmp_path) == [b"copy"]


def test_without_a_network_an_earlier_download_is_used(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch("hf://datasets/owner/name", tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    notices: list[str] = []
    assert fetch("hf://datasets/owner/name", tmp_path, notices=notices) == [b"one", b"two"]
    assert "cannot be reached" in notices[0]
    assert MAIN[:12] in notices[0]
    with pytest.raises(DataError, match=r"^hf://datasets/owner/name: cannot be downloaded .*without a network"):
        fetch("hf://datasets/owner/name@v1.0", tmp_path)


@pytest.mark.parametrize(
    ("uri", "split", "message"),
    [
        ("hf://datasets/owner/other", "train", "hf://datasets/owner/other: does not exist, or is private"),
        ("hf://datasets/owner/name@v9", "train", "hf://datasets/owner/name: has no revision v9"),
        ("hf://datasets/owner/name", "test", "has no default config with a split test; .*: default \\(train\\)"),
        ("hf://datasets/owner/name/french", "train", "has no config french with a split train"),
        ("hf://datasets/own er/na--me", "train", "is not the name of a data set"),
    ],
)
def test_what_the_hub_does_not_have_is_named(hub: Hub, tmp_path: Path, uri: str, split: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        fetch(uri, tmp_path, split)


@pytest.mark.parametrize(("status", "message"), [(403, "access has to be requested"), (500, "cannot be downloaded")])
def test_refused_access_and_a_broken_hub_are_explained(hub: Hub, tmp_path: Path, status: int, message: str) -> None:
    hub.status = status
    with pytest.raises(DataError, match=message):
        fetch("hf://datasets/owner/name", tmp_path)
