"""Packed sequences on disk: written once, then any row by its number.

    <name>-<fingerprint>/
    ├── shard-00000.arrow   Arrow IPC: tokens [rows, sequence_length], piece lengths and line numbers per row
    ├── shard-00000.documents  a 64-bit digest of each document (see overlap.py)
    ├── shard-00000.json    what the range yielded, and the shard's CRC-32; written after its shard
    ├── manifest.json       the sum of all; a folder under this name is complete
    └── checked.json        size, inode and times of the shards whose CRC-32 was compared

The folder's name covers the content of the files, so a cache is never out of date. Shards are memory-mapped: a read
costs the rows it asks for. Every node needs the folder under the same path.

A shard is read whole and compared with its checksum once after it was written, and again when its size, inode or times
have changed since; so a launch usually costs one `stat` per shard. Caches of earlier versions have no checksums: only
the sizes of their shards are compared.
"""

from __future__ import annotations

import dataclasses
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from savant_ray.data.content import write_aside
from savant_ray.data.sealed import seal, unseal
from savant_ray.errors import DataError

Unsigned = NDArray[np.unsignedinteger]

MANIFEST = "manifest.json"
CHECKED = "checked.json"
OPEN_SHARDS = 64
BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class Sequences:
    """`tokens` [N, T] int32 and `document_ids` [N, T] int32: 0, 1, 2 … within a row, -1 (and token 0) for padding."""

    tokens: NDArray[np.int32]
    document_ids: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> Sequences:
        return Sequences(self.tokens[rows], self.document_ids[rows])

    @classmethod
    def empty(cls, n: int, sequence_length: int) -> Sequences:
        """`n` rows of padding."""
        shape = (n, sequence_length)
        return cls(np.zeros(shape, dtype=np.int32), np.full(shape, -1, dtype=np.int32))


@dataclass(frozen=True)
class BadLine:
    """A line that is no document."""

    file: str
    line: int
    reason: str


@dataclass(frozen=True)
class FileSummary:
    """What one file held; `path` is relative to the folder that all files share."""

    path: str
    lines: int
    documents: int
    bad_lines: int


@dataclass(frozen=True)
class ShardInfo:
    """A shard, the file it comes from and how many of that file's lines lie before it."""

    name: str
    bytes: int
    rows: int
    file: str
    lines_before: int
    crc32: int | None = None  # None: written by a version without checksums


