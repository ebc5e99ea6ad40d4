"""Writes the shard of one part of a file: reads the records, tokenizes and packs the documents.

Memory is bounded by `CHUNK_TOKENS`, not by the length of the part, because a compressed file is a single part.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from savant_ray.data.atomic_files import dump_with_checksum, load_with_checksum, write_atomically
from savant_ray.data.documents import TEXT_RULE, Document
from savant_ray.data.overlap import digests_path, document_digests
from savant_ray.data.packing import pack
from savant_ray.data.record_reader import open_records, plan_parts, records_before
from savant_ray.data.records import Part
from savant_ray.data.sources import SourceFile
from savant_ray.data.token_cache import ShardFile, crc32, shard_batch, shard_schema, token_dtype
from savant_ray.data.tokenizer import Tokenizer
from savant_ray.errors import DataError

BATCH_CHARACTERS = 1 << 18  # tokenized in one call
CHUNK_TOKENS = 1 << 21  # packed in one call; large enough for the padding of the last row to be negligible
MAX_NAMED_INVALID_LINES = 100  # stored with line number and reason, per range and per cache
MAX_NAMED_CHARACTERS = 10  # at most this many dropped characters are stored, from the first line that has any


@dataclass(frozen=True)
class Recipe:
    """Parameters of tokenization and packing, as they are sent to the tasks."""

    tokenizer_json: str
    tokenizer_name: str
    end_of_document: str | None
    add_special_tokens: bool
    sequence_length: int
    max_line_bytes: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, sequence_length: int, max_line_bytes: int) -> Recipe:
        """Build the recipe for a tokenizer."""
        return cls(
            tokenizer_json=tokenizer.to_json(),
            tokenizer_name=tokenizer.name,
            end_of_document=tokenizer.end_name,
            add_special_tokens=tokenizer.adds_special_tokens,
            sequence_length=sequence_length,
            max_line_bytes=max_line_bytes,
        )


@dataclass
class RangeSummary:
    """Counts of one part; numbers of lines (rows, blocks) start from 1 at the beginning of the part.

    The fields are the keys of the summary file. `bad_lines` is the number of invalid lines, `pieces` that of the documents
    and parts of documents that the rows contain.
    """

    lines: int = 0
    documents: int = 0
    tokens: int = 0
    pieces: int = 0
    rows: int = 0
    text_bytes: int = 0
    shard_bytes: int = 0
    shard_crc32: int | None = None  # None: written by a version without checksums
    bad_lines: int = 0
    first_bad_lines: list[tuple[int, str]] = field(default_factory=list)
    characters: int = 0  # of the documents
    dropped_characters: int = 0  # those for which the tokenizer has neither a token nor an unknown token
    first_dropped: tuple[int, str] | None = None  # line number and its dropped characters

    def count(self, line: Document) -> None:
        """Count a line of any kind."""
        self.lines = line.number
        if line.text:
            self.documents += 1
            self.characters += len(line.text)
            self.text_bytes += len(line.text) if line.text.isascii() else len(line.text.encode())
        elif line.problem:
            self.bad_lines += 1
            if self.bad_lines <= MAX_NAMED_INVALID_LINES:
                self.first_bad_lines.append((line.number, line.problem))

    def count_dropped(self, line: Document, dropped: int, characters: str) -> None:
        """Count the characters of a line that the tokenizer drops."""
        self.dropped_characters += dropped
        if dropped and self.first_dropped is None:
            self.first_dropped = (line.number, characters[:MAX_NAMED_CHARACTERS])

    @classmethod
    def read(cls, folder: Path, index: int) -> RangeSummary:
        """Load the summary of a range from `folder`.

        Raises:
            OSError, ValueError, TypeError: it is missing or damaged.
        """
        return cls(**load_with_checksum((folder / summary_name(index)).read_text()))

    @classmethod
    def is_complete(cls, folder: Path, index: int) -> bool:
        """Return whether summary and shard exist and are intact; reads the shard to verify its checksum."""
        shard = folder / shard_name(index)
        try:
            summary = cls.read(folder, index)
            if not summary.rows:
                return True
            has_size = shard.stat().st_size == summary.shard_bytes
            return has_size and (summary.shard_crc32 is None or crc32(shard) == summary.shard_crc32)
        except (OSError, ValueError, TypeError):
            return False


def shard_name(index: int) -> str:
    """Return the name of the file with the rows of a range."""
    return f"shard-{index:05d}.arrow"


def summary_name(index: int) -> str:
    """Return the name of the file with the summary of a range; the file is written when the shard is complete."""
    return f"shard-{index:05d}.json"


def write_shard(folder: Path, index: int, part: Part, recipe: Recipe) -> Iterator[int]:
    """Write shard and summary of a range; yield the number of its bytes that have been read so far.

    Raises:
        DataError: the file cannot be read, or the tokenizer cannot encode one of the lines.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a task has one CPU
    tokenizer = tokenizer_of(recipe)
    summary = RangeSummary()
    chunk = _Chunk(recipe.sequence_length, tokenizer)
    shard = ShardFile(folder / shard_name(index), chunk.schema)
    digests = digests_path(folder / shard_name(index))
    temporary_digests = digests.with_name(f"{digests.name}.{os.getpid()}.tmp")
    with open_records(part, recipe.max_line_bytes) as records, shard, temporary_digests.open("wb") as digests_file:
        for batch in _batches(TEXT_RULE.documents(records), summary):
            try:
                chunk.add(batch, summary)
            except _UnencodableLineError as error:
                number = records_before(part, recipe.max_line_bytes) + error.line
                where = f"{part.file.path} {part.file.record_name} {number:,}"
                raise DataError(f"{where}: {error}") from error
            digests_file.write(document_digests(line.text for line in batch))
            if chunk.tokens >= CHUNK_TOKENS:
                shard.write(chunk.pack_rows(summary))
            yield records.bytes_read
        if chunk.tokens:
            shard.write(chunk.pack_rows(summary))
    temporary_digests.replace(digests)
    summary.shard_bytes, summary.shard_crc32 = shard.bytes, shard.crc32
    write_atomically(folder / summary_name(index), dump_with_checksum(dataclasses.asdict(summary)))


