"""Finds exact duplicates among the documents of a source before its shards are written.

A task per shard writes a scan: the 64-bit digest and the record number of each document. The first document with a digest
stays, in the order of sources, files and records; the record numbers of the others are written into a file that the task
which writes the shard reads. A preparation that is interrupted continues with the scans, or with this result, if they are
written. Digests of earlier sources are in their token caches, so each source is scanned once. The driver needs about 60
bytes of memory per document of the source that is scanned.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from savant_ray.data.atomic_files import write_atomically
from savant_ray.data.documents import Document
from savant_ray.data.overlap import Digests, document_digests, which_occur
from savant_ray.data.record_reader import PartsReader, RuledPart
from savant_ray.locations import replacing

MARKED = "duplicates-marked"  # name of the file that exists when the duplicates in all parts have been found
DOCUMENTS_PER_REPORT = 1 << 10


def scan_path(folder: Path, index: int) -> Path:
    """Return the path of the scan of a shard's parts."""
    return folder / f"scan-{index:05d}.npz"


def duplicates_path(folder: Path, index: int) -> Path:
    """Return the path of the file with the record numbers of the duplicates in a shard; absent if there are none."""
    return folder / f"duplicates-{index:05d}.npy"


def is_marked(folder: Path) -> bool:
    """Return whether the duplicates in all shards have been found."""
    return (folder / MARKED).exists()


def write_scan(folder: Path, index: int, parts: Sequence[RuledPart], max_line_bytes: int) -> Iterator[int]:
    """Write the scan of a shard's parts; yield the number of their bytes that have been read so far.

    Raises:
        DataError: the file cannot be read.
    """
    digests, numbers = bytearray(), array("L")
    reader = PartsReader(parts, max_line_bytes)
    for document in reader:
        if document.text:
            digests += document_digests([document.text])
            numbers.append(document.number)
            if not len(numbers) % DOCUMENTS_PER_REPORT:
                yield reader.bytes_read
    path = scan_path(folder, index)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, digests=np.frombuffer(digests, np.uint64), numbers=np.array(numbers, dtype=np.uint32))
    yield reader.bytes_read


def mark_duplicates(folder: Path, n_shards: int, earlier: Iterable[Digests]) -> None:
    """Write the record numbers of the duplicates in each shard, and delete the scans.

    `earlier` are digests of documents that come before those of the scans.
    """
    scans = [_load(scan_path(folder, index)) for index in range(n_shards)]
    digests = np.concatenate([np.empty(0, np.uint64), *(digests for digests, _ in scans)])
    unique, first = np.unique(digests, return_index=True)
    is_kept = np.zeros(len(digests), dtype=bool)
    is_kept[first[~which_occur(unique, earlier)]] = True
    ends = np.cumsum([len(numbers) for _, numbers in scans], dtype=np.int64)
    for index, ((_, numbers), end) in enumerate(zip(scans, ends.tolist(), strict=True)):
        duplicates = numbers[~is_kept[end - len(numbers) : end]]
        if len(duplicates):
            with duplicates_path(folder, index).open("wb") as file:
                np.save(file, duplicates)
    write_atomically(folder / MARKED, "")
    for index in range(n_shards):
        scan_path(folder, index).unlink(missing_ok=True)


def without_duplicates(documents: Iterable[Document], folder: Path, index: int) -> Iterator[Document]:
    """Yield the documents of a shard with a mark in place of each duplicate."""
    path = duplicates_path(folder, index)
    if not path.exists():
        yield from documents
        return
    numbers = iter(np.load(path))
    duplicate = next(numbers, None)
    for document in documents:
        if document.number == duplicate:
            duplicate = next(numbers, None)
            yield Document(document.number, is_duplicate=True, is_conversation=document.is_conversation)
        else:
            yield document


def _load(path: Path) -> tuple[Digests, NDArray[np.uint32]]:
    with np.load(path) as scan:
        return scan["digests"], scan["numbers"]