@dataclass(frozen=True)
class Manifest:
    """What a token cache holds."""

    fingerprint: str
    sequence_length: int
    files: tuple[FileSummary, ...]
    shards: tuple[ShardInfo, ...]
    rows: int
    documents: int
    tokens: int
    target_tokens: int  # tokens less one per piece: the last token of a piece has no target
    text_bytes: int  # UTF-8 bytes of the documents
    bad_lines: int
    first_bad_lines: tuple[BadLine, ...]
    characters: int = 0  # of the documents; 0 if written by a version that did not count them
    dropped_characters: int = 0  # of them, for which the tokenizer has no token and no unknown token
    first_dropped: BadLine | None = None  # the first line with such characters; `reason` lists some of them

    @property
    def padding(self) -> int:
        """Positions without a token."""
        return self.rows * self.sequence_length - self.tokens

    def to_json(self) -> str:
        """The manifest as it lies in the folder."""
        return seal(dataclasses.asdict(self) | {"padding": self.padding}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """The inverse of `to_json`.

        Raises:
            ValueError, KeyError, TypeError: the text is not what `to_json` returned.
        """
        values = unseal(text)
        del values["padding"]
        values["files"] = tuple(FileSummary(**each) for each in values["files"])
        values["shards"] = tuple(ShardInfo(**each) for each in values["shards"])
        values["first_bad_lines"] = tuple(BadLine(**each) for each in values["first_bad_lines"])
        if values.get("first_dropped"):
            values["first_dropped"] = BadLine(**values["first_dropped"])
        return cls(**values)


def bad_line_report(manifest: Manifest, verdict: str = "skipped") -> list[str]:
    """A sentence for each bad line that the manifest names, and one for those it only counts."""
    summaries = {each.path: each for each in manifest.files}
    sentences = [
        f"{bad.file} line {bad.line}: {bad.reason}; {verdict}, "
        f"{summaries[bad.file].bad_lines:,} of {summaries[bad.file].lines:,} lines"
        for bad in manifest.first_bad_lines
    ]
    unnamed = manifest.bad_lines - len(sentences)
    return [*sentences, f"… and {unnamed:,} more bad lines"] if unnamed else sentences


def dropped_report(manifest: Manifest, tokenizer: str) -> list[str]:
    """Return a sentence about the characters that the tokenizer drops, or nothing if it drops none."""
    first = manifest.first_dropped
    if first is None:
        return []
    return [
        f"{tokenizer} has no token for {manifest.dropped_characters:,} of {manifest.characters:,} characters and leaves "
        f"them out, first in {first.file} line {first.line:,} ({' '.join(first.reason)}); one with an unknown token or byte "
        "fallback would not"
    ]


def damaged_shards(folder: Path, manifest: Manifest, progress: Callable[[int, int], None]) -> list[str]:
    """Return a sentence for each shard that is missing or not what was written.

    Reads the shards that have changed since they were last compared with their checksums, several at a time; `progress`
    gets the bytes read and the bytes to read.
    """
    checked, states = _read_checked(folder), {}
    problems: list[str] = []
    unchecked: list[ShardInfo] = []
    for shard in manifest.shards:
        try:
            states[shard.name] = _state(folder / shard.name)
        except OSError as error:
            problems.append(f"{folder / shard.name}: cannot be read ({error.strerror})")
            continue
        if states[shard.name][0] != shard.bytes:
            problems.append(f"{folder / shard.name}: has {states[shard.name][0]:,} of {shard.bytes:,} bytes")
        elif shard.crc32 is not None and checked.get(shard.name) != states[shard.name]:
            unchecked.append(shard)
    right = dict(zip([shard.name for shard in unchecked], _compare_checksums(folder, unchecked, progress), strict=True))
    problems += [f"{folder / name}: not what was written (its checksum differs)" for name in right if not right[name]]
    if any(right.values()):
        known = {name: state for name, state in states.items() if right.get(name, checked.get(name) == state)}
        with suppress(OSError):  # a cache that others own: compared again by the next launch
            write_aside(folder / CHECKED, seal(known))
    return problems


def _compare_checksums(
    folder: Path, shards: Sequence[ShardInfo], progress: Callable[[int, int], None]
) -> Iterator[bool]:
    def is_right(shard: ShardInfo) -> bool:
        try:
            return crc32(folder / shard.name) == shard.crc32
        except OSError:
            return False

    done, total = 0, sum(shard.bytes for shard in shards)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for shard, right in zip(shards, threads.map(is_right, shards), strict=True):
            done += shard.bytes
            progress(done, total)
            yield right


def crc32(path: Path) -> int:
    """Return the CRC-32 of a file. Raises OSError."""
    checksum = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _state(path: Path) -> list[int]:
    """What changes when a file is written to."""
    status = path.stat()
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def _read_checked(folder: Path) -> dict[str, Any]:
    try:
        return unseal((folder / CHECKED).read_text())
    except (OSError, ValueError):
        return {}


class TokenCache:
    """The rows of a cache folder, numbered over all shards."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._shard_ends = np.cumsum([shard.rows for shard in manifest.shards], dtype=np.int64)
        self._open: OrderedDict[int, _Shard] = OrderedDict()

    @classmethod
    def open(cls, folder: str | Path) -> TokenCache:
        """An existing cache.

        Raises:
            DataError: the folder is no cache, or a shard is missing or cut short.
        """
        folder = Path(folder)
        try:
            manifest = Manifest.from_json((folder / MANIFEST).read_text())
            sizes = [(folder / shard.name).stat().st_size for shard in manifest.shards]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{folder}: no complete token cache ({error}); the same command again repairs it"
            ) from error
        for shard, size in zip(manifest.shards, sizes, strict=True):
            if size != shard.bytes:
                raise DataError(
                    f"{folder / shard.name}: has {size:,} of {shard.bytes:,} bytes; the same command again repairs it"
                )
        return cls(folder, manifest)

    @property
    def n_sequences(self) -> int:
        """How many rows there are."""
        return self.manifest.rows

    @property
    def sequence_length(self) -> int:
        """Tokens per row, padding included."""
        return self.manifest.sequence_length

    @property
    def fingerprint(self) -> str:
        """The same for the same files, tokenizer and sequence length, and only for them."""
        return self.manifest.fingerprint

    def take(self, rows: NDArray[np.int64]) -> Sequences:
        """The rows of these numbers, in this order."""
        result = Sequences.empty(len(rows), self.sequence_length)
        shards = np.searchsorted(self._shard_ends, rows, side="right")
        for index in np.unique(shards):
            here = np.flatnonzero(shards == index)
            shard = self._shard(int(index))
            for place, row in zip(here.tolist(), (rows[here] - self._first_row(int(index))).tolist(), strict=True):
                batch, at = shard.find(row)
                lengths = batch.lengths(at)
                result.tokens[place] = batch.tokens[at]
                result.document_ids[place, : lengths.sum()] = np.repeat(np.arange(len(lengths)), lengths)
        return result

    def documents(self, row: int) -> list[tuple[str, int]]:
        """File and line of each document in the row, in order: where to look when a micro-batch goes wrong."""
        index = int(np.searchsorted(self._shard_ends, row, side="right"))
        info = self.manifest.shards[index]
        batch, at = self._shard(index).find(row - self._first_row(index))
        return [(info.file, info.lines_before + int(line)) for line in batch.lines(at)]

    def _first_row(self, shard: int) -> int:
        return int(self._shard_ends[shard]) - self.manifest.shards[shard].rows

    def _shard(self, index: int) -> _Shard:
        """Opened shards are kept, the least recently used one is closed first."""
        shard = self._open.pop(index, None) or _Shard(self.folder / self.manifest.shards[index].name)
        self._open[index] = shard
        if len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)
        return shard


class _Shard:
    """A memory-mapped Arrow file."""

    def __init__(self, path: Path) -> None:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._batches = [_Batch(reader.get_batch(i)) for i in range(reader.num_record_batches)]
        self._ends = np.cumsum([len(batch.tokens) for batch in self._batches])

    def find(self, row: int) -> tuple[_Batch, int]:
        """The record batch that holds the row, and where."""
        index = int(np.searchsorted(self._ends, row, side="right"))
        return self._batches[index], row - (int(self._ends[index - 1]) if index else 0)


class _Batch:
    """A chunk of rows as NumPy arrays on the mapped file."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        tokens, lengths, lines = batch.columns
        self.tokens: Unsigned = tokens.values.to_numpy(zero_copy_only=True).reshape(-1, tokens.type.list_size)
        self._ends = lengths.offsets.to_numpy(zero_copy_only=True)
        self._lengths: Unsigned = lengths.values.to_numpy(zero_copy_only=True)
        self._lines: Unsigned = lines.values.to_numpy(zero_copy_only=True)

    def lengths(self, row: int) -> Unsigned:
        """The lengths of the row's pieces."""
        return self._lengths[self._ends[row] : self._ends[row + 1]]

    def lines(self, row: int) -> Unsigned:
        """The line numbers of the row's pieces, counted from the start of the range."""
        return self._lines[self._ends[row] : self._ends[row + 1]]


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """The smallest type that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def shard_schema(sequence_length: int, vocab_size: int) -> pa.Schema:
    """The columns of a shard."""
    tokens = pa.list_(pa.from_numpy_dtype(token_dtype(vocab_size)), sequence_length)
    return pa.schema({"tokens": tokens, "lengths": pa.list_(pa.uint32()), "lines": pa.list_(pa.uint32())})


def shard_batch(
    schema: pa.Schema, rows: Unsigned, row_ends: NDArray[np.int64], lengths: NDArray[Any], lines: NDArray[Any]
) -> pa.RecordBatch:
    """Rows [N, T] and the length and line number of each piece; row i ends with piece `row_ends[i] - 1`."""
    ends = pa.array(np.concatenate(([0], row_ends)), pa.int32())
    tokens = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), type=schema.field("tokens").type)
    lists = [pa.ListArray.from_arrays(ends, pa.array(each, pa.uint32())) for each in (lengths, lines)]
    return pa.RecordBatch.from_arrays([tokens, *lists], schema=schema)