@lru_cache(maxsize=1)
def tokenizer_of(recipe: Recipe) -> Tokenizer:
    """Build the tokenizer of a recipe."""
    return Tokenizer.from_json(
        recipe.tokenizer_json, recipe.tokenizer_name, recipe.end_of_document, recipe.add_special_tokens
    )


def _batches(lines: Iterable[Document], summary: RangeSummary) -> Iterator[list[Document]]:
    """Yield the lines that are documents in batches of about BATCH_CHARACTERS."""
    batch: list[Document] = []
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


def check_encodable(file: SourceFile, tokenizer: Tokenizer, characters: int = BATCH_CHARACTERS) -> None:
    """Check that the tokenizer can encode the first `characters` of a file, so that a wrong one is reported early.

    Raises:
        DataError: the tokenizer cannot encode one of the lines, or the file cannot be read.
    """
    for part in plan_parts([file])[:1]:
        with open_records(part) as records:
            for line in TEXT_RULE.documents(records):
                try:
                    tokenizer.encode(line.text[:characters])
                except DataError as error:
                    raise DataError(f"{file.path} {part.file.record_name} {line.number:,}: {error}") from error
                characters -= len(line.text) + 1
                if characters <= 0:
                    break


class _UnencodableLineError(Exception):
    """A line that the tokenizer cannot encode; `line` is its number, from 1 at the beginning of the range."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


class _Chunk:
    """Tokenized documents that are packed together."""

    def __init__(self, sequence_length: int, tokenizer: Tokenizer) -> None:
        self.tokens = 0
        self.schema = shard_schema(sequence_length, tokenizer.vocab_size)
        self._sequence_length = sequence_length
        self._tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._documents: list[NDArray[np.unsignedinteger]] = []
        self._lines: list[int] = []

    def add(self, batch: Sequence[Document], summary: RangeSummary) -> None:
        """Tokenize the texts of the lines as documents.

        Raises:
            _UnencodableLineError: the tokenizer cannot encode one of them.
        """
        for line, ids in zip(batch, self._encode(batch), strict=True):
            summary.count_dropped(line, *self._tokenizer.dropped_characters(line.text))
            self._documents.append(np.array(ids, dtype=self._dtype))
            self._lines.append(line.number)
            self.tokens += len(ids)

    def _encode(self, batch: Sequence[Document]) -> list[list[int]]:
        try:
            return self._tokenizer.encode_documents([line.text for line in batch])
        except DataError:
            for line in batch:
                try:
                    self._tokenizer.encode(line.text)
                except DataError as error:
                    raise _UnencodableLineError(line.number, str(error)) from error
            raise

    def pack_rows(self, summary: RangeSummary) -> pa.RecordBatch:
        """Pack the documents into rows, add their counts to `summary`, and clear the chunk."""
        lengths = np.array([len(document) for document in self._documents], dtype=np.int64)
        packing = pack(lengths.tolist(), self._sequence_length)
        rows = packing.fill(np.concatenate(self._documents), np.cumsum(lengths) - lengths)
        lines = np.array(self._lines, dtype=np.uint32)[packing.documents]
        summary.rows += len(packing)
        summary.pieces += len(packing.lengths)
        summary.tokens += self.tokens
        self._documents, self._lines, self.tokens = [], [], 0
        return shard_batch(self.schema, rows, packing.row_ends, packing.lengths, lines)
