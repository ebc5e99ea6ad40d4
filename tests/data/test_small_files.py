"""Small files share shards, so that not each of them leaves a row partly empty; documents keep their file and line."""

from __future__ import annotations

import gzip
import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from tokenizers import models

from savant_ray.data import cache_builder
from savant_ray.data.cache_builder import SMALL_FILE_BYTES, group_parts, plan_source_parts, prepare
from savant_ray.data.documents import DocumentRule, SourceText
from savant_ray.data.sources import expand
from savant_ray.data.token_cache import Manifest, TokenCache
from savant_ray.data.tokenizer import Tokenizer
from savant_ray.errors import DataError

LENGTH = 64


class LocalTasks:
    """Stand-in for a Ray Data dataset: the tasks run in this process, on rows that were Arrow values."""

    def __init__(self, items: list[dict[str, Any]], override_num_blocks: int) -> None:
        assert override_num_blocks == len(items)
        self._rows = pa.Table.from_pylist(items).to_pylist()

    def flat_map(self, task: Callable[[dict[str, Any]], Iterator[dict[str, Any]]], num_cpus: int) -> list[Any]:
        task = pickle.loads(pickle.dumps(task))
        return [result for row in self._rows for result in task(row)]


@pytest.fixture(autouse=True)
def tasks_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.data.from_items", LocalTasks)
    monkeypatch.setattr(
        "savant_ray.data.ray_data.rows",
        lambda results: ({name: pa.scalar(value) for name, value in row.items()} for row in results),
    )


@pytest.fixture
def texts(tmp_path: Path) -> dict[tuple[str, int], str]:
    """The texts by file and line of 40 small files in a folder, some of which have invalid lines or none."""
    by_line: dict[tuple[str, int], str] = {}
    (tmp_path / "texts").mkdir()
    for number in range(40):
        of_file = [f"text {number}.{line} " + "word " * (number % 7) for line in range(number % 4)]
        write = (write_lines, write_compressed_lines, write_table)[number % 3]
        name, step = write(tmp_path / f"texts/{number:02d}", of_file)
        by_line |= {(name, 1 + step * line): text for line, text in enumerate(of_file)}
    return by_line


def write_lines(path: Path, texts: Sequence[str]) -> tuple[str, int]:
    """Write JSON lines with an invalid line after each; return the name, and the difference between two line numbers."""
    path = path.with_suffix(".jsonl")
    path.write_text("".join(json.dumps({"text": text}) + "\nnot JSON\n" for text in texts))
    return path.name, 2


def write_compressed_lines(path: Path, texts: Sequence[str]) -> tuple[str, int]:
    path = path.with_suffix(".jsonl.gz")
    path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode()))
    return path.name, 1


def write_table(path: Path, texts: Sequence[str]) -> tuple[str, int]:
    path = path.with_suffix(".parquet")
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path)
    return path.name, 1


def prepared(folder: Path, tokenizer: Tokenizer, rule: DocumentRule | None = None, **options: Any) -> TokenCache:
    text = SourceText(expand(str(folder), lambda message: None), rule or DocumentRule())
    return prepare([text], tokenizer, LENGTH, folder.parent / "cache", **options)


def located_documents(cache: TokenCache, tokenizer: Tokenizer) -> dict[tuple[str, int], str]:
    """Return the text of each document by file and line, put together from its pieces."""
    texts: dict[tuple[str, int], str] = {}
    for row in range(cache.n_sequences):
        sequence = cache.take(np.array([row]))
        for number, place in enumerate(cache.documents(row)):
            piece = sequence.tokens[0][sequence.document_ids[0] == number]
            texts[place] = texts.get(place, "") + tokenizer.decode(piece.tolist())
    return texts


