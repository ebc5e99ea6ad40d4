"""Reads JSON arrays and JSON objects over several lines, one element or object at a time.

Elements are delimited by counting brackets outside of strings, before they are parsed, so that an invalid element does not
hide those after it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from savant_ray.data.decoded_stream import DecodedStream
from savant_ray.data.formats import BYTE_ORDER_MARK
from savant_ray.data.jsonl import json_record
from savant_ray.data.records import Part, Record

_OUTSIDE_STRING = re.compile(rb'["{}\[\],]')
_INSIDE_STRING = re.compile(rb'"|\\.', re.DOTALL)
UNCLOSED = "the JSON array has no closing bracket; the file is truncated"


def json_values(stream: DecodedStream, part: Part, max_record_bytes: int) -> Iterator[Record]:
    """Yield a record for each element of a top-level array, and for each other top-level value."""
    values = _Values(max_record_bytes)
    number = 0
    for block in stream.blocks():
        for raw in values.of_block(block):
            number += 1
            yield json_record(number, raw, max_record_bytes, "JSON value")
    if (rest := values.rest()) is not None:
        yield json_record(number + 1, rest, max_record_bytes, "JSON value")
    elif values.in_array:
        yield Record(number + 1, problem=UNCLOSED)


class _Values:
    """Divides bytes into JSON values; of one over the limit it keeps only the length."""

    def __init__(self, limit: int) -> None:
        self.in_array = False  # a top-level one
        self._limit = limit
        self._depth = 0  # of brackets, within the value
        self._in_string = False
        self._escape = b""  # a backslash at the end of the previous block
        self._parts: list[bytes] = []
        self._size = 0

    def of_block(self, block: bytes) -> Iterator[bytes | int]:
        """Yield the values that end in this block."""
        block = self._escape + block
        start = position = 0
        while match := (_INSIDE_STRING if self._in_string else _OUTSIDE_STRING).search(block, position):
            position = match.end()
            token = match[0]
            if self._in_string or token == b'"':
                self._in_string ^= token == b'"'
            elif token in b"{[":
                if (
                    token == b"["
                    and not self._depth
                    and not self.in_array
                    and self._is_blank(block[start : position - 1])
                ):
                    self.in_array = True
                    start = position
                else:
                    self._depth += 1
            elif token in b"}]" and self._depth:
                self._depth -= 1
                if not self._depth and not self.in_array:
                    yield from self._end(block[start:position])
                    start = position
            elif not self._depth and (token == b"," or (token == b"]" and self.in_array)):
                yield from self._end(block[start : position - 1])
                start = position
                self.in_array &= token == b","
        self._escape = b"\\" if self._in_string and block.endswith(b"\\", position) else b""
        self._add(block[start : len(block) - len(self._escape)])

    def rest(self) -> bytes | int | None:
        """Return the value that the end of the file cuts off, if there is one."""
        return next(self._end(self._escape), None)

    def _add(self, piece: bytes) -> None:
        self._size += len(piece)
        self._parts = [*self._parts, piece] if self._size <= self._limit else []

    def _end(self, piece: bytes) -> Iterator[bytes | int]:
        self._add(piece)
        raw = _stripped(b"".join(self._parts))
        if self._size > self._limit:
            yield self._size
        elif raw:
            yield raw
        self._parts, self._size = [], 0

    def _is_blank(self, piece: bytes) -> bool:
        return self._size <= self._limit and not _stripped(b"".join((*self._parts, piece)))


def _stripped(raw: bytes) -> bytes:
    return raw.strip().removeprefix(BYTE_ORDER_MARK).strip()
