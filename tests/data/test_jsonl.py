"""Every division of a file into ranges yields the same lines, and every invalid line is reported."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from invalid_lines import CONTENT, GOOD, LINES, MAX_LINE_BYTES, PROBLEMS

from savant_ray.data import decoded_stream
from savant_ray.data.documents import TEXT_RULE, Document
from savant_ray.data.record_reader import RecordReader, documents, plan_parts
from savant_ray.data.records import Part
from savant_ray.data.sources import SourceFile, expand
from savant_ray.errors import DataError

MIB = 1 << 20


def read(path: Path, part_bytes: int | None = None, max_line_bytes: int = MAX_LINE_BYTES) -> list[Document]:
    """Read a file range by range; return all lines, numbered from the start of the file."""
    lines: list[Document] = []
    for part in plan_parts(expand(str(path)), part_bytes):
        with RecordReader(part, max_line_bytes) as reader:
            before = len(lines)
            lines += [line._replace(number=line.number + before) for line in TEXT_RULE.documents(reader)]
    return lines


@pytest.mark.parametrize("part_bytes", [1, 7, 64, 1_000, 2_013, 8 * MIB, None])
def test_every_kind_of_line_is_classified_correctly_for_any_ranges(tmp_path: Path, part_bytes: int | None) -> None:
    path = tmp_path / "all.jsonl"
    path.write_bytes(CONTENT)
    lines = read(path, part_bytes)
    assert [line.number for line in lines] == list(range(1, len(LINES) + 1))
    assert [line.text for line in lines if line.text] == GOOD
    assert {line.number: line.problem for line in lines if line.problem} == PROBLEMS


@pytest.mark.parametrize("name", ["all.jsonl.gz", "all.jsonl.zst"])
def test_a_compressed_file_yields_the_same_lines_as_the_plain_one(tmp_path: Path, name: str) -> None:
    (tmp_path / "all.jsonl").write_bytes(CONTENT)
    with pa.output_stream(str(tmp_path / name), compression="detect") as stream:
        stream.write(CONTENT)
    assert len(plan_parts(expand(str(tmp_path / name)), 7)) == 1
    assert read(tmp_path / name) == read(tmp_path / "all.jsonl")


def test_all_members_of_a_gzip_file_are_read(tmp_path: Path) -> None:
    path = tmp_path / "joined.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n') + gzip.compress(b'{"text": "b"}\n'))
    assert [line.text for line in read(path)] == ["a", "b"]


@pytest.mark.parametrize("cut", [1, 12, 30])
def test_a_truncated_compressed_file_is_reported_by_name(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(gzip.compress(CONTENT)[:-cut])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz: cannot be read"):
        read(path)


@settings(max_examples=150, deadline=None)
@given(
    texts=st.lists(st.text(min_size=1, max_size=30).filter(lambda text: not text.isspace()), max_size=12),
    end=st.sampled_from([b"\n", b"\r\n", b"\n\n"]),
    final=st.booleans(),
    part_bytes=st.integers(1, 200),
    block_bytes=st.sampled_from([1, 3, 16, MIB]),
)
def test_any_texts_are_read_back_with_any_ranges_and_blocks(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    end: bytes,
    final: bool,
    part_bytes: int,
    block_bytes: int,
) -> None:
    raw = end.join(json.dumps({"text": text}, ensure_ascii=False).encode() for text in texts) + end * final
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_bytes(raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoded_stream, "BLOCK_BYTES", block_bytes)
        assert [line.text for line in read(path, part_bytes) if line.text] == texts


def test_an_empty_file_has_no_ranges(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    assert plan_parts(expand(str(tmp_path / "empty.jsonl"))) == []


def test_a_line_of_50_mb_is_read_completely(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_bytes(b'{"text": "' + b"y" * (50 * MIB) + b'"}\n{"text": "after"}\n')
    lines = read(path, 4 * MIB, 64 * MIB)
    assert [len(line.text) for line in lines] == [50 * MIB, 5]


def test_a_line_over_the_limit_is_not_kept_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_bytes(b'{"text": "' + b"y" * (50 * MIB) + b'"}\n{"text": "after"}\n')
    tracemalloc.start()
    lines = read(path, max_line_bytes=MIB)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [line.text for line in lines] == ["", "after"]
    assert lines[0].problem == "line of 52,428,812 bytes, over the limit of 1,048,576"
    assert peak < 8 * MIB


def test_a_reader_reports_the_bytes_read(tmp_path: Path) -> None:
    path = tmp_path / "all.jsonl"
    path.write_bytes(CONTENT)
    (file,) = expand(str(path))
    with RecordReader(Part(file, 100, 300, 200)) as reader:
        assert list(reader)
        assert reader.bytes_read == 200


def test_documents_are_the_texts_of_all_files(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(CONTENT)
    assert [document.text for document in documents(expand(str(tmp_path)), MAX_LINE_BYTES)] == GOOD * 2


def test_field_names_that_cannot_be_printed_are_escaped(tmp_path: Path) -> None:
    path = tmp_path / "names.jsonl"
    path.write_text(r'{"\ud83d": 1, "a\nb": 2, "\u001b[31m": 3, "é": 4}' + "\n")
    (line,) = read(path)
    assert line.problem == r'no "text" field (found: \x1b[31m, a\nb, é, \ud83d)'


def test_an_integer_with_too_many_digits_for_python_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "number.jsonl"
    path.write_text(f'{{"text": "a", "id": {"9" * 5000}}}\n')
    (line,) = read(path, max_line_bytes=10_000)
    assert line.problem == "an integer of more than 4,300 digits"


def test_a_missing_file_is_reported_by_name(tmp_path: Path) -> None:
    gone = SourceFile(str(tmp_path / "gone.jsonl"), 10, 0)
    with pytest.raises(DataError, match=r"gone\.jsonl: cannot be read"):
        RecordReader(Part(gone, 0, 10, 10))
