"""Detects documents that are in the text more than once, and validation text in the training text.

Validation files are excluded from the training text; single documents are counted. Each shard of a token cache has a file
with a 64-bit digest of each of its documents, in order. Counting therefore reads no text, and keeps in memory only the
digests of the validation text, or about `MAX_DIGESTS` of the training text. Counts are cached for each set of caches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from savant_ray.data.atomic_files import dump_with_checksum, fingerprint, load_with_checksum, write_atomically
from savant_ray.data.content import content_hashes
from savant_ray.data.sources import SourceFile
from savant_ray.data.token_cache import TokenCache

DIGEST_BYTES = 8
MAX_DIGESTS = 1 << 22  # of distinct documents that are compared in one pass over all digests
BLOCK_DIGESTS = 1 << 20  # digests of the training text in memory at a time
OVERLAP, DUPLICATES = "overlap-", "duplicates-"  # prefixes of files with counts, in the folder of the token caches

Digests = NDArray[np.uint64]


def split_held_out(
    files: Sequence[SourceFile], held_out: Sequence[SourceFile], cache_dir: Path
) -> tuple[list[SourceFile], list[SourceFile]]:
    """Split `files` into those for training and those that have the same content as a held-out file.

    Raises:
        DataError: a file cannot be read.
    """
    # Only files with equal sizes can have the same content; the others are not hashed.
    sizes = {file.size for file in held_out if file.size} & {file.size for file in files}
    if not sizes:
        return list(files), []
    candidates = [file for file in files if file.size in sizes]
    hashes = dict(zip(candidates, content_hashes(candidates, cache_dir), strict=True))
    held_out_hashes = set(content_hashes([file for file in held_out if file.size in sizes], cache_dir))
    kept = [file for file in files if hashes.get(file) not in held_out_hashes]
    return kept, [file for file in files if hashes.get(file) in held_out_hashes]


def document_digests(texts: Iterable[str]) -> bytes:
    """Return the concatenated digests of the texts."""
    return b"".join(hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest() for text in texts)


def digests_path(shard: Path) -> Path:
    """Return the path of the file with the digests of a shard's documents."""
    return shard.with_suffix(".documents")


def count_overlapping_documents(validation: TokenCache, sources: Sequence[TokenCache]) -> int | None:
    """Return how many validation documents occur verbatim in the sources.

    Returns None if one of the caches was written by a version that stored no digests.
    """
    identity = fingerprint({"validation": validation.fingerprint, "sources": [cache.fingerprint for cache in sources]})
    path = validation.folder.parent / f"{OVERLAP}{identity[:16]}.json"
    counts = _cached_counts(path, 1, lambda: [_count(validation, sources)])
    return None if counts is None else counts[0]


def count_duplicates(sources: Sequence[TokenCache], max_digests: int = MAX_DIGESTS) -> list[int] | None:
    """Return how many documents of each source occur before: in the same source, or in an earlier one.

    Returns None if one of the caches was written by a version that stored no digests.
    """
    identity = fingerprint({"sources": [cache.fingerprint for cache in sources]})
    path = sources[0].folder.parent / f"{DUPLICATES}{identity[:16]}.json"
    return _cached_counts(path, len(sources), lambda: _count_duplicates(sources, max_digests))


def _cached_counts(path: Path, n_counts: int, count: Callable[[], list[int]]) -> list[int] | None:
    """Return `n_counts` counts from a file; if it is missing or damaged, count and write it. None without digests."""
    try:
        cached = load_with_checksum(path.read_text(encoding="utf-8"))["documents"]
        counts = [int(number) for number in (cached if isinstance(cached, list) else [cached])]
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        counts = []
    if len(counts) != n_counts:
        try:
            counts = count()
        except FileNotFoundError:
            return None
        write_atomically(path, dump_with_checksum({"documents": counts}))
    return counts


def _count_duplicates(sources: Sequence[TokenCache], max_digests: int) -> list[int]:
    """Count in as many passes as are needed to keep at most about `max_digests` in memory; each has its own digests."""
    n_passes = -(-sum(source.manifest.documents for source in sources) // max_digests)
    counts = [0] * len(sources)
    for number in range(n_passes):
        seen = np.empty(0, np.uint64)
        for index, source in enumerate(sources):
            of_pass = (digests[digests % np.uint64(n_passes) == number] for digests in stored_digests(source))
            for digests in _concatenated(of_pass, max_digests):
                n_seen, seen = len(seen), np.union1d(seen, digests)
                counts[index] += len(digests) - (len(seen) - n_seen)
    return counts


def _concatenated(blocks: Iterable[Digests], min_digests: int) -> Iterator[Digests]:
    """Yield the blocks, concatenated to arrays of at least `min_digests` except for the last one."""
    pending: list[Digests] = []
    for block in blocks:
        pending.append(block)
        if sum(map(len, pending)) >= min_digests:
            yield np.concatenate(pending)
            pending = []
    if pending:
        yield np.concatenate(pending)


def _count(validation: TokenCache, sources: Sequence[TokenCache]) -> int:
    held_out = np.concatenate([np.empty(0, np.uint64), *stored_digests(validation)])
    unique, counts = np.unique(held_out, return_counts=True)
    return int(counts[which_occur(unique, stored_digests(*sources))].sum())


def which_occur(unique: Digests, blocks: Iterable[Digests]) -> NDArray[np.bool_]:
    """Return for each of the digests, which are sorted and distinct, whether it is in one of the blocks."""
    occurs = np.zeros(len(unique), dtype=bool)
    for block in blocks if len(unique) else ():
        nearest = np.minimum(np.searchsorted(unique, block), len(unique) - 1)
        occurs[nearest[unique[nearest] == block]] = True
    return occurs


def stored_digests(*caches: TokenCache) -> Iterator[Digests]:
    """Yield the digests of all shards in blocks; raise FileNotFoundError if a cache has none."""
    for cache in caches:
        for shard in cache.manifest.shards:
            with digests_path(cache.folder / shard.name).open("rb") as file:
                while len(digests := np.fromfile(file, np.uint64, BLOCK_DIGESTS)):
                    yield digests
