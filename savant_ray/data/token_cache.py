"""Token cache: packed sequences on disk with random access by row number.

    <name>-<fingerprint>/
    ├── shard-00000.arrow      Arrow IPC: tokens [rows, sequence_length]; of each row the lengths and line numbers of its
    │                          pieces, and a bit per position, set if its token is masked (null: none is)
    ├── shard-00000.documents  64-bit digest of each document (see overlap.py)
    ├── shard-00000.json       counts of its parts and CRC-32 of the shard; written after the shard
    ├── manifest.json          totals and list of shards; written last
    └── checked.json           size, inode and times of the shards whose CRC-32 was verified

A piece is a document, or the part of one that a row contains (see packing.py). A masked token is input of the model, but
its prediction is not trained on.

The fingerprint includes the content hashes of the files, so changed files get another cache. Shards are memory-mapped:
reading a row loads only that row. All nodes need the folder under the same path.

The CRC-32 of a shard is verified once after it was written, and again when its inode or times have changed, so a run usually
starts without reading the shards. The digests have no checksum, but their size is verified.
"""

from __future__ import annotations

import dataclasses
import os
import zlib
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from savant_ray.data.atomic_files import dump_with_checksum, load_with_checksum, read_with_checksum, write_atomically
from savant_ray.data.tokenizer import MaskedDocument
from savant_ray.errors import DataError

Unsigned = NDArray[np.unsignedinteger]

MANIFEST = "manifest.json"
CHECKED = "checked.json"
MAX_OPEN_SHARDS = 64
BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class Sequences:
    """Rows of tokens: `tokens` [N, T] int32, `document_ids` [N, T] int32, `is_trained` [N, T] bool.

    Document ids are 0, 1, 2 … within a row; padding has document id -1 and token 0. `is_trained` is false for masked tokens
    only, so padding has true.
    """

    tokens: NDArray[np.int32]
    document_ids: NDArray[np.int32]
    is_trained: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> Sequences:
        return Sequences(self.tokens[rows], self.document_ids[rows], self.is_trained[rows])

    @classmethod
    def empty(cls, n: int, sequence_length: int) -> Sequences:
        """Return `n` rows of padding."""
        shape = (n, sequence_length)
        return cls(np.zeros(shape, dtype=np.int32), np.full(shape, -1, dtype=np.int32), np.ones(shape, dtype=bool))


@dataclass(frozen=True)
class LineProblem:
    """A line of a source file that a message names.

    `reason` is why the line is invalid or, for a valid line, characters that the tokenizer drops.
    """

    file: str
    line: int
    reason: str


@dataclass(frozen=True)
class FileSummary:
    """Line counts of one file; `path` is relative to the folder that all files share. `lines` includes blank lines."""

    path: str
    lines: int
    documents: int
    bad_lines: int
    filtered: int = 0  # lines left out by a filter or by sampling
    duplicates: int = 0  # lines left out because the same text has occurred before
    unit: str = "line"  # what messages call a line: "row" in a table, for example


@dataclass(frozen=True)
class ShardInfo:
    """A shard, its source file, and the number of lines of that file before it.

    A shard of several small files has the complete files; `more_files` has the name of each one after the first, and the
    number of the shard's lines before it.
    """

    name: str
    bytes: int
    rows: int
    file: str
    lines_before: int
    crc32: int
    more_files: tuple[tuple[str, int], ...] = ()

    def locate(self, line: int) -> tuple[str, int]:
        """Return the file of a line of the shard, and its number in the file."""
        index = bisect_left(self.more_files, line, key=lambda entry: entry[1])
        if index == 0:
            return self.file, self.lines_before + line
        name, before = self.more_files[index - 1]
        return name, line - before


