"""Writes a shard: reads the records of a part of a file, or of several small files, tokenizes and packs the documents.

Memory is bounded by `CHUNK_TOKENS`, not by the length of the part, because a compressed file is a single part.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise, zip_longest
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from savant_ray.data.atomic_files import dump_with_checksum, load_with_checksum, write_atomically
from savant_ray.data.deduplication import without_duplicates
from savant_ray.data.documents import TEXT_RULE, Document, DocumentRule, encode
from savant_ray.data.overlap import DIGEST_BYTES, digests_path, document_digests
from savant_ray.data.packing import Packing, pack
from savant_ray.data.record_reader import PartsReader, RecordReader, RuledPart, plan_parts, records_before
from savant_ray.data.sources import SourceFile
from savant_ray.data.token_cache import Manifest, ShardFile, crc32, shard_batch, shard_schema, token_dtype
from savant_ray.data.tokenizer import MaskedDocument, Tokenizer
from savant_ray.errors import DataError
from savant_ray.locations import error_text, replacing

BATCH_CHARACTERS = 1 << 18  # tokenized in one call
CHUNK_TOKENS = 1 << 21  # packed in one call; large enough for the padding of the last row to be negligible
MAX_NAMED_INVALID_LINES = 100  # stored with line number and reason, per part and per cache
# Counts of a shard that are known for each of its parts, and whose sums over the parts of a file are in the manifest.
COUNTS_OF_PARTS = ("lines", "documents", "bad_lines", "filtered", "duplicates")
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
class PartSummary:
    """Counts of the parts of a shard; numbers of lines (rows, blocks) start from 1 at the beginning of the first part.

    The fields are the keys of the summary file. `bad_lines` is the number of invalid lines; `target_tokens`, `text_bytes`
    and `trained_bytes` are those of `Manifest`.
    """

    lines: int = 0
    documents: int = 0
    tokens: int = 0
    target_tokens: int = 0
    rows: int = 0
    text_bytes: int = 0
    trained_bytes: int = 0
    shard_bytes: int = 0
    shard_crc32: int = 0
    bad_lines: int = 0
    first_bad_lines: list[tuple[int, str]] = field(default_factory=list)
    characters: int = 0  # of the documents
    dropped_characters: int = 0  # those for which the tokenizer has neither a token nor an unknown token
    first_dropped: tuple[int, str] | None = None  # line number and its dropped characters
    filtered: int = 0  # lines that were left out by a filter or by sampling
    duplicates: int = 0  # lines that were left out because the same text has occurred before
    conversations: int = 0  # lines that were read as conversations, also if they are invalid or left out afterwards
    trained_tokens: int = 0  # tokens that are not masked
    cut_documents: int = 0  # documents of which no row has all tokens
    shortest: int = 0  # tokens of a document
    longest: int = 0
    # Number of documents by the bit length of their length in tokens: the entry k is for 2**(k - 1) to 2**k - 1 tokens.
    lengths: list[int] = field(default_factory=list)
    ends: list[list[int]] = field(default_factory=list)  # COUNTS_OF_PARTS after each part; older versions had one part

    def end_part(self) -> None:
        """Begin the next part: what is counted from now on belongs to it."""
        self.ends.append(self._counts())

    def of_parts(self) -> list[dict[str, int]]:
        """Return the counts `COUNTS_OF_PARTS` of each part."""
        ends = [[0] * len(COUNTS_OF_PARTS), *(self.ends or [self._counts()])]
        differences = ([after - before for before, after in zip(*pair, strict=True)] for pair in pairwise(ends))
        return [dict(zip(COUNTS_OF_PARTS, counts, strict=True)) for counts in differences]

    def _counts(self) -> list[int]:
        return [getattr(self, name) for name in COUNTS_OF_PARTS]

    def count(self, document: Document) -> None:
        """Count a document, or a line without one."""
        self.lines = document.number
        text = document.text
        if text:
            n_bytes = _utf8_bytes(text)
            ranges = document.trained
            self.documents += 1
            self.characters += len(text)
            self.text_bytes += n_bytes
            self.trained_bytes += n_bytes if ranges is None else sum(_utf8_bytes(text[slice(*pair)]) for pair in ranges)
        elif document.problem:
            self.bad_lines += 1
            if self.bad_lines <= MAX_NAMED_INVALID_LINES:
                self.first_bad_lines.append((document.number, document.problem))
        self.filtered += document.filtered
        self.duplicates += document.is_duplicate
        self.conversations += document.is_conversation

    def count_packed(self, lengths: NDArray[np.int64], n_trained: int, packing: Packing) -> None:
        """Count documents that were packed together.

        Args:
            lengths: of the documents in tokens, [N].
            n_trained: how many of the tokens are not masked.
            packing: of the documents into rows.
        """
        self.rows += len(packing)
        self.tokens += int(lengths.sum())
        self.trained_tokens += n_trained
        self.cut_documents += int((np.bincount(packing.documents, minlength=len(lengths)) > 1).sum())
        self.shortest = min(self.shortest or int(lengths.min()), int(lengths.min()))
        self.longest = max(self.longest, int(lengths.max()))
        self.lengths = sums_by_position([self.lengths, np.bincount(np.frexp(lengths)[1]).tolist()])

    def count_dropped(self, document: Document, dropped: int, characters: str) -> None:
        """Count the characters of a document that the tokenizer drops."""
        self.dropped_characters += dropped
        if dropped and self.first_dropped is None:
            self.first_dropped = (document.number, characters[:MAX_NAMED_CHARACTERS])

    @classmethod
    def read(cls, shard: Path) -> PartSummary:
        """Load the summary that is beside a shard.

        Raises:
            OSError, ValueError, TypeError: it is missing or damaged.
        """
        return cls(**load_with_checksum(summary_path(shard).read_text()))

    @classmethod
    def is_complete(cls, shard: Path) -> bool:
        """Return whether summary, shard and digests exist and are intact; reads the shard to verify its checksum."""
        try:
            summary = cls.read(shard)
            if not summary.rows:
                return True
            has_size = shard.stat().st_size == summary.shard_bytes
            has_digests = digests_path(shard).stat().st_size == DIGEST_BYTES * summary.documents
            return has_size and has_digests and crc32(shard) == summary.shard_crc32
        except (OSError, ValueError, TypeError):
            return False


def damaged_digests(folder: Path, manifest: Manifest) -> list[str]:
    """Return a message for each file with the digests of a shard's documents that is missing or has another size."""
    problems: list[str] = []
    for shard in manifest.shards:
        path = digests_path(folder / shard.name)
        try:
            expected = DIGEST_BYTES * PartSummary.read(folder / shard.name).documents
            if (size := path.stat().st_size) != expected:
                problems.append(f"{path}: has {size:,} of {expected:,} bytes")
        except (OSError, ValueError, TypeError) as error:
            problems.append(f"{path}: cannot be used ({error_text(error)})")
    return problems


