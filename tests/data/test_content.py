"""Content hashes of source files, detection of changed files and formats, and exclusion of held-out files."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import pickle
import time
from pathlib import Path

import pyarrow as pa
import pytest

from savant_ray.data.content import HASHES, content_hashes, refuse_changed
from savant_ray.data.overlap import split_held_out
from savant_ray.data.record_reader import documents
from savant_ray.data.sources import expand, refuse_empty
from savant_ray.errors import DataError

TEXTS = ["first", "second", "déjà 漢字"]
PLAIN = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS).encode()


def age(path: Path) -> None:
    """Wait until the file is older than `SETTLED_SECONDS`."""
    while time.time() - path.stat().st_ctime < 2.1:
        time.sleep(0.1)


def test_of_a_growing_file_the_same_bytes_are_hashed_and_read(tmp_path: Path) -> None:
    path = tmp_path / "grows.jsonl"
    path.write_bytes(PLAIN)
    (tmp_path / "whole.jsonl").write_bytes(PLAIN[:-1])
    listed = expand(str(path))
    with path.open("ab") as file:
        file.write(b'{"text": "more"}\n')
    hashes = content_hashes(listed, tmp_path / "cache")
    assert [document.text for document in documents(listed)] == TEXTS
    refuse_changed(listed, hashes)
    assert [document.text for document in documents(expand(str(path)))] == [*TEXTS, "more"]
    assert hashes != content_hashes(expand(str(path)), tmp_path / "cache")


def test_of_a_growing_file_nothing_is_read_beyond_its_size_at_listing(tmp_path: Path) -> None:
    path = tmp_path / "grows.jsonl"
    path.write_bytes(PLAIN[:20])
    listed = expand(str(path))
    path.write_bytes(PLAIN)
    assert [document.text for document in documents(listed)] == ["first"]


@pytest.mark.parametrize("change", ["cut", "rewrite", "replace", "remove"])
def test_a_file_that_was_changed_while_it_was_read_is_refused(tmp_path: Path, change: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(PLAIN)
    listed = expand(str(path))
    hashes = content_hashes(listed, tmp_path / "cache")
    match change:
        case "cut":
            path.write_bytes(PLAIN[:-5])
        case "rewrite":
            path.write_bytes(PLAIN.replace(b"first", b"other"))
        case "replace":
            (tmp_path / "new").write_bytes(PLAIN.replace(b"first", b"other"))
            (tmp_path / "new").replace(path)
        case "remove":
            path.unlink()
    with pytest.raises(DataError, match=r"x\.jsonl: was changed while it was read"):
        refuse_changed(listed, hashes)
    if change == "cut":
        with pytest.raises(DataError, match=r"has 58 of the 63 bytes it had when it was listed"):
            content_hashes(listed, tmp_path / "other")


@pytest.mark.parametrize("settled", [False, True])
def test_a_change_that_keeps_size_and_modification_time_is_detected(tmp_path: Path, settled: bool) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(PLAIN)
    before = path.stat()
    if settled:
        age(path)
    first = content_hashes(expand(str(path)), tmp_path / "cache")
    assert (tmp_path / "cache" / HASHES).exists() == settled, "what has just been written may change unnoticed"
    path.write_bytes(PLAIN.replace(b"first", b"other"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size and path.stat().st_mtime_ns == before.st_mtime_ns
    assert content_hashes(expand(str(path)), tmp_path / "cache") != first


def test_a_file_that_did_not_change_is_not_read_again(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(PLAIN)
    age(path)
    files = expand(str(path))
    first = content_hashes(files, tmp_path / "cache")
    path.unlink()
    assert content_hashes(files, tmp_path / "cache") == first


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("gzip.jsonl", gzip.compress(PLAIN, mtime=0)),
        ("plain.jsonl.gz", PLAIN),
        ("upper.JSONL.GZ", gzip.compress(PLAIN, mtime=0)),
        ("zstd.json", pa.compress(PLAIN, "zstd", asbytes=True)),
        ("gzip.jsonl.zst", gzip.compress(PLAIN, mtime=0)),
        ("x.jsonl.bz2", bz2.compress(PLAIN)),
        ("xz.jsonl", lzma.compress(PLAIN)),
        ("x.jsonl.xz", lzma.compress(PLAIN[:70]) + lzma.compress(PLAIN[70:])),
        ("lines.txt", PLAIN),
        ("lines.parquet", PLAIN),
        ("utf16.jsonl", PLAIN.decode().encode("utf-16")),
        ("utf16le.jsonl", PLAIN.decode().encode("utf-16-le")),
        ("utf16be.jsonl", PLAIN.decode().encode("utf-16-be")),
        ("utf32.jsonl", PLAIN.decode().encode("utf-32")),
        ("bom.jsonl", b"\xef\xbb\xbf" + PLAIN),
        ("no suffix", gzip.compress(PLAIN, mtime=0)),
    ],
)
def test_a_file_is_read_in_its_actual_format_whatever_its_name(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    files = expand(str(tmp_path / name))
    content_hashes(files, tmp_path / "cache")
    assert [document.text for document in documents(files)] == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("x.jsonl", b"PK\x03\x04....", "is a zip archive"),
        ("x.jsonl.gz", gzip.compress(b"PAR1...."), "is gzip-compressed, but contains a Parquet file; decompress it"),
        ("xlsx.csv", b"PK\x03\x04....", "export a document as text and a spreadsheet as CSV"),
        ("xls.csv", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "is an old Office file"),
        ("pickle.jsonl", pickle.dumps({"text": "a" * 9}), "is a Python pickle"),
        ("x.feather", b"FEA1....", "is a Feather file of version 1"),
        (
            "x.jsonl.gz",
            gzip.compress(lzma.compress(PLAIN)),
            r"is compressed twice \(gzip, then xz\); decompress it once",
        ),
        ("x.jsonl", b"%PDF-1.4", "is a PDF"),
        ("x.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("x.jsonl", b"<!DOCTYPE html>", "is a web page"),
        ("x.jsonl", b"\n<!doctype html>\n", "is a web page"),
        ("x.jsonl.gz", b"\x00\x01\x02", "is named .gz, but is neither gzip nor JSON lines"),
    ],
)
def test_an_unsupported_format_is_named_in_the_error(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / "good.jsonl").write_bytes(PLAIN)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason) as error:
        expand(str(tmp_path))
    assert str(error.value).startswith(f"{tmp_path / name}: ") and str(error.value).isprintable()


def test_invalid_utf16_is_reported_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(PLAIN.decode().encode("utf-16") + b"\x00\xd8")
    with pytest.raises(DataError, match=r"x\.jsonl: not valid utf-16"):
        [document.text for document in documents(expand(str(path)))]


def test_a_source_is_refused_as_empty_only_if_all_its_files_are_empty(tmp_path: Path) -> None:
    for number in range(1_500):
        (tmp_path / f"{number}.jsonl").touch()
    with pytest.raises(DataError, match="is empty, as are all 1,500 files"):
        refuse_empty(expand(str(tmp_path)))
    (tmp_path / "7.jsonl").write_bytes(PLAIN)
    refuse_empty(expand(str(tmp_path)))


def test_held_out_files_are_identified_by_their_content(tmp_path: Path) -> None:
    for name, content in {
        "val.jsonl": PLAIN,
        "data/copy.jsonl": PLAIN,
        "data/same_size.jsonl": PLAIN.replace(b"first", b"other"),
        "data/empty.jsonl": b"",
        "empty_val.jsonl": b"",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "data/link.jsonl").symlink_to("../val.jsonl")
    held_out = expand([str(tmp_path / "val.jsonl"), str(tmp_path / "empty_val.jsonl")])
    kept, left_out = split_held_out(expand(str(tmp_path / "data")), held_out, tmp_path / "cache")
    assert [Path(file.path).name for file in kept] == ["empty.jsonl", "same_size.jsonl"]
    assert [Path(file.path).name for file in left_out] == ["copy.jsonl", "link.jsonl"]
