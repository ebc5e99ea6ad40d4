"""Reads the rows of CSV with a header; the delimiter is a comma, a semicolon, a tab or a vertical bar.

In many tab-separated files, a quote at the beginning of a field is part of the text. A parser that takes it for an opening
quote joins the following lines to the row. If such a row cannot be parsed and its first line alone has all fields, the row
is therefore that line: read without quotes if the delimiter is a tab, otherwise invalid.
"""

from __future__ import annotations

import csv
import re
import sys
from collections import Counter, deque
from collections.abc import Iterator

from savant_ray.data.decoded_stream import DecodedStream, invalid_utf8, over_limit, split_lines
from savant_ray.data.formats import BYTE_ORDER_MARK, data_suffix
from savant_ray.data.records import InvalidRecordError, Part, Record
from savant_ray.errors import DataError
from savant_ray.locations import printable

QUOTES_HINT = "; if quotes are ordinary characters in this file, set quotes: false"
DELIMITERS = ",;\t|"  # the first of the most frequent ones in the header is used
TSV_DELIMITERS = "\t|;,"  # the same for a file named .tsv
EARLIER_TSV_DELIMITERS = "|\t;,"  # of versions that did not prefer the tab
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
    rows = csv.reader(
        lines,
        delimiter=delimiter,
        strict=True,
        skipinitialspace=has_spaces,
        quoting=csv.QUOTE_MINIMAL if part.file.quotes else csv.QUOTE_NONE,
    )
    header = _header(rows, lines, part.file.path)
    number = 0
    n_only_quoted = n_without_quotes = 0  # rows that can be read only with quotes, only without
    while True:
        number += 1
        begin = lines.number + 1
        lines.begin_row()
        row: list[str] = []
        problem = ""
        try:
            row = next(rows)
        except StopIteration:
            return
        except (csv.Error, InvalidRecordError) as error:
            problem = _problem(error, lines.number - begin + 1)
        if row and len(row) != len(header):
            problem = f"{len(row):,} fields, but the header has {len(header):,}"
        without_quotes = lines.fields_of_row(delimiter) if lines.has_quotes and part.file.quotes else []
        has_all_fields = without_quotes[:1] == [len(header)] and len(header) > 1
        if problem and without_quotes:
            problem += QUOTES_HINT
        elif without_quotes and not has_all_fields:
            n_only_quoted += 1
        # One row over several lines, or a row for each of them?
        is_uncertain = len(without_quotes) > 1 and set(without_quotes) == {len(header)}
        if has_all_fields and (problem or (is_uncertain and n_without_quotes > n_only_quoted)):
            line = lines.keep_first_line()
            if delimiter == "\t":
                n_without_quotes += 1
                row, problem = line.rstrip("\r\n").split("\t"), ""
        problem = lines.problem() or problem
        if problem:
            yield Record(number, problem=f"{problem} (line {begin:,} of the file)")
        else:
            yield Record(
                number, {name: field for name, field in zip(header, row, strict=True) if name} if row else None
            )


def _header(rows: Iterator[list[str]], lines: _Lines, path: str) -> list[str]:
    header: list[str] = []
    try:
        lines.begin_row()
        header = [name.strip() for name in next((row for row in rows if row), [])]
        problem = lines.problem()
    except (csv.Error, InvalidRecordError) as error:
        problem = _problem(error, lines.number) + QUOTES_HINT * lines.has_quotes
    if problem:
        raise DataError(f"{printable(path)}: the header cannot be read ({problem})")
    name, count = next(iter(Counter(filter(None, header)).most_common(1)), ("", 0))
    if count > 1:
        raise DataError(f"{printable(path)}: {count:,} columns have the name {printable(name)!r}; rename them")
    return header


def _problem(error: Exception, n_lines: int) -> str:
    """Return what is wrong with a row, for which the reader has taken `n_lines` lines."""
    reason = str(error)
    if reason == "unexpected end of data":
        return f"a quote is not closed: with it, the row would have all {n_lines:,} lines to the end of the file"
    if reason.startswith("new-line character"):
        return "a carriage return within a line; lines have to end with a newline"
    return printable(reason)