@dataclass(frozen=True)
class Manifest:
    """Contents of a token cache; the fields are the keys of `manifest.json`, so their names cannot change.

    `bad_lines` is the number of invalid lines.
    """

    fingerprint: str
    sequence_length: int
    files: tuple[FileSummary, ...]
    shards: tuple[ShardInfo, ...]
    rows: int
    documents: int
    tokens: int
    target_tokens: int  # tokens that are predicted: neither masked nor the first of a piece
    text_bytes: int  # UTF-8 bytes of the documents
    trained_bytes: int  # of these, without masked text
    bad_lines: int
    first_bad_lines: tuple[LineProblem, ...]
    characters: int = 0  # of the documents
    dropped_characters: int = 0  # those for which the tokenizer has neither a token nor an unknown token
    first_dropped: LineProblem | None = None  # the first line with such characters
    filtered: int = 0  # lines left out by a filter or by sampling
    duplicates: int = 0  # lines left out because the same text has occurred before
    conversations: int = 0  # lines that were read as conversations, also if they are invalid or left out afterwards
    trained_tokens: int = 0  # this and the following as in `PartSummary`; zero and empty in caches of older versions
    cut_documents: int = 0
    shortest: int = 0
    longest: int = 0
    lengths: tuple[int, ...] = ()

    @property
    def padding(self) -> int:
        """Number of positions without a token."""
        return self.rows * self.sequence_length - self.tokens

    def unit(self, path: str) -> str:
        """Return what messages call a line of a file."""
        return next((file.unit for file in self.files if file.path == path), "line")

    def to_json(self) -> str:
        """Return the text of the manifest file."""
        return dump_with_checksum(dataclasses.asdict(self) | {"padding": self.padding}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Build a manifest from the text that `to_json` returned.

        Raises:
            ValueError, KeyError, TypeError: the text is damaged.
        """
        values = load_with_checksum(text)
        del values["padding"]
        values["files"] = tuple(FileSummary(**entry) for entry in values["files"])
        values["shards"] = tuple(
            ShardInfo(**entry | {"more_files": tuple(map(tuple, entry.get("more_files", ())))})
            for entry in values["shards"]
        )
        values["first_bad_lines"] = tuple(LineProblem(**entry) for entry in values["first_bad_lines"])
        values["lengths"] = tuple(values.get("lengths", ()))
        if values.get("first_dropped"):
            values["first_dropped"] = LineProblem(**values["first_dropped"])
        return cls(**values)


def invalid_line_report(manifest: Manifest, verdict: str = "skipped") -> list[str]:
    """Return a message for each invalid line that the manifest lists, and one with the number of the others."""
    summaries = {file.path: file for file in manifest.files}
    messages = [
        f"{invalid.file} {file.unit} {invalid.line}: {invalid.reason}; {verdict}, "
        f"{file.bad_lines:,} of {file.lines:,} {file.unit}s"
        for invalid in manifest.first_bad_lines
        for file in [summaries[invalid.file]]
    ]
    unnamed = manifest.bad_lines - len(messages)
    units = {file.unit for file in manifest.files if file.bad_lines}
    unit = units.pop() if len(units) == 1 else "record"
    return [*messages, f"… and {unnamed:,} more invalid {unit}s"] if unnamed else messages


def dropped_report(manifest: Manifest, tokenizer: str) -> list[str]:
    """Return one message about the characters that the tokenizer drops; no message if it drops none."""
    first = manifest.first_dropped
    if first is None:
        return []
    return [
        f"{tokenizer} has no token for {manifest.dropped_characters:,} of {manifest.characters:,} characters and drops "
        f"them, first in {first.file} {manifest.unit(first.file)} {first.line:,} ({' '.join(first.reason)}); a tokenizer "
        "with an unknown token or byte fallback drops none"
    ]


def damaged_shards(folder: Path, manifest: Manifest, progress: Callable[[int, int], None]) -> list[str]:
    """Return a message for each shard that is missing or damaged.

    Reads the shards that have changed since their checksums were verified, several in parallel; `progress` receives the
    number of bytes read and the total.
    """
    checked, states = read_with_checksum(folder / CHECKED), {}
    problems: list[str] = []
    unchecked: list[ShardInfo] = []
    for shard in manifest.shards:
        try:
            states[shard.name] = _file_state(folder / shard.name)
        except OSError as error:
            problems.append(f"{folder / shard.name}: cannot be read ({error.strerror})")
            continue
        if states[shard.name][0] != shard.bytes:
            problems.append(f"{folder / shard.name}: has {states[shard.name][0]:,} of {shard.bytes:,} bytes")
        elif checked.get(shard.name) != states[shard.name]:
            unchecked.append(shard)
    names = [shard.name for shard in unchecked]
    is_intact = dict(zip(names, _verify_checksums(folder, unchecked, progress), strict=True))
    problems += [f"{folder / name}: damaged (its checksum differs)" for name in names if not is_intact[name]]
    if any(is_intact.values()):
        unchanged = {name: state for name, state in states.items() if checked.get(name) == state}
        verified = unchanged | {name: states[name] for name in names if is_intact[name]}
        with suppress(OSError):  # if the cache belongs to another user, the next run verifies the shards again
            write_atomically(folder / CHECKED, dump_with_checksum(verified))
    return problems


def _verify_checksums(
    folder: Path, shards: Sequence[ShardInfo], progress: Callable[[int, int], None]
) -> Iterator[bool]:
    """Yield for each shard whether its checksum matches; the shards are read in parallel."""

    def is_intact(shard: ShardInfo) -> bool:
        try:
            return crc32(folder / shard.name) == shard.crc32
        except OSError:
            return False

    done, total = 0, sum(shard.bytes for shard in shards)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for shard, intact in zip(shards, threads.map(is_intact, shards), strict=True):
            done += shard.bytes
            progress(done, total)
            yield intact


def crc32(path: Path) -> int:
    """Return the CRC-32 of a file. Raises OSError."""
    checksum = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _file_state(path: Path) -> list[int]:
    """Return size, inode and times of a file; at least one of them changes when the file is written."""
    status = path.stat()
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


class TokenCache:
    """Random access to the rows of a cache folder, which are numbered across all shards."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._shard_ends = np.cumsum([shard.rows for shard in manifest.shards], dtype=np.int64)
        self._open: OrderedDict[int, _Shard] = OrderedDict()

    @classmethod
    def open(cls, folder: str | Path) -> TokenCache:
        """Open an existing cache.

        Raises:
            DataError: the folder is not a complete cache, or a shard is missing or truncated.
        """
        folder = Path(folder)
        try:
            manifest = Manifest.from_json((folder / MANIFEST).read_text())
            sizes = [(folder / shard.name).stat().st_size for shard in manifest.shards]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{folder}: not a complete token cache ({error}); run the same command again to repair it"
            ) from error
        for shard, size in zip(manifest.shards, sizes, strict=True):
            if size != shard.bytes:
                raise DataError(
                    f"{folder / shard.name}: has {size:,} of {shard.bytes:,} bytes; run the same command again to repair it"
                )
        return cls(folder, manifest)

    @property
    def n_sequences(self) -> int:
        """Number of rows."""
        return self.manifest.rows

    @property
    def sequence_length(self) -> int:
        """Tokens per row, padding included."""
        return self.manifest.sequence_length

    @property
    def fingerprint(self) -> str:
        """Identifier of the rows: equal for equal files, rules, tokenizers, sequence lengths and line limits."""
        return self.manifest.fingerprint

    def take(self, rows: NDArray[np.int64]) -> Sequences:
        """Return the rows with these numbers, in this order."""
        result = Sequences.empty(len(rows), self.sequence_length)
        shards = np.searchsorted(self._shard_ends, rows, side="right")
        for index in np.unique(shards):
            positions = np.flatnonzero(shards == index)
            shard = self._shard(int(index))
            rows_in_shard = rows[positions] - self._first_row(int(index))
            for position, row in zip(positions.tolist(), rows_in_shard.tolist(), strict=True):
                batch, row_in_batch = shard.find(row)
                lengths = batch.lengths(row_in_batch)
                result.tokens[position] = batch.tokens[row_in_batch]
                result.document_ids[position, : lengths.sum()] = np.repeat(np.arange(len(lengths)), lengths)
                result.is_trained[position] = ~batch.masked(row_in_batch)
        return result

    def examples(self, n: int) -> list[MaskedDocument]:
        """Return ids and loss mask of up to `n` documents, or parts of them, from rows that are spread over the cache."""
        rows = self.take(np.unique(np.linspace(0, self.n_sequences - 1, n).astype(np.int64)))
        parts = [
            [
                MaskedDocument(rows.tokens[row][is_own].tolist(), rows.is_trained[row][is_own])
                for is_own in _documents_of(rows.document_ids[row])
            ]
            for row in range(len(rows))
        ]
        in_turn = (part for nth_parts in zip_longest(*parts) for part in nth_parts if part is not None)
        return list(islice(in_turn, n))

    def documents(self, row: int) -> list[tuple[str, int]]:
        """Return file and line number of each document in a row, for messages about a micro-batch."""
        index = int(np.searchsorted(self._shard_ends, row, side="right"))
        info = self.manifest.shards[index]
        batch, row_in_batch = self._shard(index).find(row - self._first_row(index))
        return [info.locate(int(line)) for line in batch.lines(row_in_batch)]

    def _first_row(self, shard: int) -> int:
        return int(self._shard_ends[shard]) - self.manifest.shards[shard].rows

    def _shard(self, index: int) -> _Shard:
        """Return the shard, opened if necessary; if more than `MAX_OPEN_SHARDS` are open, close the least recently used."""
        shard = self._open.pop(index, None) or _Shard(self.folder / self.manifest.shards[index].name)
        self._open[index] = shard
        if len(self._open) > MAX_OPEN_SHARDS:
            self._open.popitem(last=False)
        return shard


