"""Reads the rows of Parquet and Arrow files (IPC files, also named Feather, and IPC streams) as JSON-like values.

Memory is bounded by some hundred rows: Parquet is decoded page by page, a local Arrow file is memory-mapped. Batches are
validated before their values are used, because Arrow itself trusts the offsets in a file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import closing, suppress
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from savant_ray.data.conversations import SYSTEM_FIELDS
from savant_ray.data.decoded_stream import over_limit
from savant_ray.data.formats import ARROW_STREAM_MAGIC
from savant_ray.data.records import UNBOUNDED, Part, Record
from savant_ray.data.sources import SourceFile
from savant_ray.errors import DataError
from savant_ray.locations import error_text, is_uri, printable

BATCH_BYTES = 4 << 20  # of the rows that are converted in one call
BATCH_ROWS = 512
BUFFER_BYTES = 64 << 20  # of the buffers in which the pages of all columns of a Parquet file are read, at most
COLUMN_BUFFER_BYTES = 1 << 20
END_OF_STREAM = ARROW_STREAM_MAGIC + bytes(4)
UNENDED = "the Arrow stream has no end marker; the file is truncated"

Batches = Iterator[tuple[pa.RecordBatch, float]]  # and the fraction of the part that has then been read


def table_parts(file: SourceFile, step: int) -> list[Part]:
    """Divide a table into parts of row groups or record batches, of about `step` bytes as they are stored.

    Raises:
        Exception: the file is damaged.
    """
    with closing(_open(file)) as table:
        weights = table.weights()
    total = max(sum(weights), 1)
    starts, done = [0], 0
    ends: list[int] = []  # in bytes of the file
    for index, weight in enumerate(weights, start=1):
        done += weight
        end = file.size * done // total
        if index == len(weights) or end - (ends[-1] if ends else 0) >= step:
            starts.append(index)
            ends.append(end)
    bounds = zip(pairwise(starts), pairwise([0, *ends]), strict=True)
    return [Part(file, start, stop, end - begin) for (start, stop), (begin, end) in bounds]


def row_count(part: Part) -> int:
    """Return the number of rows of a part of a Parquet file, as its footer lists them.

    Raises:
        Exception: the file is damaged.
    """
    filesystem, path = part.file.resolve()
    with filesystem.open_input_file(path) as stored:
        metadata = pq.read_metadata(stored)
    groups = range(part.start, min(part.stop, metadata.num_row_groups))
    return sum(metadata.row_group(index).num_rows for index in groups)


def read_schema(file: SourceFile) -> pa.Schema:
    """Return the columns of a table.

    Raises:
        Exception: the file is damaged, or a name is not UTF-8.
    """
    with closing(_open(file)) as table:
        schema = table.schema
        schema.names  # noqa: B018 - decodes them
        return schema


def has_nested_items(schema: pa.Schema, name: str | None) -> bool:
    """Return whether the field `name`, or any field if None, has lists of objects that contain objects or lists."""
    return any(
        _has_nested_items(column.type) for column in schema if name is None or f"{name}.".startswith(f"{column.name}.")
    )


class TableReader:
    """Iterable of the records of a part.

    Args:
        part: row groups of a Parquet file, or record batches of an Arrow file.
        max_record_bytes: larger rows are invalid.
        fields: columns that are needed; all if None, or if one of them other than `SYSTEM_FIELDS` does not exist, so that a
            message can name those that do.

    Raises:
        DataError: two columns have the same name, or the file was changed after it was listed.
        Exception: the file is damaged.
    """

    def __init__(self, part: Part, max_record_bytes: int, fields: Collection[str] | None = None) -> None:
        self._part = part
        self._max_record_bytes = max_record_bytes
        self._read = 0.0
        self._table = _open(part.file)
        self._columns = _columns(self._table.schema.names, fields)
        name, count = next(iter(Counter(self._table.schema.names).most_common(1)), ("", 0))
        if count > 1:
            raise DataError(
                f"{printable(part.file.path)}: {count:,} columns have the name {printable(name)!r}; rename them"
            )

    def __iter__(self) -> Iterator[Record]:
        number = 0
        for batch, fraction in self._table.batches(self._part, self._columns):
            batch.validate()  # of the buffers' sizes; a damaged number of rows ends here
            is_valid = _is_valid(batch)
            n_rows = batch.num_rows
            step = min(BATCH_ROWS, max(BATCH_BYTES * n_rows // max(batch.nbytes, 1), 1)) if is_valid else 1
            for start in range(0, n_rows, step):
                yield from self._records(batch.slice(start, step), number, is_valid)
                number += min(step, n_rows - start)
            self._read = fraction
        if self._table.is_truncated:
            yield Record(number + 1, problem=UNENDED)

    def _records(self, batch: pa.RecordBatch, before: int, is_valid: bool) -> Iterator[Record]:
        """Yield the records of a few rows; if their values cannot be converted together, one by one."""
        try:
            if not is_valid or batch.nbytes > self._max_record_bytes:
                raise ValueError
            rows = zip(*map(_values, batch.columns), strict=True) if batch.columns else [()] * batch.num_rows
            values = [dict(zip(batch.schema.names, row, strict=True)) for row in rows]
        except Exception:  # such as a timestamp that Python does not have
            # A slice of a list is validated with the values of all rows, a copied row without those of others. Only
            # Parquet's rows can be copied before they are validated, because its decoder computes the offsets.
            is_copied = self._part.file.format == "parquet"
            for row in range(batch.num_rows):
                only = batch.take(pa.array([row])) if is_copied else batch.slice(row, 1)
                yield self._record(only, before + row + 1)
        else:
            for number, value in enumerate(values, start=before + 1):
                yield Record(number, value)

    def _record(self, row: pa.RecordBatch, number: int) -> Record:
        value: dict[str, Any] = {}
        for name, column in zip(row.schema.names, row.columns, strict=True):
            try:
                column.validate(full=True)
                (value[name],) = _values(column)
            except Exception as error:
                reason = "not valid UTF-8" if "utf" in str(error).lower() else f"not readable ({error_text(error)})"
                return Record(number, problem=f'"{printable(name)}" is {reason}')
        if row.nbytes > self._max_record_bytes:
            return Record(number, problem=over_limit("row", row.nbytes, self._max_record_bytes))
        return Record(number, value)

    @property
    def bytes_read(self) -> int:
        """Estimate of the bytes of the part that have been read, in proportion to rows or record batches."""
        return int(self._part.stored_bytes * self._read)

    def close(self) -> None:
        """Close the file."""
        self._table.close()


def _columns(names: list[str], fields: Collection[str] | None) -> list[str] | None:
    """Return the columns to read; None: all."""
    if fields is None or not set(fields) - set(SYSTEM_FIELDS) <= set(names):
        return None
    return sorted(set(fields) & set(names)) or None


def _is_valid(batch: pa.RecordBatch) -> bool:
    try:
        batch.validate(full=True)
    except pa.ArrowException:
        return False
    return True


class _Table(ABC):
    """An open table."""

    schema: pa.Schema
    # Of a stream, known when all its batches have been read; other truncated files cannot be opened.
    is_truncated = False

    def __init__(self, stored: pa.NativeFile) -> None:
        self._stored = stored

    @abstractmethod
    def weights(self) -> list[int]:
        """Return the relative size of each row group or record batch."""

    @abstractmethod
    def batches(self, part: Part, columns: list[str] | None) -> Batches:
        """Yield the rows of a part."""

    def close(self) -> None:
        self._stored.close()


def _open(file: SourceFile) -> _Table:
    filesystem, path = file.resolve()
    if file.format == "parquet":
        return _Parquet(file, filesystem.open_input_file(path))
    if is_uri(file.path):
        stored = filesystem.open_input_file(path)
    else:  # up to the size with which it was listed; a stream can be appended to
        mapped = pa.memory_map(path)
        stored = pa.BufferReader(mapped.read_buffer(file.size))
    is_stream = stored.read(len(ARROW_STREAM_MAGIC)) == ARROW_STREAM_MAGIC
    stored.seek(0)
    return _ArrowStream(file, stored) if is_stream else _ArrowFile(stored)


class _Parquet(_Table):
    def __init__(self, file: SourceFile, stored: pa.NativeFile) -> None:
        if stored.size() != file.size:
            raise DataError(f"{printable(file.path)}: was changed after it was listed; run the same command again")
        super().__init__(stored)
        self._metadata = pq.read_metadata(stored)
        buffer_bytes = max(min(COLUMN_BUFFER_BYTES, BUFFER_BYTES // max(self._metadata.num_columns, 1)), 4096)
        self._file = pq.ParquetFile(stored, metadata=self._metadata, buffer_size=buffer_bytes, pre_buffer=False)
        self.schema = self._file.schema_arrow

    def weights(self) -> list[int]:
        return [max(self._group(index).total_byte_size, 0) for index in range(self._metadata.num_row_groups)]

    def batches(self, part: Part, columns: list[str] | None) -> Batches:
        groups = range(part.start, min(part.stop, self._metadata.num_row_groups))
        n_rows = sum(self._group(index).num_rows for index in groups)
        n_bytes = sum(self._group(index).total_byte_size for index in groups)
        batch_rows = min(BATCH_ROWS, max(BATCH_BYTES * n_rows // max(n_bytes, 1), 1))
        if columns and any("." in name for name in columns):  # Parquet understands it as the path in an object
            columns = None
        rows_read = 0
        for batch in self._file.iter_batches(batch_rows, list(groups), columns, use_threads=False):
            rows_read += batch.num_rows
            yield batch, min(rows_read / max(n_rows, 1), 1)
        if rows_read != n_rows:
            raise ValueError(f"it has {rows_read:,} of the {n_rows:,} rows that its footer lists")

    def _group(self, index: int) -> pq.RowGroupMetaData:
        return self._metadata.row_group(index)


class _ArrowFile(_Table):
    def __init__(self, stored: pa.NativeFile) -> None:
        super().__init__(stored)
        self._reader = pa.ipc.open_file(stored, options=pa.ipc.IpcReadOptions(use_threads=False))
        self.schema = self._reader.schema

    def weights(self) -> list[int]:
        return [1] * self._reader.num_record_batches  # their sizes are not in the footer

    def batches(self, part: Part, columns: list[str] | None) -> Batches:
        stop = min(part.stop, self._reader.num_record_batches)
        for index in range(part.start, stop):
            batch = self._reader.get_batch(index)
            yield batch if columns is None else batch.select(columns), (index + 1 - part.start) / (stop - part.start)


class _ArrowStream(_Table):
    """A stream has no index: a part begins with a pass over the batches before it, which reads only their headers.

    A stream in object storage would be read again for each part, so it is one part.
    """

    def __init__(self, file: SourceFile, stored: pa.NativeFile) -> None:
        self._file = file
        super().__init__(stored)
        self._reader = pa.ipc.open_stream(stored, options=pa.ipc.IpcReadOptions(use_threads=False))
        self.schema = self._reader.schema

    def weights(self) -> list[int]:
        if is_uri(self._file.path):
            return [1]
        self._stored.seek(0)
        messages = pa.ipc.MessageReader.open_stream(self._stored)
        return [1 for message in messages if message.type == "record batch"]

    def batches(self, part: Part, columns: list[str] | None) -> Batches:
        stop = UNBOUNDED if is_uri(self._file.path) else part.stop
        for index, batch in enumerate(self._reader):
            if index >= stop:
                return
            if index >= part.start:
                fraction = (index + 1 - part.start) / (stop - part.start)
                if stop == UNBOUNDED:
                    fraction = min(self._stored.tell() / max(self._file.size, 1), 1)
                yield batch if columns is None else batch.select(columns), fraction
        self._stored.seek(max(self._file.size - len(END_OF_STREAM), 0))
        self.is_truncated = self._stored.read(len(END_OF_STREAM)) != END_OF_STREAM


def _values(column: pa.Array) -> list[Any]:
    """Return the values of a column as JSON has them.

    Times, decimals and the like are strings, and so are binary values that are UTF-8. Others, such as images, remain bytes,
    because a document may not need them. Within the items of a list, such as messages, objects have no fields without a
    value: a table has the fields of all rows in each object, so a tool call would be written with the arguments of all
    tools.

    Raises:
        Exception: one of them has no such value.
    """
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    has_nested_items = _has_nested_items(column.type)
    if _is_json(column.type):
        values = list(column.to_pylist())
    else:
        if pa.types.is_temporal(column.type) or pa.types.is_decimal(column.type):
            with suppress(pa.ArrowNotImplementedError):  # of durations
                column = column.cast(pa.string())
        values = [_json_value(value) for value in column.to_pylist()]
    return list(map(_without_nulls_in_items, values)) if has_nested_items else values


def _has_nested_items(type_: pa.DataType) -> bool:
    """Return whether a type is, or contains in an object, a list of objects with a field that is an object or a list."""
    if pa.types.is_struct(type_):
        return any(map(_has_nested_items, _field_types(type_)))
    if not (pa.types.is_list(type_) or pa.types.is_large_list(type_)) or not pa.types.is_struct(type_.value_type):
        return False
    return any(map(pa.types.is_nested, _field_types(type_.value_type)))


def _field_types(type_: pa.DataType) -> list[pa.DataType]:
    return [type_.field(index).type for index in range(type_.num_fields)]


def _without_nulls_in_items(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls_in_items(field) for name, field in value.items()}
    if not isinstance(value, list):
        return value
    return [
        {name: _without_nulls(field) for name, field in item.items()} if isinstance(item, dict) else item
        for item in value
    ]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _is_json(type_: pa.DataType) -> bool:
    """Return whether the Python values of an Arrow type are JSON values."""
    types = pa.types
    if types.is_struct(type_):
        return all(map(_is_json, _field_types(type_)))
    if types.is_list(type_) or types.is_large_list(type_) or types.is_fixed_size_list(type_):
        return _is_json(type_.value_type)
    checks = (types.is_string, types.is_large_string, types.is_string_view, types.is_boolean, types.is_integer)
    return any(check(type_) for check in (*checks, types.is_floating, types.is_null))


def _json_value(value: Any) -> Any:
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    if isinstance(value, dict):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_json_value(item) for item in value]
    if isinstance(value, tuple) and len(value) == 2:  # an entry of a map
        return [_json_value(item) for item in value]
    return str(value)
