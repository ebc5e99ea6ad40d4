"""Reads the lines of a byte range of a JSONL file, and parses JSON objects.

A range contains the lines that start in it. Ranges can therefore be read in parallel and without an index, and every
division of a file into ranges yields the same lines. `ray.data.read_json` is not used: it fails a file because of one
invalid line, treats U+2028 as a line end, and cannot divide a file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import orjson

from savant_ray.data.decoded_stream import DecodedStream, invalid_utf8, over_limit, split_lines
from savant_ray.data.formats import BYTE_ORDER_MARK, FORMAT_SUFFIXES, data_suffix
from savant_ray.data.records import InvalidRecordError, Part, Record, json_type


def json_lines(stream: DecodedStream, part: Part, max_record_bytes: int) -> Iterator[Record]:
    """Yield the lines that start in the byte range of `part`; at most one block and one line are in memory."""
    is_named_so = data_suffix(part.file.path) in FORMAT_SUFFIXES["jsonl"] or part.file.format_setting != "auto"
    for number, raw in enumerate(split_lines(_range_blocks(stream, part), max_record_bytes), start=1):
        try:  # inline, because nearly all lines are valid objects
            value = orjson.loads(raw)  # type: ignore[arg-type]
        except orjson.JSONDecodeError:  # also for the length of a line over the limit
            value = None
        record = Record(number, value) if isinstance(value, dict) else _unusual_line(number, raw, max_record_bytes)
        # A file in which no other format was detected is read as JSON lines, so it may be in another format.
        if record.problem and number == 1 and not part.start and not is_named_so:
            record = record._replace(problem=f"{record.problem}; if the file is plain text or CSV, set format")
        yield record


def json_record(number: int, raw: bytes | int, limit: int, what: str) -> Record:
    """Return the record of one JSON object; of an object over the limit, `raw` is the length."""
    if isinstance(raw, int):
        return Record(number, problem=over_limit(what, raw, limit))
    try:
        try:
            value = orjson.loads(raw)
        except orjson.JSONDecodeError:
            value = _loads_leniently(raw)
    except InvalidRecordError as error:
        return Record(number, problem=str(error))
    if not isinstance(value, dict):
        return Record(number, problem=f"{json_type(value)}, not an object")
    return Record(number, value)


def _range_blocks(stream: DecodedStream, part: Part) -> Iterator[bytes]:
    """Yield the bytes of the lines that start in the range: up to the first line start after it.

    Reading begins one byte before the range: a line starts at `start` if this byte is a newline.
    """
    position = max(part.start - 1, 0)
    if position:
        stream.seek(position)
    is_before_first_line = part.start > 0
    while position < part.stop and (block := stream.read()):
        if is_before_first_line:
            begin = block.find(b"\n") + 1
            is_before_first_line = begin == 0
            position += begin or len(block)
            block = block[begin:]
            if is_before_first_line or position >= part.stop:
                continue
        yield from _until_line_end(stream, block, part.stop - 1 - position)
        position += len(block)


def _until_line_end(stream: DecodedStream, block: bytes, last: int) -> Iterator[bytes]:
    """Yield the bytes up to the end of the line that contains byte `last`, counted from the start of `block`.

    If `last` is after the block, only the block is yielded; if its line continues after the block, more is read.
    """
    if last >= len(block):
        yield block
        return
    while not (end := block.find(b"\n", last) + 1):
        yield block
        last = 0
        if not (block := stream.read()):
            return
    yield block[:end]


def _unusual_line(number: int, raw: bytes | int, max_line_bytes: int) -> Record:
    if isinstance(raw, bytes):
        raw = raw.removeprefix(BYTE_ORDER_MARK)  # on any line, because files with a mark may have been concatenated
        if not raw or raw.isspace():
            return Record(number)
    return json_record(number, raw, max_line_bytes, "line")


def _loads_leniently(raw: bytes) -> Any:
    """Parse JSON that orjson rejects but Python accepts: NaN, deep nesting, lone surrogates.

    Raises:
        InvalidRecordError: Python rejects it as well.
    """
    try:
        return json.loads(raw.decode())
    except UnicodeDecodeError as error:
        reason = invalid_utf8(raw, error)
    except json.JSONDecodeError as error:
        if raw.rstrip().endswith((b"{", b"[", b",")) and raw.lstrip().startswith((b"{", b"[")):
            raise InvalidRecordError(
                "JSON over several lines; write one object per line, without commas between them"
            ) from None
        is_truncated = error.msg.startswith("Unterminated") or error.pos >= len(error.doc.rstrip())
        reason = "truncated JSON" if is_truncated else f"not JSON: {error.msg} at character {error.pos + 1}"
    except RecursionError:
        reason = "JSON nested too deeply"
    except ValueError:
        reason = f"an integer of more than {sys.get_int_max_str_digits():,} digits"
    raise InvalidRecordError(reason)