def sums_by_position(lists: Iterable[Sequence[int]]) -> list[int]:
    """Return the sum of the entries at each position; a shorter list has zeros at its end."""
    return [sum(entries) for entries in zip_longest(*lists, fillvalue=0)]


def shard_name(index: int) -> str:
    """Return the name of the file with the rows of a shard."""
    return f"shard-{index:05d}.arrow"


def summary_path(shard: Path) -> Path:
    """Return the path of the file with the summary of a shard's parts; it is written when the shard is complete."""
    return shard.with_suffix(".json")


def write_shard(folder: Path, index: int, parts: Sequence[RuledPart], recipe: Recipe) -> Iterator[int]:
    """Write shard and summary of some parts; yield the number of their bytes that have been read so far.

    Raises:
        DataError: the file cannot be read, or the tokenizer cannot encode one of the lines.
    """
    summary = PartSummary()
    reader = PartsReader(parts, recipe.max_line_bytes, summary.end_part)
    try:
        for _ in write_documents(folder, index, without_duplicates(reader, folder, index), recipe, summary):
            yield reader.bytes_read
    except UnencodableDocumentError as error:
        part, number = reader.locate(error.number)
        number += records_before(part, recipe.max_line_bytes)
        raise DataError(f"{part.file.path} {part.file.record_name} {number:,}: {error}") from error


