"""Reads the lines of a byte range of a JSONL file.

A range contains the lines that start in it. Ranges can therefore be read in parallel and without an index, and every
division of a file into ranges yields the same lines. `ray.data.read_json` is not used: it fails a file because of one
invalid line, treats U+2028 as a line end, and cannot divide a file.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import orjson
import pyarrow as pa

from savant_ray.data.documents import TEXT_RULE, DocumentRule
from savant_ray.data.formats import ENCODINGS
from savant_ray.data.records import Record, json_type
from savant_ray.data.sources import SourceFile
from savant_ray.errors import DataError, SavantError
from savant_ray.locations import error_text, printable

MIB = 1 << 20
BLOCK_BYTES = MIB  # read in one call
MAX_LINE_BYTES = 64 * MIB
UNBOUNDED = sys.maxsize
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class ByteRange:
    """The lines of `file` that start in bytes [start, stop)."""

    file: SourceFile
    start: int
    stop: int


def plan_ranges(files: Sequence[SourceFile], range_bytes: int | None = None) -> list[ByteRange]:
    """Divide `files` into ranges of `range_bytes`; a compressed or UTF-16 file is one range, an empty file none.

    By default `range_bytes` is a 64th of the total, at least 4 and at most 32 MiB: enough tasks for all cores, few shards,
    and little padding.
    """
    total = sum(file.size for file in files)
    step = range_bytes or min(max(total // 64, 4 * MIB), 32 * MIB)
    return [part for file in files for part in _divide(file, step)]


def documents(
    files: Sequence[SourceFile], max_line_bytes: int = MAX_LINE_BYTES, rule: DocumentRule = TEXT_RULE
) -> Iterator[str]:
    """Yield the texts of the documents in the files in order; invalid lines are skipped."""

    def records() -> Iterator[Record]:
        for part in plan_ranges(files):
            with RangeReader(part, max_line_bytes) as part_records:
                yield from part_records

    yield from (document.text for document in rule.documents(records()) if document.text)


class RangeReader:
    """Iterable of the records of all lines of a range; holds one block and one line of at most `max_line_bytes` in memory.

    Raises:
        DataError: the file cannot be opened, read or decompressed.
    """

    def __init__(self, part: ByteRange, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        self._part = part
        self._max_line_bytes = max_line_bytes
        filesystem, path = part.file.resolve()
        with self._errors_as_data_error():
            self._stored = filesystem.open_input_file(path)
            first = max(part.start - 1, 0)  # a line starts at `start` if the byte before is a newline
            self._listed = _ListedBytes(self._stored, first, part.file.size)
            self._stream = _decoded(self._listed, part.file.codec)

    def __enter__(self) -> RangeReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stored.close()

    def __iter__(self) -> Iterator[Record]:
        with self._errors_as_data_error():
            raw_lines = _split_lines(_range_blocks(self._stream, self._part), self._max_line_bytes)
            for number, raw in enumerate(raw_lines, start=1):
                yield _parse(number, raw, self._max_line_bytes)

    @property
    def bytes_read(self) -> int:
        """Number of bytes of the range that have been read, before decompression."""
        return max(min(self._listed.position, self._part.stop) - self._part.start, 0)

    @contextmanager
    def _errors_as_data_error(self) -> Iterator[None]:
        try:
            yield
        except SavantError:
            raise
        except UnicodeError as error:
            raise DataError(
                f"{printable(self._part.file.path)}: not valid {self._part.file.codec} ({error})"
            ) from error
        except Exception as error:  # a file system that is implemented in Python may raise any exception
            raise DataError(f"{printable(self._part.file.path)}: cannot be read ({error_text(error)})") from error


class _ListedBytes(io.RawIOBase):
    """Bytes [position, size) of a file; what was appended after it was listed is not read, since it was not hashed."""

    def __init__(self, stored: pa.NativeFile, position: int, size: int) -> None:
        self.position = position
        self._stored = stored
        self._size = size
        if position:
            stored.seek(position)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        remaining = max(self._size - self.position, 0)
        block: bytes = self._stored.read(remaining if size < 0 else min(size, remaining))
        self.position += len(block)
        return block


def _decoded(listed: _ListedBytes, codec: str | None) -> _ListedBytes | pa.NativeFile:
    """Return a stream of decompressed UTF-8 bytes."""
    if codec is None:
        return listed
    stream = pa.PythonFile(listed, mode="r")
    return (
        pa.transcoding_input_stream(stream, codec, "utf-8")
        if codec in ENCODINGS
        else pa.CompressedInputStream(stream, codec)
    )


def _divide(file: SourceFile, step: int) -> list[ByteRange]:
    if file.codec and file.size:
        return [ByteRange(file, 0, UNBOUNDED)]
    return [ByteRange(file, start, min(start + step, file.size)) for start in range(0, file.size, step)]


def _range_blocks(stream: _ListedBytes | pa.NativeFile, part: ByteRange) -> Iterator[bytes]:
    """Yield the bytes of the lines that start in the range: up to the first line start after it.

    The stream begins one byte before the range, except at the start of the file.
    """
    position = max(part.start - 1, 0)
    is_before_first_line = part.start > 0
    while position < part.stop and (block := stream.read(BLOCK_BYTES)):
        if is_before_first_line:
            begin = block.find(b"\n") + 1
            is_before_first_line = begin == 0
            position += begin or len(block)
            block = block[begin:]
            if is_before_first_line or position >= part.stop:
                continue
        yield from _until_line_end(stream, block, part.stop - 1 - position)
        position += len(block)


def _until_line_end(stream: _ListedBytes | pa.NativeFile, block: bytes, last: int) -> Iterator[bytes]:
    """Yield the bytes up to the end of the line that contains byte `last`, counted from the start of `block`.

    If `last` is after the block, only the block is yielded; if its line continues after the block, more is read.
    """
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
    """Yield each line without its newline; of a line over the limit, yield its length."""
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


def _parse(number: int, raw: bytes | int, max_line_bytes: int) -> Record:
    if isinstance(raw, int):
        return Record(number, problem=f"line of {raw:,} bytes, over the limit of {max_line_bytes:,}")
    raw = raw.removeprefix(BYTE_ORDER_MARK)  # on any line, because files with a mark may have been concatenated
    if not raw or raw.isspace():
        return Record(number)
    try:
        return Record(number, _object_of(raw))
    except _InvalidLineError as error:
        return Record(number, problem=str(error))


class _InvalidLineError(Exception):
    """A line that is not a JSON object; the message is the reason."""


def _object_of(raw: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        value = _loads_leniently(raw)
    if not isinstance(value, dict):
        raise _InvalidLineError(f"{json_type(value)}, not an object")
    return value


def _loads_leniently(raw: bytes) -> Any:
    """Parse JSON that orjson rejects but Python accepts: NaN, deep nesting, lone surrogates.

    Raises:
        _InvalidLineError: Python rejects it as well.
    """
    try:
        return json.loads(raw.decode())
    except UnicodeDecodeError as error:
        reason = f"invalid UTF-8 (0x{raw[error.start]:02x} at byte {error.start + 1})"
    except json.JSONDecodeError as error:
        if raw.rstrip().endswith((b"{", b"[", b",")) and raw.lstrip().startswith((b"{", b"[")):
            raise _InvalidLineError(
                "JSON over several lines; write one object per line, without commas between them"
            ) from None
        is_truncated = error.msg.startswith("Unterminated") or error.pos >= len(error.doc.rstrip())
        reason = "truncated JSON" if is_truncated else f"not JSON: {error.msg} at character {error.pos + 1}"
    except RecursionError:
        reason = "JSON nested too deeply"
    except ValueError:
        reason = f"an integer of more than {sys.get_int_max_str_digits():,} digits"
    raise _InvalidLineError(reason)
