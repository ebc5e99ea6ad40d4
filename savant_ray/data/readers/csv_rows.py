"""Reads the rows of CSV with a header; the delimiter is a comma, a semicolon, a tab or a vertical bar."""

from __future__ import annotations

import csv
import re
import sys
from collections import Counter
from collections.abc import Iterator

from savant_ray.data.formats import BYTE_ORDER_MARK, data_suffix
from savant_ray.data.records import InvalidRecordError, Part, Record
from savant_ray.data.streams import DecodedStream, invalid_utf8, over_limit, split_lines
from savant_ray.errors import DataError
from savant_ray.locations import printable

DELIMITERS = ",;\t|"  # if the header has none: a comma, in a file named .tsv a tab
_NAMED_DELIMITER = re.compile(rb'"?sep=([^\w\s"]|\t)"?\s*')  # a line before the header, for Excel


def csv_rows(stream: DecodedStream, part: Part, max_record_bytes: int) -> Iterator[Record]:
    """Yield a record for each row after the header; an empty field is an empty string. Columns without a name are left out.

    Raises:
        DataError: the header cannot be read, or two columns have the same name.
    """
    csv.field_size_limit(min(max_record_bytes, sys.maxsize))
    lines = _Lines(split_lines(stream.blocks(), max_record_bytes), max_record_bytes)
    if named := _NAMED_DELIMITER.fullmatch(lines.first):
        delimiter = named[1].decode()
        next(lines)
    else:
        delimiter = _delimiter(lines.first, part.file.path)
    has_spaces = delimiter.encode() + b" " in _unquoted(lines.first)
    rows = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=has_spaces)
    header = _header(rows, lines, part.file.path)
    number = 0
    while True:
        number += 1
        begin = lines.number + 1
        row: list[str] = []
        try:
            row = next(rows)
        except StopIteration:
            return
        except (csv.Error, InvalidRecordError) as error:
            problem = lines.problem() or _problem(error, lines.number - begin + 1)
        else:
            problem = lines.problem()
            if row and len(row) != len(header):
                problem = problem or f"{len(row):,} fields, but the header has {len(header):,}"
        if problem:
            yield Record(number, problem=f"{problem} (line {begin:,} of the file)")
        else:
            yield Record(
                number, {name: field for name, field in zip(header, row, strict=True) if name} if row else None
            )


def _header(rows: Iterator[list[str]], lines: _Lines, path: str) -> list[str]:
    header: list[str] = []
    try:
        header = [name.strip() for name in next((row for row in rows if row), [])]
        problem = lines.problem()
    except (csv.Error, InvalidRecordError) as error:
        problem = _problem(error, lines.number)
    if problem:
        raise DataError(f"{printable(path)}: the header cannot be read ({problem})")
    name, count = next(iter(Counter(filter(None, header)).most_common(1)), ("", 0))
    if count > 1:
        raise DataError(f"{printable(path)}: {count:,} columns have the name {printable(name)!r}; rename them")
    return header


def _problem(error: Exception, n_lines: int) -> str:
    """Return what is wrong with a row, which ends `n_lines` after its beginning."""
    reason = str(error)
    if reason == "unexpected end of data":
        return f"a quote is not closed, so the row has all {n_lines:,} lines to the end of the file"
    if reason.startswith("new-line character"):
        return "a carriage return within a line; lines have to end with a newline"
    return printable(reason)


def _delimiter(line: bytes, path: str) -> str:
    """Return the most frequent delimiter outside of quotes in the first line."""
    unquoted = _unquoted(line)
    delimiters = DELIMITERS[::-1] if data_suffix(path) == ".tsv" else DELIMITERS
    return max(delimiters, key=lambda delimiter: unquoted.count(delimiter.encode()))


def _unquoted(line: bytes) -> bytes:
    """Return a line without what is in quotes."""
    return re.sub(rb'"[^"]*("|$)', b"", line)


class _Lines:
    """Iterator of the decoded lines of a file.

    It goes on after it has raised an exception for a line, which a generator cannot.
    """

    def __init__(self, raw_lines: Iterator[bytes | int], limit: int) -> None:
        self._raw_lines = raw_lines
        self._limit = limit
        self._problem = ""
        first = next(raw_lines, b"")
        self._first: bytes | int | None = first.removeprefix(BYTE_ORDER_MARK) if isinstance(first, bytes) else first
        self.first = self._first if isinstance(self._first, bytes) else b""
        self.number = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        raw, self._first = next(self._raw_lines) if self._first is None else self._first, None
        self.number += 1
        if isinstance(raw, int):
            raise InvalidRecordError(over_limit("line", raw, self._limit))
        if b"\0" in raw:
            self._problem = "contains a NUL character"
        try:
            return raw.decode() + "\n"
        except UnicodeDecodeError as error:
            self._problem = invalid_utf8(raw, error)
            return raw.decode(errors="replace") + "\n"

    def problem(self) -> str:
        """Return why one of the lines since the last call is invalid; "" if none is."""
        problem, self._problem = self._problem, ""
        return problem
