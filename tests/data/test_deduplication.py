"""Of equal documents the first one stays, in the order of sources, files and lines, for any division into ranges."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from savant_ray.data.cache_builder import group_parts, plan_source_parts
from savant_ray.data.deduplication import mark_duplicates, without_duplicates, write_scan
from savant_ray.data.documents import DocumentRule, SourceText
from savant_ray.data.overlap import document_digests
from savant_ray.data.record_reader import PartsReader, RuledPart
from savant_ray.data.records import MAX_RECORD_BYTES
from savant_ray.data.sources import expand

TEXTS = st.lists(st.integers(0, 12), max_size=20)


@settings(max_examples=100, deadline=None)
@given(
    files=st.lists(TEXTS, min_size=1, max_size=3), earlier=st.lists(TEXTS, max_size=2), part_bytes=st.integers(5, 300)
)
def test_the_first_of_equal_documents_stays(
    tmp_path_factory: pytest.TempPathFactory, files: Sequence[list[int]], earlier: Sequence[list[int]], part_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("texts")
    for number, texts in enumerate(files):
        lines = (json.dumps({"body": f"text {text}"}) + "\n\n{}\n" for text in texts)
        (folder / f"{number}.jsonl").write_text("".join(lines))
    rule = DocumentRule(text="body")
    sources = [SourceText(expand(str(folder)), rule)]
    cache = folder / "cache"
    cache.mkdir()
    shards = [
        [RuledPart(part.part, part.rule) for part in parts]
        for parts in group_parts(plan_source_parts(sources, part_bytes), sources, part_bytes)
    ]
    for index, parts in enumerate(shards):
        deque(write_scan(cache, index, parts, MAX_RECORD_BYTES), maxlen=0)
    digests = [document_digests(f"text {text}" for text in texts) for texts in earlier]
    mark_duplicates(cache, len(shards), [np.frombuffer(content, np.uint64) for content in digests])
    kept, duplicates = [], 0
    for index, parts in enumerate(shards):
        for document in without_duplicates(PartsReader(parts, MAX_RECORD_BYTES), cache, index):
            duplicates += document.is_duplicate
            if document.text:
                kept.append(document.text)
    all_texts = [f"text {text}" for texts in files for text in texts]
    before = {f"text {text}" for texts in earlier for text in texts}
    assert kept == [text for text in dict.fromkeys(all_texts) if text not in before]
    assert duplicates == len(all_texts) - len(kept)


def test_a_range_without_duplicates_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (part,) = plan_source_parts([SourceText(expand(str(tmp_path)))], None)
    parts = [RuledPart(part.part, part.rule)]
    *_, n_bytes = write_scan(tmp_path, 0, parts, MAX_RECORD_BYTES)
    assert n_bytes == (tmp_path / "a.jsonl").stat().st_size
    mark_duplicates(tmp_path, 1, [])
    documents = list(without_duplicates(PartsReader(parts, MAX_RECORD_BYTES), tmp_path, 0))
    assert [document.text for document in documents] == ["a", "b"]
    assert not list(tmp_path.glob("*.np*")), "no scan and no duplicates"