@pytest.mark.parametrize("part_bytes", [None, 2_000, 100])
def test_documents_of_small_files_share_rows_and_keep_their_file_and_line(
    tmp_path: Path, texts: dict[tuple[str, int], str], byte_tokenizer: Tokenizer, part_bytes: int | None
) -> None:
    reported: list[tuple[int, int]] = []
    cache = prepared(
        tmp_path / "texts", byte_tokenizer, part_bytes=part_bytes, progress=lambda *now: reported.append(now)
    )
    total = sum(path.stat().st_size for path in (tmp_path / "texts").iterdir())
    assert reported[0] == (0, total) and sorted(reported) == reported and reported[-1][0] <= total
    found = located_documents(cache, byte_tokenizer)
    assert {place: "".join(sorted(text)) for place, text in found.items()} == {
        place: "".join(sorted(text)) for place, text in texts.items()
    }, "the same characters, of a document in several rows perhaps in another order"
    if part_bytes is None:
        assert len(cache.manifest.shards) == 1 and cache.manifest.padding < LENGTH
    of_files = {file.path: (file.lines, file.documents, file.bad_lines, file.unit) for file in cache.manifest.files}
    for name, counts in of_files.items():
        n_texts = sum(file == name for file, _ in texts)
        n_bad = n_texts if name.endswith(".jsonl") else 0
        assert counts == (n_texts + n_bad, n_texts, n_bad, "row" if name.endswith(".parquet") else "line")
    places = [(name, line + 1) for name, line in texts if name.endswith(".jsonl")]
    assert [(problem.file, problem.line) for problem in cache.manifest.first_bad_lines] == places
    assert Manifest.from_json(cache.manifest.to_json()) == cache.manifest


def test_limits_and_duplicates_are_those_of_files_read_one_by_one(
    tmp_path: Path, texts: dict[tuple[str, int], str], byte_tokenizer: Tokenizer
) -> None:
    (tmp_path / "texts/50.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts.values()))
    limited = prepared(tmp_path / "texts", byte_tokenizer, DocumentRule(limit=len(texts) + 5))
    assert limited.manifest.documents == len(texts) + 5
    once = prepared(tmp_path / "texts", byte_tokenizer, deduplicate_after=[])
    assert located_documents(once, byte_tokenizer).keys() == texts.keys()
    assert once.manifest.files[-1].duplicates == once.manifest.duplicates == len(texts)


def test_a_text_that_cannot_be_encoded_is_named_in_its_small_file(
    tmp_path: Path, texts: dict[tuple[str, int], str]
) -> None:
    only_ascii = tokenizers.Tokenizer(models.WordLevel({"text": 0, "</s>": 1}, unk_token="missing"))
    for part_bytes in (None, 100):
        with pytest.raises(DataError, match=r"01\.jsonl\.gz line 1: "):
            prepared(tmp_path / "texts", Tokenizer(only_ascii), part_bytes=part_bytes)


def test_only_small_files_of_one_source_share_a_shard(tmp_path: Path) -> None:
    sizes = [100, SMALL_FILE_BYTES + 1, 50, 60, 3000, SMALL_FILE_BYTES, SMALL_FILE_BYTES - 100]
    for number, size in enumerate(sizes):
        (tmp_path / f"{number}.jsonl").write_bytes(b"\n" * size)
    files = expand(str(tmp_path))
    sources = [SourceText(files[:3]), SourceText(files[3:])]

    def shards(part_bytes: int | None) -> list[list[int]]:
        parts = group_parts(plan_source_parts(sources, part_bytes), sources, part_bytes)
        return [[part.file for part in shard] for shard in parts]

    assert shards(None) == [[0], [1], [2], [3, 4, 5, 6]]
    assert shards(2 * SMALL_FILE_BYTES) == [[0], [1], [2], [3, 4, 5], [6]]
    assert len(shards(1_000)) == sum(-(-size // 1_000) for size in sizes)


def test_only_text_with_neighboring_small_files_has_another_identity_than_before(
    tmp_path: Path, byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.dumps({"text": f"text {number}"}) + "\n" for number in range(100)]
    folders = {"one": [lines[:10]], "large": [lines, lines[:1], lines], "small": [lines[:10], lines[10:20]]}
    for name, files in folders.items():
        (tmp_path / name).mkdir()
        for number, of_file in enumerate(files):
            (tmp_path / name / f"{number}.jsonl").write_text("".join(of_file))
    monkeypatch.setattr(cache_builder, "SMALL_FILE_BYTES", 1_000)
    now = {name: prepared(tmp_path / name, byte_tokenizer).fingerprint for name in folders}
    monkeypatch.setattr(cache_builder, "SMALL_FILE_BYTES", 0)
    before = {name: prepared(tmp_path / name, byte_tokenizer).fingerprint for name in folders}
    assert {name for name in folders if now[name] != before[name]} == {"small"}
