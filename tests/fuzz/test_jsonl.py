"""The JSONL reader: any bytes, cut anywhere, are the same lines, each a document or named for what it is."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise
from random import Random
from typing import Any
from unittest.mock import patch

import pyarrow as pa
from hypothesis import strategies as st

from savant_ray.data import jsonl
from savant_ray.data.jsonl import BYTE_ORDER_MARK, UNBOUNDED, ByteRange, Line, RangeReader
from savant_ray.data.sources import SourceFile
from savant_ray.errors import DataError
from tests.fuzz.drawing import a_text, a_value, drawn, spoilt
from tests.fuzz.property import holds_for, scratch

DEPTHS = (1, 5, 20, 100, 900, 1022, 1023, 1024, 1025, 1100, 3_000)
LENGTHS = (1, 5, 18, 19, 20, 30, 100, 308, 309, 4_299, 4_300, 4_301, 6_000)
ALONE = (b"", b" \t ", b"\x00", b"\x00" * 50, BYTE_ORDER_MARK, b"\xff\xfe", b"\x1e", b"\xc2\xa0", b"NaN", b"{}", b"[]")


def a_document(chance: Random) -> bytes:
    """An object with a text, which may hold half a surrogate pair."""
    more = {a_text(chance): a_value(chance) for _ in range(chance.randrange(3))}
    return _line({**more, "text": a_text(chance, 12)}, chance.random() < 0.5)


def a_line(chance: Random) -> bytes:
    """A document, or what stands in its place."""
    kind = chance.randrange(16)
    if kind < 6:
        return a_document(chance)
    if kind < 9:
        return spoilt(a_document(chance), chance).replace(b"\n", b"")
    depth, length = chance.choice(DEPTHS), chance.choice(LENGTHS)
    return (
        BYTE_ORDER_MARK + a_document(chance),
        b'{"text": "deep", "x": ' + b"[" * depth + b"]" * depth + b"}",
        b"[" * depth,
        b'{"text": "n", "x": ' + b"8" * length + b"}",
        b'{"text": "' + b"y" * length + b'"}',
        b'{"text": 1, "text": "' + chance.randbytes(2).replace(b"\n", b"") + b'", "text": "twice"}',
        _line(chance.choice((a_value(chance), {"text": a_value(chance)}))),
        chance.choice(ALONE),
    )[kind - 9]


def a_file(chance: Random) -> bytes:
    """Up to 12 lines, or any bytes."""
    if chance.random() < 0.1:
        return bytes(chance.choices(b'\n\n\r{}"\xff\xefa:[text', k=chance.randrange(200)))
    end = chance.choice((b"\n", b"\n", b"\r\n", b"\n\n"))
    return end.join(a_line(chance) for _ in range(chance.randrange(12))) + end * chance.randrange(2)


def a_cut_file(chance: Random) -> tuple[bytes, list[int]]:
    """With the places where it is cut."""
    content = a_file(chance)
    return content, sorted({0, len(content), *(chance.randrange(len(content) + 1) for _ in range(chance.randrange(6)))})


def a_packed_file(chance: Random) -> tuple[bytes, bytes, str]:
    """What was compressed, the file, which may be damaged, and the suffix."""
    content, suffix = a_file(chance), chance.choice((".gz", ".zst"))
    packed = gzip.compress(content, 1, mtime=0) if suffix == ".gz" else pa.compress(content, "zstd", asbytes=True)
    return content, spoilt(packed, chance) if chance.random() < 0.7 else packed, suffix


def _line(value: Any, ascii_only: bool = True) -> bytes:
    return json.dumps(value, ensure_ascii=ascii_only).encode(errors="surrogatepass")


def read(content: bytes, cuts: list[int], limit: int, block: int, suffix: str = "") -> list[Line]:
    """The lines of the ranges between the cuts, numbered through."""
    path = scratch() / f"any.jsonl{suffix}"
    path.write_bytes(content)
    file = SourceFile(str(path), len(content), 0)
    lines: list[Line] = []
    with patch.object(jsonl, "BLOCK_BYTES", max(block, len(content) // 100)):  # not a million blocks of one byte
        for start, stop in pairwise(cuts):
            before = len(lines)
            with RangeReader(ByteRange(file, start, stop), limit) as reader:
                lines += [line._replace(number=line.number + before) for line in reader]
    return lines


def expected(raw: bytes) -> str | None:
    """The text that Python's own reader finds; "" if there is none, None if it gives up."""
    try:
        value = json.loads(raw.decode())
        text = value["text"] if isinstance(value, dict) else ""
        return text if isinstance(text, str) and text.strip() and text.encode() else ""
    except RecursionError:
        return None
    except (ValueError, KeyError):
        return ""


def check_lines(lines: list[Line], content: bytes, limit: int) -> None:
    raws = content.split(b"\n")
    raws = raws if raws[-1] else raws[:-1]
    assert [line.number for line in lines] == list(range(1, len(raws) + 1)), "lost or doubled"
    for (_, text, problem), raw in zip(lines, raws, strict=True):
        bare = raw.removeprefix(BYTE_ORDER_MARK)
        if len(raw) > limit:
            assert problem == f"line of {len(raw):,} bytes, over the limit of {limit:,}" and not text
        elif not bare.strip():
            assert not text and not problem
        else:
            assert bool(text) != bool(problem)
            assert expected(bare) in (text, None)
            assert problem.isprintable() and len(problem) < 500, "one line, for a terminal and a file"


@holds_for(
    "files of up to 12 lines, good, spoilt or strange in 17 ways, or of any bytes; up to 5 cuts, blocks of 1 byte to 1 MiB",
    a_case=drawn(a_cut_file),
    limit=st.sampled_from([30, 2_500, 100_000]),
    block=st.sampled_from([1, 3, 16, 100, 1 << 20]),
)
def test_any_ranges_of_any_bytes_yield_each_line_once_as_document_blank_or_problem(
    a_case: tuple[bytes, list[int]], limit: int, block: int
) -> None:
    content, cuts = a_case
    lines = read(content, cuts, limit, block)
    check_lines(lines, content, limit)
    assert lines == read(content, [0, len(content)], limit, 1 << 20)


@holds_for("such files as .gz and .zst, two of three damaged", one_in=5, a_case=drawn(a_packed_file))
def test_a_compressed_file_yields_its_lines_or_an_error_with_its_name(a_case: tuple[bytes, bytes, str]) -> None:
    content, packed, suffix = a_case
    try:
        lines = read(packed, [0, UNBOUNDED], 100_000, 1 << 20, suffix)
    except DataError as error:
        assert f"any.jsonl{suffix}: cannot be read" in str(error)
        lines = []
    if packed == (
        gzip.compress(content, 1, mtime=0) if suffix == ".gz" else pa.compress(content, "zstd", asbytes=True)
    ):
        check_lines(lines, content, 100_000)
