"""Byte ranges of JSONL files → lines: a document, a problem with its reason, or blank.

A range owns the lines that START in it, so any cut of a file reads the same lines, in parallel and without a shared
index. Ray Data's own JSON reading fails whole files on one bad line, splits at U+2028 and cannot cut a file.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson
import pyarrow as pa

from savant_ray.data.formats import ENCODINGS
from savant_ray.data.sources import SourceFile
from savant_ray.errors import DataError, SavantError
from savant_ray.locations import printable, why

MIB = 1 << 20
BLOCK_BYTES = MIB  # what a reader holds at a time
MAX_LINE_BYTES = 64 * MIB
UNBOUNDED = sys.maxsize
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class ByteRange:
    """The lines of `file` that start in bytes [start, stop)."""

    file: SourceFile
    start: int
    stop: int


class Line(NamedTuple):
    """A line of a range: `text` of a document, else `problem` with the reason, else blank."""

    number: int  # 1-based, from the range's first line
    text: str = ""
    problem: str = ""


def plan_ranges(files: Sequence[SourceFile], range_bytes: int | None = None) -> list[ByteRange]:
    """The ranges of `files` in order; a compressed or UTF-16 file is one range, an empty file none.

    The default length gives about 64 ranges, within 4 to 32 MiB: enough for every core, few files, small waste.
    """
    total = sum(file.size for file in files)
    step = range_bytes or min(max(total // 64, 4 * MIB), 32 * MIB)
    return [part for file in files for part in _cut(file, step)]


def documents(files: Sequence[SourceFile], max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[str]:
    """The texts of the files one after the other, without their bad lines."""
    for part in plan_ranges(files):
        with RangeReader(part, max_line_bytes) as lines:
            yield from (line.text for line in lines if line.text)


class RangeReader:
    """Iterates every line of a range, holding one block and one line of at most `max_line_bytes` at a time.

    Raises:
        DataError: the file cannot be opened, read or decompressed.
    """

    def __init__(self, part: ByteRange, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        self._part = part
        self._max_line_bytes = max_line_bytes
        filesystem, path = part.file.resolve()
        with self._named_errors():
            self._stored = filesystem.open_input_file(path)
            first = max(part.start - 1, 0)  # a newline right before `start` makes `start` the start of a line
            self._listed = _ListedBytes(self._stored, first, part.file.size)
            self._stream = _decoded(self._listed, part.file.codec)

    def __enter__(self) -> RangeReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stored.close()

    def __iter__(self) -> Iterator[Line]:
        with self._named_errors():
            raw_lines = _split_lines(_owned_blocks(self._stream, self._part), self._max_line_bytes)
            for number, raw in enumerate(raw_lines, start=1):
                yield _parse(number, raw, self._max_line_bytes)

    @property
    def bytes_read(self) -> int:
        """How many of the range's bytes, as stored, have been read."""
        return max(min(self._listed.position, self._part.stop) - self._part.start, 0)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except SavantError:
            raise
        except UnicodeError as error:
            raise DataError(
                f"{printable(self._part.file.path)}: not valid {self._part.file.codec} ({error})"
            ) from error
        except Exception as error:  # a file system that is written in Python may raise anything
            raise DataError(f"{printable(self._part.file.path)}: cannot be read ({why(error)})") from error


class _ListedBytes(io.RawIOBase):
    """Reads a file's bytes [position, size): what was appended since it was listed is not in its hash."""

    def __init__(self, stored: pa.NativeFile, position: int, size: int) -> None:
        self.position = position
        self._stored = stored
        self._size = size
        if position:
            stored.seek(position)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        left = max(self._size - self.position, 0)
        block: bytes = self._stored.read(left if size < 0 else min(size, left))
        self.position += len(block)
        return block


def _decoded(listed: _ListedBytes, codec: str | None) -> _ListedBytes | pa.NativeFile:
    """The bytes as UTF-8 lines."""
    if codec is None:
        return listed
    stream = pa.PythonFile(listed, mode="r")
    return (
        pa.transcoding_input_stream(stream, codec, "utf-8")
        if codec in ENCODINGS
        else pa.CompressedInputStream(stream, codec)
    )


def _cut(file: SourceFile, step: int) -> list[ByteRange]:
    if file.codec and file.size:
        return [ByteRange(file, 0, UNBOUNDED)]
    return [ByteRange(file, start, min(start + step, file.size)) for start in range(0, file.size, step)]


