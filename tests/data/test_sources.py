"""Listing of source files by paths, folders, globs and URIs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from savant_ray.data.sources import SourceFile, expand, relative_paths
from savant_ray.errors import DataError, SavantError

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
def test_a_pattern_selects_its_files(folder: Path, scheme: str, pattern: str, expected: list[str]) -> None:
    found = [file.path.removeprefix(f"{folder}/") for file in expand(f"{scheme}{folder}/{pattern}")]
    assert found == expected


def test_an_existing_file_whose_name_is_a_pattern_is_selected_literally(folder: Path) -> None:
    assert [Path(file.path).name for file in expand(str(folder / "e[1].jsonl"))] == ["e[1].jsonl"]
    assert [Path(file.path).name for file in expand(str(folder / "?.jsonl"))] == ["a.jsonl"]


def test_a_file_keeps_the_options_of_its_uri() -> None:
    file = SourceFile("s3://bucket/a.jsonl.gz", 1, 0, "?region=eu-central-1&scheme=http")
    filesystem, path = file.resolve()
    assert (filesystem.type_name, filesystem.region, path) == ("s3", "eu-central-1", "bucket/a.jsonl.gz")


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["/data/text/a.jsonl", "/data/text/b/c.jsonl"], ["a.jsonl", "b/c.jsonl"]),
        (["/data/text/a.jsonl", "/data/text2/a.jsonl"], ["text/a.jsonl", "text2/a.jsonl"]),
        (["/a.jsonl"], ["a.jsonl"]),
        (["s3://bucket/a.jsonl"], ["a.jsonl"]),
        (["s3://bucket/text/a.jsonl", "s3://bucket/text/b/c.jsonl"], ["a.jsonl", "b/c.jsonl"]),
        (["s3://one/a.jsonl", "s3://two/a.jsonl"], ["one/a.jsonl", "two/a.jsonl"]),
        (["gs://one/a.jsonl", "s3://two/a.jsonl"], ["gs://one/a.jsonl", "s3://two/a.jsonl"]),
        (["/data/a.jsonl", "s3://two/a.jsonl"], ["/data/a.jsonl", "s3://two/a.jsonl"]),
    ],
)
def test_files_are_named_relative_to_the_folder_that_all_are_in(paths: list[str], expected: list[str]) -> None:
    assert relative_paths([SourceFile(path, 1, 0) for path in paths]) == expected


def test_a_file_that_matches_several_patterns_is_returned_once(folder: Path) -> None:
    files = expand([str(folder / "a.jsonl"), str(folder / "*.jsonl")])
    assert [Path(file.path).name for file in files] == ["a.jsonl", "e[1].jsonl"]
    assert files[0].size == 14
    assert files[0].mtime_ns == (folder / "a.jsonl").stat().st_mtime_ns


def test_a_relative_path_becomes_absolute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert expand("deep/*.json")[0].path == str(folder / "deep/c.json")


@pytest.mark.parametrize("pattern", ["missing.jsonl", "missing/*.jsonl", "*.parquet", "deep/deeper/x"])
def test_a_missing_file_or_folder_is_reported_by_name(folder: Path, pattern: str) -> None:
    with pytest.raises(DataError, match=r"no such (file or folder|match)") as error:
        expand(str(folder / pattern))
    assert str(folder / pattern) in str(error.value)


def test_a_folder_without_jsonl_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the folder contains no \.jsonl"):
        expand(str(tmp_path))


def names(files: list[SourceFile], folder: Path) -> list[str]:
    return [os.path.relpath(file.path, folder) for file in files]


def write(path: Path, content: bytes = b'{"text": "x"}\n') -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("[2024-01]/*.jsonl", "[2024-01]/x.jsonl"),
        ("[2024-01]", "[2024-01]/x.jsonl"),
        ("**/[2024-01]/*", "[2024-01]/x.jsonl"),
        ("[2024-0/**/*.jsonl", "[2024-0/deep/er/x.jsonl"),
        ("[2024-0/**.jsonl", "[2024-0/deep/er/x.jsonl"),
        ("a b#c?%20/*", "a b#c?%20/x.jsonl"),
        ("./{a}/", "{a}/x.jsonl"),
        ("link/../up.jsonl", "[2024-0/up.jsonl"),  # behind the link, as for the shell
        ("file:{folder}/a%20b%23c%3F%2520/x.jsonl", "a b#c?%20/x.jsonl"),
        ("FILE://localhost{folder}/a%20b%23c%3F%2520/*", "a b#c?%20/x.jsonl"),
        ("UP/X.JSONL", "UP/X.JSONL"),
        ("UP", "UP/X.JSONL"),
    ],
)
def test_a_file_with_an_unusual_name_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, expected: str
) -> None:
    for name in ("[2024-01]", "[2024-0/deep/er", "a b#c?%20", "{a}"):
        write(tmp_path / name / "x.jsonl")
    write(tmp_path / "[2024-0/up.jsonl")
    write(tmp_path / "UP/X.JSONL")
    (tmp_path / "link").symlink_to("[2024-0/deep")
    monkeypatch.chdir(tmp_path)
    warned: list[str] = []
    found = names(expand(pattern.replace("{folder}", str(tmp_path)), warned.append), tmp_path)
    assert expected in found and len(found) == 1 + pattern.startswith("[2024-0/**") and not warned


def test_a_folder_with_cyclic_links_is_read_once(tmp_path: Path) -> None:
    write(tmp_path / "a/x.jsonl")
    (tmp_path / "b").mkdir()
    for name, target in {"current": ".", "again": ".", "more": ".", "a/to_b": "../b", "b/to_a": "../a"}.items():
        (tmp_path / name).symlink_to(target)
    (tmp_path / "a/itself").symlink_to("itself")
    for pattern in ("", "**/*.jsonl", "**"):
        assert names(expand(str(tmp_path / pattern), lambda _: None), tmp_path) == ["a/x.jsonl"]


def test_a_linked_file_is_read_once_and_skipped_entries_are_reported(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl")
    (tmp_path / "link.jsonl").symlink_to("x.jsonl")
    (tmp_path / "broken.jsonl").symlink_to("../gone.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    write(Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xe9sum.jsonl")))
    warned: list[str] = []
    assert names(expand(str(tmp_path), warned.append), tmp_path) == ["x.jsonl"]
    assert sorted(line.removeprefix(f"{tmp_path}/") for line in warned) == [
        "broken.jsonl: a broken link to ../gone.jsonl; skipped",
        f"link.jsonl: a link to {tmp_path}/x.jsonl, which is already included; skipped",
        "pipe.jsonl: is a pipe, not a file; skipped",
        r"r\xe9sum.jsonl: its name is not UTF-8; rename it; skipped",
    ]
    assert names(expand(str(tmp_path / "link.jsonl"), warned.append), tmp_path) == ["link.jsonl"]


def test_a_thousand_broken_links_give_a_few_messages(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl")
    for number in range(1_000):
        (tmp_path / f"{number}.jsonl").symlink_to("gone")
    warned: list[str] = []
    assert len(expand(str(tmp_path), warned.append)) == 1
    assert len(warned) == 6 and warned[-1] == "… and 995 more like this"


def test_the_name_of_a_data_set_that_is_no_path_is_refused_with_its_uri(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for pattern in ("owner/name", f"{tmp_path}/owner/name"):  # as the settings have it after paths were made absolute
        with pytest.raises(DataError, match=r"; a data set of the Hugging Face Hub is hf://datasets/owner/name$"):
            expand(pattern)
    for pattern in ("../name", "/owner/name"):
        with pytest.raises(DataError, match=r"no such file or folder$"):
            expand(pattern)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("~nosuchuser/x.jsonl", "there is no user nosuchuser"),
        ("a\0b", "NUL"),
        ("file:///a%00b", "NUL"),
        ("file://host/x.jsonl", "file:///absolute/path"),
        ("file:x.jsonl", "file:///absolute/path"),
        ("r\udce9sum/x.jsonl", r"r\xe9sum/x.jsonl: this name is not UTF-8"),
        ("x" * 300, "File name too long"),
        ("x/" * 5_000, "File name too long"),
        ("x.jsonl/y.jsonl", "no such file or folder"),
        ("roneneldan/TinyStories", "; a data set of the Hugging Face Hub is hf://datasets/roneneldan/TinyStories"),
        ("broken.jsonl", "a broken link to gone"),
        ("itself.jsonl", "a link that leads back to itself"),
        ("/dev/zero", "is a device, not a file"),
        ("/dev/stdin", "not the same file in every process"),
        ("pipe", "is a pipe, not a file"),
        ("folders/*", "matches only folders"),
        ("{a,b}.jsonl", "use a list of two patterns"),
        ("C:\\data\\x.jsonl", "separated by /"),
        ("[z-a", "no such match"),
        ("", "no file, folder, glob or URI is given"),
        ([], "no file, folder, glob or URI is given"),
        ("foo://x/y", "the file system cannot be used"),
        ("HTTPS://huggingface.co/a/b", "web addresses are not read; download the file, or name a data set"),
        ("s3://b/[x?no-option", "the file system cannot be used"),
        ("S3://b/a b\n", "control characters"),
        ("hdfs://[/", "the file system cannot be used"),
    ],
)
def test_a_pattern_that_cannot_be_read_gives_a_one_line_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str | list[str], reason: str
) -> None:
    write(tmp_path / "x.jsonl")
    write(tmp_path / "folders/a/x.jsonl")
    (tmp_path / "broken.jsonl").symlink_to("gone")
    (tmp_path / "itself.jsonl").symlink_to("itself.jsonl")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as error:
        expand(pattern)
    assert reason in str(error.value) and str(error.value).isprintable() and len(str(error.value)) < 1_000


def test_a_deleted_working_directory_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SavantError, match="the working directory does not exist any more"):
        expand("x.jsonl")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can take on another user's rights")
def test_missing_read_permission_is_reported(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents):
        if not folder.stat().st_mode & 0o001:
            folder.chmod(0o755)
    write(tmp_path / "x.jsonl")
    write(tmp_path / "lost+found/y.jsonl").parent.chmod(0)
    write(tmp_path / "files/z.jsonl").chmod(0)
    warned: list[str] = []
    expand(str(tmp_path / "x.jsonl"))  # imports what the other user may not
    os.seteuid(65534)
    try:
        for name in ("lost+found", "lost+found/y.jsonl", "lost+found/*.jsonl", "files/z.jsonl", "files"):
            with pytest.raises(DataError, match="Permission denied"):
                expand(str(tmp_path / name))
        assert names(expand(str(tmp_path / "[!f]*"), warned.append), tmp_path) == ["x.jsonl"]
    finally:
        os.seteuid(0)
