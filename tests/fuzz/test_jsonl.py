"""The JSONL reader: any division of any bytes into ranges yields the same lines: documents, blank lines or problems."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise
from random import Random
from typing import Any
from unittest.mock import patch

import pyarrow as pa
from hypothesis import strategies as st

from savant_ray.data import decoded_stream
from savant_ray.data.documents import TEXT_RULE, Document
from savant_ray.data.formats import BYTE_ORDER_MARK, CODECS
from savant_ray.data.record_reader import RecordReader
from savant_ray.data.records import UNBOUNDED, Part
from savant_ray.data.sources import SourceFile
from savant_ray.errors import DataError
from tests.fuzz.drawing import damaged, from_seed, random_text, random_value
from tests.fuzz.property import INPUTS, holds_for, scratch

DEPTHS = (1, 5, 20, 100, 900, 1022, 1023, 1024, 1025, 1100, 3_000)
LENGTHS = (1, 5, 18, 19, 20, 30, 100, 308, 309, 4_299, 4_300, 4_301, 6_000)
ALONE = (b"", b" \t ", b"\x00", b"\x00" * 50, BYTE_ORDER_MARK, b"\xff\xfe", b"\x1e", b"\xc2\xa0", b"NaN", b"{}", b"[]")


def random_document(rng: Random) -> bytes:
    """Return an object with a text, which may contain half a surrogate pair."""
    more = {random_text(rng): random_value(rng) for _ in range(rng.randrange(3))}
    return _line({**more, "text": random_text(rng, 12)}, rng.random() < 0.5)


def random_line(rng: Random) -> bytes:
    """Return a document, a damaged one, or another line."""
    kind = rng.randrange(16)
    if kind < 6:
        return random_document(rng)
    if kind < 9:
        return damaged(random_document(rng), rng).replace(b"\n", b"")
    depth, length = rng.choice(DEPTHS), rng.choice(LENGTHS)
    return (
        BYTE_ORDER_MARK + random_document(rng),
        b'{"text": "deep", "x": ' + b"[" * depth + b"]" * depth + b"}",
        b"[" * depth,
        b'{"text": "n", "x": ' + b"8" * length + b"}",
        b'{"text": "' + b"y" * length + b'"}',
        b'{"text": 1, "text": "' + rng.randbytes(2).replace(b"\n", b"") + b'", "text": "twice"}',
        _line(rng.choice((random_value(rng), {"text": random_value(rng)}))),
        rng.choice(ALONE),
    )[kind - 9]


def random_file(rng: Random) -> bytes:
    """Return up to 12 lines, or any bytes."""
    if rng.random() < 0.1:
        return bytes(rng.choices(b'\n\n\r{}"\xff\xefa:[text', k=rng.randrange(200)))
    end = rng.choice((b"\n", b"\n", b"\r\n", b"\n\n"))
    return end.join(random_line(rng) for _ in range(rng.randrange(12))) + end * rng.randrange(2)


def file_with_cuts(rng: Random) -> tuple[bytes, list[int]]:
    """Return a file and the positions at which it is divided into ranges."""
    content = random_file(rng)
    return content, sorted({0, len(content), *(rng.randrange(len(content) + 1) for _ in range(rng.randrange(6)))})


def compressed_file(rng: Random) -> tuple[bytes, bytes, str]:
    """Return uncompressed content, the compressed file, which may be damaged, and its suffix."""
    content, suffix = random_file(rng), rng.choice((".gz", ".zst"))
    packed = gzip.compress(content, 1, mtime=0) if suffix == ".gz" else pa.compress(content, "zstd", asbytes=True)
    return content, damaged(packed, rng) if rng.random() < 0.7 else packed, suffix


def _line(value: Any, ascii_only: bool = True) -> bytes:
    return json.dumps(value, ensure_ascii=ascii_only).encode(errors="surrogatepass")


def read(content: bytes, cuts: list[int], limit: int, block: int, suffix: str = "") -> list[Document]:
    """Return the lines of the ranges between the cuts, numbered from the start of the file."""
    path = scratch() / f"any.jsonl{suffix}"
    path.write_bytes(content)
    file = SourceFile(str(path), len(content), 0, encoding=CODECS.get(suffix, ""), format="jsonl")
    lines: list[Document] = []
    with patch.object(decoded_stream, "BLOCK_BYTES", max(block, len(content) // 100)):  # at most about 100 blocks
        for start, stop in pairwise(cuts):
            before = len(lines)
            with RecordReader(Part(file, start, stop, stop - start), limit) as reader:
                lines += [line._replace(number=line.number + before) for line in TEXT_RULE.documents(reader)]
    return lines


def expected(raw: bytes) -> str | None:
    """Return the text that Python's json module reads; "" if there is none, None if the line is nested too deeply."""
    try:
        value = json.loads(raw.decode())
        text = value["text"] if isinstance(value, dict) else ""
        return text if isinstance(text, str) and text.strip() and text.encode() else ""
    except RecursionError:
        return None
    except (ValueError, KeyError):
        return ""


def check_lines(lines: list[Document], content: bytes, limit: int) -> None:
    raws = content.split(b"\n")
    raws = raws if raws[-1] else raws[:-1]
    assert [line.number for line in lines] == list(range(1, len(raws) + 1)), "lost or duplicated"
    for line, raw in zip(lines, raws, strict=True):
        text, problem = line.text, line.problem
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
    "files of up to 12 lines, valid, damaged or unusual in 17 ways, or of any bytes; up to 5 cuts, blocks of 1 B to 1 MiB",
    case=from_seed(file_with_cuts),
    limit=st.sampled_from([30, 2_500, 100_000]),
    block=st.sampled_from([1, 3, 16, 100, 1 << 20]),
)
def test_any_ranges_of_any_bytes_yield_each_line_once_as_document_blank_or_problem(
    case: tuple[bytes, list[int]], limit: int, block: int
) -> None:
    content, cuts = case
    INPUTS["jsonl"] += 1
    lines = read(content, cuts, limit, block)
    check_lines(lines, content, limit)
    assert lines == read(content, [0, len(content)], limit, 1 << 20)


@holds_for("such files as .gz and .zst, two of three damaged", one_in=5, case=from_seed(compressed_file))
def test_a_compressed_file_yields_its_lines_or_an_error_with_its_name(case: tuple[bytes, bytes, str]) -> None:
    content, packed, suffix = case
    INPUTS[f"jsonl, {CODECS[suffix]}"] += 1
    try:
        lines = read(packed, [0, UNBOUNDED], 100_000, 1 << 20, suffix)
    except DataError as error:
        assert f"any.jsonl{suffix}: cannot be read" in str(error)
        lines = []
    if packed == (
        gzip.compress(content, 1, mtime=0) if suffix == ".gz" else pa.compress(content, "zstd", asbytes=True)
    ):
        check_lines(lines, content, 100_000)
