"""Divides files of any format into parts, and reads the records of a part."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from savant_ray.data.decoded_stream import DecodedStream
from savant_ray.data.documents import TEXT_RULE, Document, DocumentRule
from savant_ray.data.formats import TABLES
from savant_ray.data.jsonl import json_lines
from savant_ray.data.readers.csv_rows import csv_rows
from savant_ray.data.readers.json_values import json_values
from savant_ray.data.readers.plain_text import text_blocks, text_document
from savant_ray.data.readers.tables import TableReader, row_count, table_parts
from savant_ray.data.records import MAX_RECORD_BYTES, UNBOUNDED, Part, Record
from savant_ray.data.sources import LISTING_THREADS, SourceFile, errors_as_data_error
from savant_ray.errors import DataError
from savant_ray.locations import is_uri, printable

MIB = 1 << 20


def plan_parts(files: Sequence[SourceFile], part_bytes: int | None = None) -> list[Part]:
    """Divide files into parts of about `part_bytes` as they are stored; an empty file has none.

    JSON lines and text in blocks are divided into byte ranges, tables into row groups or record batches. A compressed file
    and a file of another format is one part. By default `part_bytes` is a 64th of the total, at least 4 and at most 32 MiB:
    enough tasks for all cores, few shards, and little padding.

    Raises:
        DataError: a table, or a file whose format is not known yet, cannot be read.
    """
    step = part_bytes or default_part_bytes(files)
    with ThreadPoolExecutor(LISTING_THREADS) as threads:
        return list(chain.from_iterable(threads.map(lambda file: _divide(file, step), files)))


def default_part_bytes(files: Sequence[SourceFile]) -> int:
    """Return the size of the parts into which `plan_parts` divides the files by default."""
    return min(max(sum(file.size for file in files) // 64, 4 * MIB), 32 * MIB)


def documents(
    files: Sequence[SourceFile], max_record_bytes: int = MAX_RECORD_BYTES, rule: DocumentRule = TEXT_RULE
) -> Iterator[Document]:
    """Yield the documents of the files in order; invalid records are skipped.

    Raises:
        DataError: as `plan_parts` and `RecordReader`.
    """

    def records() -> Iterator[Record]:
        for part in plan_parts(files):
            with RecordReader(part, max_record_bytes, rule.fields) as part_records:
                yield from part_records

    yield from (document for document in rule.documents(records()) if document.text)


def records_before(part: Part, max_record_bytes: int = MAX_RECORD_BYTES) -> int:
    """Count the records of the file that start before the part, by reading the file up to the part."""
    if not part.start:
        return 0
    with RecordReader(dataclasses.replace(part, start=0, stop=part.start), max_record_bytes) as records:
        return max((record.number for record in records), default=0)


def max_records(part: Part) -> int | None:
    """Return a number that the records of a part do not exceed; None if it is unknown without parsing them.

    It is known of Parquet, and of local JSON lines, whose line ends are counted.

    Raises:
        DataError: the file cannot be read.
    """
    file = part.file.inspected()
    with _errors_as_data_error(file):
        if file.format == "parquet":
            return row_count(part)
        if file.format != "jsonl" or file.encoding or is_uri(file.path):
            return None
        with Path(file.path).open("rb") as stored:
            stored.seek(part.start)
            remaining, n_lines = min(part.stop, file.size) - part.start, 1
            while remaining > 0 and (block := stored.read(min(remaining, MIB))):
                remaining -= len(block)
                n_lines += block.count(b"\n")
        return n_lines


class RecordReader:
    """Iterable of the records of a part, which is a context manager.

    Args:
        part: to read.
        max_record_bytes: larger records are invalid.
        fields: the fields that are needed, which limits the columns that are read of a table; None: all.

    Raises:
        DataError: the file cannot be opened, read or decompressed.
    """

    def __init__(
        self, part: Part, max_record_bytes: int = MAX_RECORD_BYTES, fields: Collection[str] | None = None
    ) -> None:
        self._file = part.file
        with _errors_as_data_error(part.file):
            self._file = part.file.inspected()
            part = dataclasses.replace(part, file=self._file)
            self._reader = (
                TableReader(part, max_record_bytes, fields)
                if self._file.format in TABLES
                else _TextReader(part, max_record_bytes)
            )

    def __enter__(self) -> RecordReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()

    def __iter__(self) -> Iterator[Record]:
        with _errors_as_data_error(self._file):
            yield from self._reader

    @property
    def bytes_read(self) -> int:
        """Number of bytes of the part that have been read, before decompression."""
        return self._reader.bytes_read


class RuledPart(NamedTuple):
    """A part, and the rule by which its records become documents."""

    part: Part
    rule: DocumentRule = TEXT_RULE


class PartsReader:
    """Iterable of the documents of several parts, whose records are numbered from the start of the first one.

    Args:
        parts: to read.
        max_record_bytes: larger records are invalid.
        on_end: called when all records of a part have been read.

    Raises:
        DataError: as `RecordReader`.
    """

    def __init__(
        self, parts: Sequence[RuledPart], max_record_bytes: int, on_end: Callable[[], None] = lambda: None
    ) -> None:
        self._parts = parts
        self._max_record_bytes = max_record_bytes
        self._on_end = on_end
        self._ends = [0]  # numbers of the last records of the parts that have been read
        self._bytes_before = 0
        self._records: RecordReader | None = None

    def __iter__(self) -> Iterator[Document]:
        for part, rule in self._parts:
            before = number = self._ends[-1]
            with RecordReader(part, self._max_record_bytes, rule.fields) as records:
                self._records = records
                for document in rule.documents(records):
                    number = before + document.number
                    yield document._replace(number=number)
                self._bytes_before, self._records = self.bytes_read, None
            self._ends.append(number)
            self._on_end()

    @property
    def bytes_read(self) -> int:
        """Number of bytes of the parts that have been read, before decompression."""
        return self._bytes_before + (self._records.bytes_read if self._records else 0)

    def locate(self, number: int) -> tuple[Part, int]:
        """Return the part of a record, and its number from the start of the part."""
        index = bisect_left(self._ends, number) - 1
        return self._parts[index].part, number - self._ends[index]


class _TextReader:
    """Iterable of the records of a part in a format without columns."""

    def __init__(self, part: Part, max_record_bytes: int) -> None:
        self._part = part
        self._max_record_bytes = max_record_bytes
        filesystem, path = part.file.resolve()
        self._stored = filesystem.open_input_file(path)
        self._stream = DecodedStream(self._stored, part.file)

    def __iter__(self) -> Iterator[Record]:
        text = text_blocks if self._part.file.text_blocks else text_document
        read = {"jsonl": json_lines, "json": json_values, "csv": csv_rows, "text": text}[self._part.file.format]
        return read(self._stream, self._part, self._max_record_bytes)

    @property
    def bytes_read(self) -> int:
        """Number of bytes of the part that have been read, before decompression."""
        return max(min(self._stream.position, self._part.stop) - self._part.start, 0)

    def close(self) -> None:
        """Close the file."""
        self._stored.close()


def _divide(file: SourceFile, step: int) -> list[Part]:
    if not file.size:
        return []
    file = file.inspected()
    if file.format in TABLES:
        with _errors_as_data_error(file):
            return table_parts(file, step)
    if file.encoding or not (file.format == "jsonl" or (file.format == "text" and file.text_blocks)):
        return [Part(file, 0, UNBOUNDED, file.size)]
    starts = range(0, file.size, step)
    return [Part(file, start, min(start + step, file.size), min(step, file.size - start)) for start in starts]


@contextmanager
def _errors_as_data_error(file: SourceFile) -> Iterator[None]:
    """Convert exceptions of file systems and decoders into a `DataError` that names the file."""
    with errors_as_data_error(file.path, "read"):
        try:
            yield
        except UnicodeError as error:
            raise DataError(f"{printable(file.path)}: not valid {file.encoding or 'UTF-8'} ({error})") from error