def _owned_blocks(stream: _ListedBytes | pa.NativeFile, part: ByteRange) -> Iterator[bytes]:
    """The bytes of the lines that start in the range: from the first line start in it to the first one behind it.

    The stream begins one byte before the range, except at the file's start.
    """
    position = max(part.start - 1, 0)
    skipping = part.start > 0
    while position < part.stop and (block := stream.read(BLOCK_BYTES)):
        if skipping:
            begin = block.find(b"\n") + 1
            skipping = begin == 0
            position += begin or len(block)
            block = block[begin:]
            if skipping or position >= part.stop:
                continue
        yield from _until_line_end(stream, block, part.stop - 1 - position)
        position += len(block)


def _until_line_end(stream: _ListedBytes | pa.NativeFile, block: bytes, last: int) -> Iterator[bytes]:
    """`block`, cut or continued to the end of the line that holds its byte `last`."""
    if last >= len(block):
        yield block
        return
    while not (end := block.find(b"\n", last) + 1):
        yield block
        last = 0
        if not (block := stream.read(BLOCK_BYTES)):
            return
    yield block[:end]


def _split_lines(blocks: Iterator[bytes], max_line_bytes: int) -> Iterator[bytes | int]:
    """Lines without their newline; of a line over the limit only its length."""
    parts: list[bytes] = []
    size = 0
    for block in blocks:
        *ends, tail = block.split(b"\n")
        for end in ends:
            size += len(end)
            yield b"".join((*parts, end)) if size <= max_line_bytes else size
            parts, size = [], 0
        size += len(tail)
        parts = [*parts, tail] if size <= max_line_bytes else []
    if size:
        yield b"".join(parts) if size <= max_line_bytes else size


def _parse(number: int, raw: bytes | int, max_line_bytes: int) -> Line:
    if isinstance(raw, int):
        return Line(number, problem=f"line of {raw:,} bytes, over the limit of {max_line_bytes:,}")
    raw = raw.removeprefix(BYTE_ORDER_MARK)  # not only at the file's start: concatenated files carry it in the middle
    if not raw or raw.isspace():
        return Line(number)
    try:
        return Line(number, _text_of(raw))
    except _BadLineError as bad:
        return Line(number, problem=str(bad))


class _BadLineError(Exception):
    """The line is no document; the message is the reason."""


def _text_of(raw: bytes) -> str:
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        value = _loads_leniently(raw)
    if not isinstance(value, dict):
        raise _BadLineError(f"{_json_type(value)}, not an object")
    text = value.get("text")
    if not isinstance(text, str) or not text or text.isspace():
        raise _BadLineError(_why_no_text(value))
    return text


def _loads_leniently(raw: bytes) -> Any:
    """What Python reads and orjson does not (NaN, deep nesting, half surrogates outside the text), or the reason."""
    try:
        value = json.loads(raw.decode())
        if isinstance(value, dict) and isinstance(value.get("text"), str):
            value["text"].encode()
        return value
    except UnicodeDecodeError as error:
        reason = f"bad UTF-8 (0x{raw[error.start]:02x} at byte {error.start + 1})"
    except UnicodeEncodeError as error:
        reason = f'"text" holds half a surrogate pair (\\u{ord(error.object[error.start]):04x})'
    except json.JSONDecodeError as error:
        if raw.rstrip().endswith((b"{", b"[", b",")) and raw.lstrip().startswith((b"{", b"[")):
            raise _BadLineError(
                "JSON over several lines; one object per line is wanted, without commas between"
            ) from None
        is_truncated = error.msg.startswith("Unterminated") or error.pos >= len(error.doc.rstrip())
        reason = "truncated JSON" if is_truncated else f"not JSON: {error.msg} at character {error.pos + 1}"
    except RecursionError:
        reason = "JSON nested too deeply"
    except ValueError:
        reason = f"an integer of more than {sys.get_int_max_str_digits():,} digits"
    raise _BadLineError(reason)


def _why_no_text(value: dict[str, Any]) -> str:
    if "text" not in value:
        names = [_printable(name[:40]) for name in sorted(value)[:8]]
        return f'no "text" field (found: {", ".join(names) or "nothing"})'
    text = value["text"]
    return '"text" is empty' if isinstance(text, str) else f'"text" is {_json_type(text)}, not a string'


def _printable(name: str) -> str:
    """The name on one line, with what steers a terminal or is no character (half a surrogate pair) spelt out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def _json_type(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names: dict[type, str] = {dict: "an object", list: "an array", str: "a string"}
    return names.get(type(value), "a number")