def _documents_of(document_ids: NDArray[np.int32]) -> list[NDArray[np.bool_]]:
    """Return for each document of a row the positions that it has, as a mask [T]."""
    return [document_ids == number for number in range(document_ids.max() + 1)]


class _Shard:
    """Memory-mapped Arrow file."""

    def __init__(self, path: Path) -> None:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._batches = [_Batch(reader.get_batch(i)) for i in range(reader.num_record_batches)]
        self._ends = np.cumsum([len(batch.tokens) for batch in self._batches])

    def find(self, row: int) -> tuple[_Batch, int]:
        """Return the record batch that contains the row, and the row's number in it."""
        index = int(np.searchsorted(self._ends, row, side="right"))
        return self._batches[index], row - (int(self._ends[index - 1]) if index else 0)


class _Batch:
    """Record batch as NumPy arrays that are backed by the mapped file."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        tokens, lengths, lines, self._masked = batch.columns
        self.tokens: Unsigned = tokens.values.to_numpy(zero_copy_only=True).reshape(-1, tokens.type.list_size)
        self._offsets = lengths.offsets.to_numpy(zero_copy_only=True)
        self._lengths: Unsigned = lengths.values.to_numpy(zero_copy_only=True)
        self._lines: Unsigned = lines.values.to_numpy(zero_copy_only=True)

    def lengths(self, row: int) -> Unsigned:
        """Return the lengths of the pieces of a row."""
        return self._lengths[self._offsets[row] : self._offsets[row + 1]]

    def masked(self, row: int) -> NDArray[np.bool_]:
        """Return for each position of a row whether its token is masked."""
        length = self.tokens.shape[1]
        bits = self._masked[row].as_buffer()
        if bits is None:
            return np.zeros(length, dtype=bool)
        return np.unpackbits(np.frombuffer(bits, dtype=np.uint8), count=length).view(bool)

    def lines(self, row: int) -> Unsigned:
        """Return the line numbers of the pieces of a row, counted from the start of the shard's first part."""
        return self._lines[self._offsets[row] : self._offsets[row + 1]]


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """Return the smallest type that can represent all token ids."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def shard_schema(sequence_length: int, vocab_size: int) -> pa.Schema:
    """Return the Arrow schema of a shard."""
    tokens = pa.list_(pa.from_numpy_dtype(token_dtype(vocab_size)), sequence_length)
    numbers = pa.list_(pa.uint32())
    return pa.schema({"tokens": tokens, "lengths": numbers, "lines": numbers, "masked": pa.binary()})


def shard_batch(
    schema: pa.Schema,
    rows: Unsigned,
    masked: NDArray[np.bool_],
    row_ends: NDArray[np.int64],
    lengths: NDArray[Any],
    lines: NDArray[Any],
) -> pa.RecordBatch:
    """Build a record batch from rows [N, T], their masked tokens [N, T], and the length and line of each piece.

    Row i ends before piece `row_ends[i]`.
    """
    offsets = pa.array(np.concatenate(([0], row_ends)), pa.int32())
    tokens = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), type=schema.field("tokens").type)
    lists = [pa.ListArray.from_arrays(offsets, pa.array(values, pa.uint32())) for values in (lengths, lines)]
    bits = np.packbits(masked, axis=1)
    has_mask = np.any(masked, axis=1).tolist()
    masks = [row.tobytes() if has_any else None for row, has_any in zip(bits, has_mask, strict=True)]
    return pa.RecordBatch.from_arrays([tokens, *lists, pa.array(masks, pa.binary())], schema=schema)


class ShardFile:
    """Arrow file that is written under a temporary name and renamed when it is complete; not created without rows."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.bytes = 0
        self.crc32 = 0
        self._path = path
        self._temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        self._schema = schema
        self._writer: pa.ipc.RecordBatchFileWriter | None = None

    def __enter__(self) -> ShardFile:
        return self

    def write(self, batch: pa.RecordBatch) -> None:
        """Append rows."""
        if self._writer is None:
            self._writer = pa.ipc.new_file(str(self._temporary), self._schema)
        self._writer.write_batch(batch)

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        if self._writer is None:
            return
        self._writer.close()
        if failed:
            self._temporary.unlink()
        else:
            self.bytes, self.crc32 = self._temporary.stat().st_size, crc32(self._temporary)
            self._temporary.replace(self._path)
