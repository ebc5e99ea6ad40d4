"""One byte range → one shard: parse, tokenise, pack, write; what a Ray Data task of the preparation does.

Memory is bounded by a chunk of tokens, whatever the length of the range: a compressed file is a single one.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from savant_ray.data.content import write_aside
from savant_ray.data.jsonl import ByteRange, Line, RangeReader
from savant_ray.data.overlap import digests_path, document_digests
from savant_ray.data.packing import pack
from savant_ray.data.token_cache import shard_batch, shard_schema, token_dtype
from savant_ray.data.tokenizer import Tokenizer

BATCH_CHARACTERS = 1 << 18  # tokenised at once
CHUNK_TOKENS = 1 << 21  # packed at once: many rows, so that the last one's padding does not count
NAMED_BAD_LINES = 100


@dataclass(frozen=True)
class Recipe:
    """How text becomes rows; travels to the workers."""

    tokenizer_json: str
    sequence_length: int
    max_line_bytes: int


@dataclass
class RangeSummary:
    """What a range yielded; line numbers count from the start of the range."""

    lines: int = 0
    documents: int = 0
    tokens: int = 0
    pieces: int = 0
    rows: int = 0
    text_bytes: int = 0
    shard_bytes: int = 0
    bad_lines: int = 0
    first_bad_lines: list[tuple[int, str]] = field(default_factory=list)

    def count(self, line: Line) -> None:
        """Takes in a line of any kind."""
        self.lines = line.number
        if line.text:
            self.documents += 1
            self.text_bytes += len(line.text) if line.text.isascii() else len(line.text.encode())
        elif line.problem:
            self.bad_lines += 1
            if self.bad_lines <= NAMED_BAD_LINES:
                self.first_bad_lines.append((line.number, line.problem))

    @classmethod
    def read(cls, folder: Path, index: int) -> RangeSummary:
        """The summary that lies in `folder`."""
        return cls(**json.loads((folder / summary_name(index)).read_text()))

    @classmethod
    def is_complete(cls, folder: Path, index: int) -> bool:
        """Whether the range is done: summary and shard are there and whole."""
        try:
            summary = cls.read(folder, index)
            return not summary.rows or (folder / shard_name(index)).stat().st_size == summary.shard_bytes
        except (OSError, ValueError, TypeError):
            return False


def shard_name(index: int) -> str:
    """The file that holds the rows of a range."""
    return f"shard-{index:05d}.arrow"


def summary_name(index: int) -> str:
    """The file that says the shard is complete."""
    return f"shard-{index:05d}.json"


def write_shard(folder: Path, index: int, part: ByteRange, recipe: Recipe) -> Iterator[int]:
    """Makes shard and summary of a range; yields, as it goes on, how many of its bytes have been read.

    Raises:
        DataError: the file cannot be read.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a task has one core
    tokenizer = _tokenizer(recipe.tokenizer_json)
    summary = RangeSummary()
    chunk = _Chunk(recipe.sequence_length, tokenizer)
    shard = _ShardFile(folder / shard_name(index), chunk.schema)
    digests = digests_path(folder / shard_name(index))
    digests_aside = digests.with_name(f"{digests.name}.{os.getpid()}.tmp")
    with RangeReader(part, recipe.max_line_bytes) as lines, shard, digests_aside.open("wb") as digests_file:
        for batch in _batches(lines, summary):
            chunk.add(batch)
            digests_file.write(document_digests(line.text for line in batch))
            if chunk.tokens >= CHUNK_TOKENS:
                shard.write(chunk.pack_into(summary))
            yield lines.bytes_read
        if chunk.tokens:
            shard.write(chunk.pack_into(summary))
    digests_aside.replace(digests)
    summary.shard_bytes = shard.bytes
    write_aside(folder / summary_name(index), json.dumps(dataclasses.asdict(summary)))


@lru_cache(maxsize=1)
def _tokenizer(text: str) -> Tokenizer:
    return Tokenizer.from_json(text)


def _batches(lines: Iterable[Line], summary: RangeSummary) -> Iterator[list[Line]]:
    """The documents among `lines`, about BATCH_CHARACTERS at a time."""
    batch: list[Line] = []
    characters = 0
    for line in lines:
        summary.count(line)
        if line.text:
            batch.append(line)
            characters += len(line.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    yield batch


class _Chunk:
    """Tokenised documents that wait to be packed together."""

    def __init__(self, sequence_length: int, tokenizer: Tokenizer) -> None:
        self.tokens = 0
        self.schema = shard_schema(sequence_length, tokenizer.vocab_size)
        self._sequence_length = sequence_length
        self._tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._documents: list[NDArray[np.unsignedinteger]] = []
        self._lines: list[int] = []

    def add(self, batch: Sequence[Line]) -> None:
        """Tokenises the lines' texts and ends each with the end-of-document token."""
        end = self._tokenizer.end_of_document
        for line, ids in zip(batch, self._tokenizer.encode_batch([line.text for line in batch]), strict=True):
            ids.append(end)
            self._documents.append(np.array(ids, dtype=self._dtype))
            self._lines.append(line.number)
            self.tokens += len(ids)

    def pack_into(self, summary: RangeSummary) -> pa.RecordBatch:
        """The rows of the chunk, counted in `summary`; the chunk is empty afterwards."""
        lengths = np.array([len(document) for document in self._documents], dtype=np.int64)
        packing = pack(lengths.tolist(), self._sequence_length)
        rows = packing.fill(np.concatenate(self._documents), np.cumsum(lengths) - lengths)
        lines = np.array(self._lines, dtype=np.uint32)[packing.documents]
        summary.rows += len(packing)
        summary.pieces += len(packing.lengths)
        summary.tokens += self.tokens
        self._documents, self._lines, self.tokens = [], [], 0
        return shard_batch(self.schema, rows, packing.row_ends, packing.lengths, lines)


class _ShardFile:
    """An Arrow file that is there when it is complete; without rows it is never there."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.bytes = 0
        self._path = path
        self._aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        self._schema = schema
        self._writer: pa.ipc.RecordBatchFileWriter | None = None

    def __enter__(self) -> _ShardFile:
        return self

    def write(self, batch: pa.RecordBatch) -> None:
        """Appends rows."""
        if self._writer is None:
            self._writer = pa.ipc.new_file(str(self._aside), self._schema)
        self._writer.write_batch(batch)

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        if self._writer is None:
            return
        self._writer.close()
        if failed:
            self._aside.unlink()
        else:
            self.bytes = self._aside.stat().st_size
            self._aside.replace(self._path)