def _delimiter(line: bytes, path: str) -> str:
    """Return the most frequent delimiter outside of quotes in the first line."""
    unquoted = _unquoted(line)
    delimiters = TSV_DELIMITERS if data_suffix(path) == ".tsv" else DELIMITERS
    return max(delimiters, key=lambda delimiter: unquoted.count(delimiter.encode()))


def was_split_at_bars(blocks: Iterator[bytes], path: str) -> bool:
    """Return whether earlier versions split the rows of this file, named .tsv, at vertical bars and not at tabs."""
    lines = (line for line in split_lines(blocks, sys.maxsize) if isinstance(line, bytes))
    header = next(lines, b"").removeprefix(BYTE_ORDER_MARK)
    unquoted = _unquoted(header)
    earlier = max(EARLIER_TSV_DELIMITERS, key=lambda delimiter: unquoted.count(delimiter.encode()))
    is_other = not _NAMED_DELIMITER.fullmatch(header) and earlier != _delimiter(header, path)
    return is_other and any(b"\t" in line or b"|" in line for line in lines)


def _unquoted(line: bytes) -> bytes:
    """Return a line without what is in quotes."""
    return re.sub(rb'"[^"]*("|$)', b"", line)


class _Lines:
    """Iterator of the decoded lines of a file, which can go back to the second line of a row.

    It goes on after it has raised an exception for a line, which a generator cannot.
    """

    def __init__(self, raw_lines: Iterator[bytes | int], limit: int) -> None:
        self._raw_lines = raw_lines
        self._limit = limit
        first = next(raw_lines, b"")
        first = first.removeprefix(BYTE_ORDER_MARK) if isinstance(first, bytes) else first
        self._next: deque[bytes | int] = deque([first])  # before those of `raw_lines`
        self._row: list[bytes | int] = []  # lines since the row began
        self._problem: tuple[int, str] | None = None  # of its first invalid line: the number in the row, and the reason
        self.first = first if isinstance(first, bytes) else b""
        self.number = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        raw = self._next.popleft() if self._next else next(self._raw_lines)
        self.number += 1
        self._row.append(raw)
        if isinstance(raw, int):
            too_long = over_limit("line", raw, self._limit)
            self._problem = self._problem or (len(self._row), too_long)
            raise InvalidRecordError(too_long)
        if b"\0" in raw:
            self._problem = self._problem or (len(self._row), "contains a NUL character")
        try:
            return raw.decode() + "\n"
        except UnicodeDecodeError as error:
            self._problem = self._problem or (len(self._row), invalid_utf8(raw, error))
            return raw.decode(errors="replace") + "\n"

    def begin_row(self) -> None:
        """Begin a row with the next line."""
        self._row.clear()
        self._problem = None

    @property
    def has_quotes(self) -> bool:
        """Whether a line of the row has a quote, and none is over the limit."""
        lines = [raw for raw in self._row if isinstance(raw, bytes)]
        return len(lines) == len(self._row) and any(b'"' in line for line in lines)

    def fields_of_row(self, delimiter: str) -> list[int]:
        """Return the number of fields of each line of the row, if quotes are ordinary characters."""
        return [raw.count(delimiter.encode()) + 1 for raw in self._row if isinstance(raw, bytes)]

    def keep_first_line(self) -> str:
        """Let the row have one line, which is returned; the next row begins with the second line."""
        first, *others = self._row
        self._next.extendleft(reversed(others))
        self.number -= len(others)
        self._row = [first]
        if self._problem is not None and self._problem[0] > 1:
            self._problem = None
        return first.decode(errors="replace") if isinstance(first, bytes) else ""

    def problem(self) -> str:
        """Return why one of the lines of the row is invalid; "" if none is."""
        return self._problem[1] if self._problem is not None else ""
