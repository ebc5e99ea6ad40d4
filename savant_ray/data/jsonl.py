"""Byte ranges of JSONL files → lines: a document, a problem with its reason, or blank.

A range owns the lines that START in it, so any cut of a file reads the same lines, in parallel and without a shared
index. Ray Data's own JSON reading fails whole files on one bad line, splits at U+2028 and cannot cut a file.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.fs as pafs

from savant_ray.errors import DataError

KIB, MIB = 1 << 10, 1 << 20
BLOCK_BYTES = MIB  # what a reader holds at a time
MAX_LINE_BYTES = 64 * MIB
CODECS = {".gz": "gzip", ".zst": "zstd"}
SUFFIXES = tuple(suffix + packed for suffix in (".jsonl", ".json", ".ndjson") for packed in ("", *CODECS))
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class SourceFile:
    """A file of JSON lines: an absolute path or a URI, and what tells whether it changed."""

    path: str
    size: int  # bytes as stored
    mtime_ns: int

    @property
    def codec(self) -> str | None:
        """The compression, known by the file's suffix."""
        return CODECS.get(os.path.splitext(self.path)[1])

    def open(self) -> pa.NativeFile:
        """Random access to a plain file, a stream through a compressed one.

        Raises:
            DataError: the file cannot be opened.
        """
        filesystem, path = _resolve(self.path)
        try:
            if self.codec is None:
                return filesystem.open_input_file(path)
            return filesystem.open_input_stream(path, compression=self.codec)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error})") from error


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


def expand(pattern: str | Sequence[str]) -> list[SourceFile]:
    """The files behind a path, folder (recursively), glob or `pyarrow.fs` URI, sorted, each once.

    Raises:
        DataError: nothing is there; names the pattern.
    """
    patterns = [pattern] if isinstance(pattern, str) else pattern
    found = {file.path: file for each in patterns for file in _expand_one(each)}
    return [found[path] for path in sorted(found)]


def plan_ranges(files: Sequence[SourceFile], range_bytes: int | None = None) -> list[ByteRange]:
    """The ranges of `files` in order; a compressed file is one range, an empty file none.

    The default length gives about 64 ranges, within 4 to 32 MiB: enough for every core, few files, small waste.
    """
    total = sum(file.size for file in files)
    step = range_bytes or min(max(total // 64, 4 * MIB), 32 * MIB)
    return [part for file in files for part in _cut(file, step)]


def read_range(part: ByteRange, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[Line]:
    """Every line of the range, holding one block and one line of at most `max_line_bytes` at a time.

    Raises:
        DataError: the file cannot be read or decompressed.
    """
    with part.file.open() as stream:
        try:
            raw_lines = _split_lines(_owned_blocks(stream, part), max_line_bytes)
            for number, raw in enumerate(raw_lines, start=1):
                yield _parse(number, raw, max_line_bytes)
        except (OSError, EOFError) as error:
            raise DataError(f"{part.file.path}: cannot be read to its end ({error})") from error


def _resolve(path: str) -> tuple[pafs.FileSystem, str]:
    if "://" in path:
        return pafs.FileSystem.from_uri(path)
    return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(path))


def _expand_one(pattern: str) -> list[SourceFile]:
    try:
        filesystem, path = _resolve(pattern)
        info = filesystem.get_file_info(path)
        if info.type == pafs.FileType.File:
            infos = [info]
        elif info.type == pafs.FileType.Directory:
            infos = [each for each in _files_below(filesystem, path) if each.path.endswith(SUFFIXES)]
        else:
            matches = _glob_expression(path).fullmatch
            infos = [each for each in _files_below(filesystem, _fixed_folder(path)) if matches(each.path)]
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{pattern}: cannot be listed ({error})") from error
    if not infos:
        raise DataError(_nothing_found(pattern, info.type == pafs.FileType.Directory))
    scheme = pattern.split("://")[0] + "://" if "://" in pattern else ""
    return [SourceFile(scheme + each.path, each.size, each.mtime_ns or 0) for each in infos]


def _nothing_found(pattern: str, is_folder: bool) -> str:
    if is_folder:
        return f"{pattern}: the folder holds no {', '.join(SUFFIXES[:3])} …"
    return f"{pattern}: no such {'match' if _is_glob(pattern) else 'file or folder'}"


def _files_below(filesystem: pafs.FileSystem, folder: str) -> list[pafs.FileInfo]:
    selector = pafs.FileSelector(folder, recursive=True, allow_not_found=True)
    infos = filesystem.get_file_info(selector)
    return [each for each in infos if each.type == pafs.FileType.File and not each.base_name.startswith(".")]


def _is_glob(path: str) -> bool:
    return any(character in path for character in "*?[")


def _fixed_folder(path: str) -> str:
    """The deepest folder above every match of a glob."""
    return re.split(r"[*?\[]", path, maxsplit=1)[0].rpartition("/")[0] or "/"


def _glob_expression(path: str) -> re.Pattern[str]:
    """`*` and `?` stay within a folder, `**/` crosses folders, `[…]` is a set of characters."""
    meanings = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", path)
    literal_at_even = (part if i % 2 else re.escape(part) for i, part in enumerate(parts))
    return re.compile("".join(meanings.get(part, part.replace("[!", "[^")) for part in literal_at_even))


def _cut(file: SourceFile, step: int) -> list[ByteRange]:
    if file.codec and file.size:
        return [ByteRange(file, 0, sys.maxsize)]
    return [ByteRange(file, start, min(start + step, file.size)) for start in range(0, file.size, step)]


def _owned_blocks(stream: pa.NativeFile, part: ByteRange) -> Iterator[bytes]:
    """The bytes of the lines that start in the range: from the first line start in it to the first one behind it."""
    position = max(part.start - 1, 0)  # a newline right before `start` makes `start` the start of a line
    if position:
        stream.seek(position)
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


def _until_line_end(stream: pa.NativeFile, block: bytes, last: int) -> Iterator[bytes]:
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
        is_truncated = error.msg.startswith("Unterminated") or error.pos >= len(error.doc.rstrip())
        reason = "truncated JSON" if is_truncated else f"not JSON: {error.msg} at character {error.pos + 1}"
    except RecursionError:
        reason = "JSON nested too deeply"
    except ValueError as error:  # an integer of more than 4,300 digits
        reason = f"not JSON: {error}"
    raise _BadLineError(reason)


def _why_no_text(value: dict[str, Any]) -> str:
    if "text" not in value:
        names = [name[:40] for name in sorted(value)[:8]]
        return f'no "text" field (found: {", ".join(names) or "nothing"})'
    text = value["text"]
    return '"text" is empty' if isinstance(text, str) else f'"text" is {_json_type(text)}, not a string'


def _json_type(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return {dict: "an object", list: "an array", str: "a string"}.get(type(value), "a number")