def write_documents(
    folder: Path, index: int, documents: Iterable[Document], recipe: Recipe, summary: PartSummary
) -> Iterator[None]:
    """Write a shard of these documents and its summary, to which their counts are added; yield after each batch of them.

    Raises:
        UnencodableDocumentError: the tokenizer cannot encode one of them.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a task has one CPU
    tokenizer = tokenizer_of(recipe)
    chunk = _Chunk(recipe.sequence_length, tokenizer)
    path = folder / shard_name(index)
    shard = ShardFile(path, chunk.schema)
    with shard, replacing(digests_path(path)) as temporary, temporary.open("wb") as digests_file:
        for batch in _batches(documents, summary):
            chunk.add(batch, summary)
            digests_file.write(document_digests(document.text for document in batch))
            if chunk.tokens >= CHUNK_TOKENS:
                shard.write(chunk.pack_rows(summary))
            yield
        if chunk.tokens:
            shard.write(chunk.pack_rows(summary))
    summary.shard_bytes, summary.shard_crc32 = shard.bytes, shard.crc32
    write_atomically(summary_path(path), dump_with_checksum(dataclasses.asdict(summary)))


@lru_cache(maxsize=1)
def tokenizer_of(recipe: Recipe) -> Tokenizer:
    """Build the tokenizer of a recipe."""
    return Tokenizer.from_json(
        recipe.tokenizer_json, recipe.tokenizer_name, recipe.end_of_document, recipe.add_special_tokens
    )


def _batches(documents: Iterable[Document], summary: PartSummary) -> Iterator[list[Document]]:
    """Yield the documents that have a text in batches of about BATCH_CHARACTERS."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        summary.count(document)
        if document.text:
            batch.append(document)
            characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    yield batch


def check_encodable(
    file: SourceFile, tokenizer: Tokenizer, rule: DocumentRule = TEXT_RULE, characters: int = BATCH_CHARACTERS
) -> None:
    """Check that the tokenizer can encode the first `characters` of a file, so that a wrong one is reported early.

    Raises:
        DataError: the tokenizer cannot encode one of the lines, or the file cannot be read.
    """
    for part in plan_parts([file])[:1]:
        with RecordReader(part, fields=rule.fields) as records:
            for document in rule.documents(records):
                try:
                    tokenizer.encode(document.text[:characters])
                except DataError as error:
                    raise DataError(f"{file.path} {part.file.record_name} {document.number:,}: {error}") from error
                characters -= len(document.text) + 1
                if characters <= 0:
                    break


class UnencodableDocumentError(Exception):
    """A document that the tokenizer cannot encode; `number` is its number in the part."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(reason)
        self.number = number


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


class _Chunk:
    """Tokenized documents that are packed together."""

    def __init__(self, sequence_length: int, tokenizer: Tokenizer) -> None:
        self.tokens = 0
        self.schema = shard_schema(sequence_length, tokenizer.vocab_size)
        self._sequence_length = sequence_length
        self._tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._documents: list[NDArray[np.unsignedinteger]] = []
        self._masked: list[NDArray[np.bool_]] = []
        self._lines: list[int] = []

    def add(self, batch: Sequence[Document], summary: PartSummary) -> None:
        """Tokenize the documents.

        Raises:
            UnencodableDocumentError: the tokenizer cannot encode one of them.
        """
        for document, (ids, is_trained) in zip(batch, self._encode(batch), strict=True):
            summary.count_dropped(document, *self._tokenizer.dropped_characters(document.text))
            self._documents.append(np.array(ids, dtype=self._dtype))
            self._masked.append(~is_trained)
            self._lines.append(document.number)
            self.tokens += len(ids)

    def _encode(self, batch: Sequence[Document]) -> list[MaskedDocument]:
        try:
            return encode(batch, self._tokenizer)
        except DataError:
            for document in batch:
                try:
                    self._tokenizer.encode(document.text)
                except DataError as error:
                    raise UnencodableDocumentError(document.number, str(error)) from error
            raise

    def pack_rows(self, summary: PartSummary) -> pa.RecordBatch:
        """Pack the documents into rows, add their counts to `summary`, and clear the chunk."""
        lengths = np.array([len(document) for document in self._documents], dtype=np.int64)
        packing = pack(lengths.tolist(), self._sequence_length)
        starts = np.cumsum(lengths) - lengths
        is_masked = np.concatenate(self._masked)
        rows, masked = (packing.fill(values, starts) for values in (np.concatenate(self._documents), is_masked))
        is_first_masked = is_masked[starts[packing.documents] + packing.starts]  # the first token of each piece
        lines = np.array(self._lines, dtype=np.uint32)[packing.documents]
        summary.count_packed(lengths, int((~is_masked).sum()), packing)
        summary.target_tokens += int((~is_masked).sum() - (~is_first_masked).sum())
        self._documents, self._masked, self._lines, self.tokens = [], [], [], 0
        return shard_batch(self.schema, rows, masked, packing.row_ends, packing.lengths, lines)
