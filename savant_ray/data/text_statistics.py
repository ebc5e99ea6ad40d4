"""Statistics of text that is not prepared yet, from a sample of each source or from all of it: `savant data`.

Records become documents, ids and rows by the code that prepares text. Unlike in a run, duplicates are counted but never left
out, and all documents are packed together.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from statistics import median

import numpy as np

from savant_ray.data.documents import SourceText, encode
from savant_ray.data.overlap import document_digests
from savant_ray.data.packing import pack
from savant_ray.data.record_reader import RecordReader, plan_parts
from savant_ray.data.records import Part
from savant_ray.data.shard_writer import PartSummary
from savant_ray.data.tokenizer import MaskedDocument, Tokenizer, text_pieces
from savant_ray.locations import printable

SAMPLE_BYTES = 8 << 20  # of a source
SAMPLED_PARTS = 16  # of a source that can be divided, so that a sample does not come from its beginning alone
SAMPLE_SEED = 0
BATCH_RECORDS = 256  # tokenized in one call
MAX_NAMED_RECORDS = 5  # invalid records that are kept with their reason
N_EXAMPLES = 3  # rendered documents
MAX_EXAMPLE_CHARACTERS = 800


@dataclass
class TextStatistics:
    """Counts of what was read of a source: all of it, or a sample (`bytes_read` is less than `bytes`)."""

    name: str
    files: int
    bytes: int  # as stored
    bytes_read: int = 0
    is_limit_reached: bool = False  # then the text that was read is all that a run takes
    records: int = 0  # lines, rows, or blocks of text
    documents: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    sequences: int = 0
    padding: int = 0  # tokens
    cut_documents: int = 0  # those that are in more than one sequence
    filtered: int = 0
    duplicates: int = 0  # documents with the text of an earlier one, of this or another source
    bad_records: int = 0
    first_bad_records: list[str] = field(default_factory=list)
    lengths: dict[str, int] = field(default_factory=dict)  # number of documents by length in tokens: "256 to 511"
    shortest: int = 0  # tokens
    median: int = 0
    longest: int = 0
    examples: list[list[tuple[str, bool]]] = field(default_factory=list)  # text, and whether it is trained on


def text_statistics(
    name: str,
    text: SourceText,
    tokenizer: Tokenizer,
    sequence_length: int,
    max_record_bytes: int,
    seen: set[bytes],
    *,
    sample_bytes: int | None = SAMPLE_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TextStatistics:
    """Read a source and count.

    Args:
        name: of the source, for messages.
        text: files, and the rule by which their records become documents.
        tokenizer: encodes the documents.
        sequence_length: tokens of a packed sequence.
        max_record_bytes: larger records are invalid.
        seen: digests of the documents of earlier sources; those of this source are added.
        sample_bytes: how much is read, in parts that are spread over the source, or with a limit from its beginning; None:
            everything.
        progress: receives the bytes that were read and those that will be.

    Raises:
        DataError: a file cannot be read, or the tokenizer cannot encode a document.
    """
    statistics = TextStatistics(name, len(text.files), sum(file.size for file in text.files))
    total = min(statistics.bytes, sample_bytes or statistics.bytes)
    is_sample = total < statistics.bytes
    parts = plan_parts(text.files, -(-total // SAMPLED_PARTS) if is_sample else None)
    remaining = text.rule.limit
    if is_sample and remaining is None:
        parts = random.Random(SAMPLE_SEED).sample(parts, len(parts))
    lengths: list[int] = []
    for part in parts:
        budget = total - statistics.bytes_read
        if budget <= 0 or remaining == 0:
            break
        rule = dataclasses.replace(text.rule, limit=remaining)
        summary = PartSummary()
        with RecordReader(part, max_record_bytes, rule.fields) as records:
            documents = rule.documents(records)
            n_read = n_complete = 0  # bytes read, and those before the last block, whose records are all counted
            while batch := list(islice(documents, BATCH_RECORDS)):
                for document in batch:
                    summary.count(document)
                with_text = [document for document in batch if document.text]
                if remaining is not None:
                    remaining -= len(with_text) + sum(document.is_other_split for document in batch)
                for document, encoded in zip(with_text, encode(with_text, tokenizer), strict=True):
                    lengths.append(len(encoded.ids))
                    statistics.trained_tokens += int(encoded.is_trained.sum())
                    digest = document_digests([document.text])
                    statistics.duplicates += digest in seen
                    seen.add(digest)
                    if len(statistics.examples) < N_EXAMPLES:
                        statistics.examples.append(shown_example(tokenizer, encoded))
                if records.bytes_read > n_read:
                    n_read, n_complete = records.bytes_read, n_read
                progress(min(statistics.bytes_read + n_read, total), total)
                if is_sample and n_complete >= budget:
                    break
            else:
                n_complete = part.stored_bytes if remaining != 0 else records.bytes_read
            statistics.bytes_read += n_complete
        _add_part(statistics, part, summary)
    statistics.is_limit_reached = remaining == 0
    _add_lengths(statistics, lengths, sequence_length)
    return statistics


def named_lengths(lengths: Sequence[int]) -> dict[str, int]:
    """Return numbers of documents, as `PartSummary.lengths` has them, by the range of their lengths: "256 to 511"."""
    first = next((power for power, n_documents in enumerate(lengths) if n_documents), len(lengths))
    return {f"{1 << (power - 1)} to {(1 << power) - 1}": lengths[power] for power in range(first, len(lengths))}


def shown_example(tokenizer: Tokenizer, document: MaskedDocument) -> list[tuple[str, bool]]:
    """Return the beginning of a rendered document in pieces, and for each whether it is trained on."""
    shown: list[tuple[str, bool]] = []
    remaining = MAX_EXAMPLE_CHARACTERS
    for text, is_trained in text_pieces(tokenizer, document):
        shown.append((text[:remaining] + "…" * (len(text) > remaining), is_trained))
        remaining -= len(text)
        if remaining <= 0:
            break
    return shown


def _add_part(statistics: TextStatistics, part: Part, summary: PartSummary) -> None:
    """Add the counts of the records of a part."""
    statistics.records += summary.lines
    statistics.filtered += summary.filtered
    statistics.bad_records += summary.bad_lines
    after = f" after byte {part.start:,}" if part.start else ""
    statistics.first_bad_records += [
        f"{printable(part.file.path)}, {part.file.record_name} {number:,}{after}: {problem}"
        for number, problem in summary.first_bad_lines[: MAX_NAMED_RECORDS - len(statistics.first_bad_records)]
    ]


def _add_lengths(statistics: TextStatistics, lengths: Sequence[int], sequence_length: int) -> None:
    """Count documents and tokens, and pack the documents as a run would."""
    if not lengths:
        return
    summary = PartSummary()
    summary.count_packed(np.array(lengths), statistics.trained_tokens, pack(lengths, sequence_length))
    statistics.documents = len(lengths)
    statistics.tokens = summary.tokens
    statistics.sequences = summary.rows
    statistics.padding = summary.rows * sequence_length - summary.tokens
    statistics.cut_documents = summary.cut_documents
    statistics.shortest, statistics.longest = summary.shortest, summary.longest
    statistics.median = int(median(lengths))
    statistics.lengths = named_lengths(summary.lengths)
