"""Held-out text that is in the training text, too: files are left out, single documents are counted.

Each shard of a token cache has a file beside it with a 64-bit digest of each of its documents, in order. So the count
needs no text, memory only for the digests of the validation text, and it is remembered for each pair of caches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from savant_ray.data.content import content_hashes, fingerprint, write_aside
from savant_ray.data.sealed import seal, unseal
from savant_ray.data.sources import SourceFile
from savant_ray.data.token_cache import TokenCache

DIGEST_BYTES = 8
DIGESTS_AT_ONCE = 1 << 20  # of the training text held in memory

Digests = NDArray[np.uint64]


def split_held_out(
    files: Sequence[SourceFile], held_out: Sequence[SourceFile], cache_dir: Path
) -> tuple[list[SourceFile], list[SourceFile]]:
    """Split `files` into those to train on and those whose content is that of a held-out file, whatever their names.

    Raises:
        DataError: a file cannot be read.
    """
    sizes = {file.size for file in held_out if file.size} & {file.size for file in files}
    if not sizes:
        return list(files), []
    candidates = [file for file in files if file.size in sizes]
    hashes = dict(zip(candidates, content_hashes(candidates, cache_dir), strict=True))
    held_out_hashes = set(content_hashes([file for file in held_out if file.size in sizes], cache_dir))
    kept = [file for file in files if hashes.get(file) not in held_out_hashes]
    return kept, [file for file in files if hashes.get(file) in held_out_hashes]


def document_digests(texts: Iterable[str]) -> bytes:
    """Return the digests of the texts, one after the other."""
    return b"".join(hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest() for text in texts)


def digests_path(shard: Path) -> Path:
    """Return where the digests of a shard's documents are."""
    return shard.with_suffix(".documents")


def count_held_out_documents(validation: TokenCache, sources: Sequence[TokenCache]) -> int | None:
    """Return how many validation documents occur verbatim in the sources.

    None: a cache is of a version that kept no digests.
    """
    identity = fingerprint({"validation": validation.fingerprint, "sources": [cache.fingerprint for cache in sources]})
    path = validation.folder.parent / f"overlap-{identity[:16]}.json"
    if (remembered := _remembered(path)) is not None:
        return remembered
    try:
        count = _count(validation, sources)
    except FileNotFoundError:
        return None
    write_aside(path, seal({"documents": count}))
    return count


def _remembered(path: Path) -> int | None:
    """Return the count that was written to `path`; None if there is none, or if it was altered."""
    try:
        return int(unseal(path.read_text(encoding="utf-8"))["documents"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None


def _count(validation: TokenCache, sources: Sequence[TokenCache]) -> int:
    held_out = np.concatenate([np.empty(0, np.uint64), *_digests(validation)])
    wanted, counts = np.unique(held_out, return_counts=True)
    if not len(wanted):
        return 0
    occurs = np.zeros(len(wanted), dtype=bool)
    for source in sources:
        for digests in _digests(source):
            at = np.minimum(np.searchsorted(wanted, digests), len(wanted) - 1)
            occurs[at[wanted[at] == digests]] = True
    return int(counts[occurs].sum())


def _digests(cache: TokenCache) -> Iterator[Digests]:
    """Yield the digests of all shards. Raises FileNotFoundError if the cache has none."""
    for shard in cache.manifest.shards:
        with digests_path(cache.folder / shard.name).open("rb") as file:
            while len(digests := np.fromfile(file, np.uint64, DIGESTS_AT_ONCE)):
                yield digests
