"""Files, folders, globs and URIs name the same files."""

from __future__ import annotations

from pathlib import Path

import pytest

from savant_ray.data.sources import SourceFile, expand
from savant_ray.errors import DataError

NAMES = [
    "a.jsonl",
    "b.jsonl.gz",
    "notes.txt",
    ".hidden.jsonl",
    ".deep/hidden.jsonl",
    "deep/c.json",
    "deep/deeper/d.jsonl.zst",
    "e[1].jsonl",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in NAMES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "x"}\n')
    return tmp_path


@pytest.mark.parametrize("scheme", ["", "file://"], ids=["path", "uri"])
@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.jsonl", ["a.jsonl"]),
        ("notes.txt", ["notes.txt"]),
        ("", ["a.jsonl", "b.jsonl.gz", "deep/c.json", "deep/deeper/d.jsonl.zst", "e[1].jsonl"]),
        ("*.jsonl", ["a.jsonl", "e[1].jsonl"]),
        ("[ab].*", ["a.jsonl", "b.jsonl.gz"]),
        ("[!a]*.gz", ["b.jsonl.gz"]),
        ("**/*.json", ["deep/c.json"]),
        ("deep/**/*.zst", ["deep/deeper/d.jsonl.zst"]),
        ("*/c.json", ["deep/c.json"]),
    ],
)
def test_a_pattern_names_its_files(folder: Path, scheme: str, pattern: str, expected: list[str]) -> None:
    found = [file.path.removeprefix(f"{folder}/") for file in expand(f"{scheme}{folder}/{pattern}")]
    assert found == expected


def test_a_local_name_may_look_like_a_pattern(folder: Path) -> None:
    assert [Path(file.path).name for file in expand(str(folder / "e[1].jsonl"))] == ["e[1].jsonl"]
    assert [Path(file.path).name for file in expand(str(folder / "?.jsonl"))] == ["a.jsonl"]


def test_the_options_of_a_uri_stay_with_its_files() -> None:
    file = SourceFile("s3://bucket/a.jsonl.gz", 1, 0, "?region=eu-central-1&scheme=http")
    filesystem, path = file.resolve()
    assert (filesystem.type_name, filesystem.region, path) == ("s3", "eu-central-1", "bucket/a.jsonl.gz")
    assert file.codec == "gzip"


def test_several_patterns_name_each_file_once(folder: Path) -> None:
    files = expand([str(folder / "a.jsonl"), str(folder / "*.jsonl")])
    assert [Path(file.path).name for file in files] == ["a.jsonl", "e[1].jsonl"]
    assert files[0].size == 14
    assert files[0].mtime_ns == (folder / "a.jsonl").stat().st_mtime_ns


def test_a_relative_path_becomes_absolute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert expand("deep/*.json")[0].path == str(folder / "deep/c.json")


@pytest.mark.parametrize("pattern", ["missing.jsonl", "missing/*.jsonl", "*.parquet", "deep/deeper/x"])
def test_what_is_not_there_is_named(folder: Path, pattern: str) -> None:
    with pytest.raises(DataError, match=r"no such (file or folder|match)") as error:
        expand(str(folder / pattern))
    assert str(folder / pattern) in str(error.value)


def test_a_folder_without_jsonl_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the folder holds no \.jsonl"):
        expand(str(tmp_path))
