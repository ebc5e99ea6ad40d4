"""What is reported of a token cache, and which of its files are damaged, without Ray."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import pytest

from savant_ray.data.cache_builder import empty_file_report, refuse_without_documents, train_or_load_tokenizer
from savant_ray.data.documents import Document, DocumentRule
from savant_ray.data.record_reader import documents
from savant_ray.data.shard_writer import PartSummary, damaged_digests, shard_name
from savant_ray.data.sources import expand
from savant_ray.data.token_cache import FileSummary
from savant_ray.data.tokenizer import Tokenizer
from savant_ray.errors import DataError, SettingsError
from tests.data.without_ray import cache_of


def test_a_file_whose_documents_are_held_out_is_not_reported_as_empty(
    tmp_path: Path, byte_tokenizer: Tokenizer
) -> None:
    for number in range(40):
        (tmp_path / f"{number:02}.txt").write_text(f"document number {number}")
    (tmp_path / "40.txt").touch()
    files = expand(str(tmp_path))
    rule = DocumentRule(held_out=0.2)
    kept = {document.text for document in documents(files, rule=rule)}
    files_of = [
        FileSummary(f"{n:02}.txt", 1, int(f"document number {n}" in kept), 0, unit="document") for n in range(40)
    ]
    files_of += [FileSummary("40.txt", 0, 0, 0, unit="document"), FileSummary("bad.txt", 1, 0, 1, unit="document")]
    manifest = cache_of([Document(1, "any")], byte_tokenizer, 32, tmp_path / "cache").manifest
    manifest = dataclasses.replace(manifest, files=tuple(files_of))
    assert 0 < len(kept) < 40
    assert empty_file_report(manifest, has_other_split=True) == [
        "40.txt: no document in 0 documents",
        "bad.txt: no document in 1 document, 1 of them invalid",
    ]


@pytest.mark.parametrize(
    ("split", "refusal"),
    [
        ("training", "no document is outside the fraction 0.5; lower it, or name a file"),
        ("validation", "no document is in the fraction 0.5; raise it, or name a file"),
    ],
)
@pytest.mark.parametrize("unit", ["document", "block"])
def test_a_text_of_a_single_document_cannot_be_training_and_validation_text(
    tmp_path: Path, byte_tokenizer: Tokenizer, split: Literal["training", "validation"], refusal: str, unit: str
) -> None:
    manifest = cache_of([Document(1, "any")], byte_tokenizer, 32, tmp_path).manifest
    manifest = dataclasses.replace(manifest, documents=0, files=(FileSummary("book.txt", 1, 0, 0, unit=unit),))
    with pytest.raises(DataError) as error:
        refuse_without_documents(manifest, [DocumentRule(held_out=0.5, split=split)])
    advice = "; text_blocks: true makes a document of each block of lines of a text file" if unit == "document" else ""
    assert str(error.value) == f"data.validation: book.txt: {refusal}{advice}"


def test_a_tokenizer_is_trained_on_the_lines_within_the_limit(
    tmp_path: Path, write_jsonl: Callable[[str, Iterable[str]], Path]
) -> None:
    files = expand(str(write_jsonl("a.jsonl", ["one two three four " * 50])))
    sizes = [
        train_or_load_tokenizer(files, tmp_path / "cache", vocab_size=270, max_line_bytes=limit).vocab_size
        for limit in (100, 10_000)
    ]
    assert sizes[0] < sizes[1] == 270


def test_a_cache_folder_without_locks_is_named_with_advice(
    tmp_path: Path, write_jsonl: Callable[[str, Iterable[str]], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: Any) -> None:  # as on Lustre without -o flock
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    files = expand(str(write_jsonl("a.jsonl", ["a"])))
    with pytest.raises(
        SettingsError, match=r"^data.cache_dir: .* cannot be locked \(Function not implemented\); mount"
    ):
        train_or_load_tokenizer(files, tmp_path / "cache")


@pytest.mark.parametrize("size", [None, 0, 8, 17, 32])
def test_digests_that_are_missing_or_truncated_are_named_and_written_again(
    tmp_path: Path, byte_tokenizer: Tokenizer, size: int | None
) -> None:
    texts = [Document(number, f"text {number}") for number in range(1, 4)]
    cache = cache_of(texts, byte_tokenizer, 16, tmp_path)
    (digests,) = tmp_path.glob("*.documents")
    intact = digests.read_bytes()
    assert damaged_digests(tmp_path, cache.manifest) == [] and PartSummary.is_complete(tmp_path / shard_name(0))
    if size is None:
        digests.unlink()
    else:
        digests.write_bytes((intact * 2)[:size])
    (problem,) = damaged_digests(tmp_path, cache.manifest)
    assert problem.startswith(f"{digests}: ") and not PartSummary.is_complete(tmp_path / shard_name(0))
    cache = cache_of(texts, byte_tokenizer, 16, tmp_path)
    assert digests.read_bytes() == intact and damaged_digests(tmp_path, cache.manifest) == []
