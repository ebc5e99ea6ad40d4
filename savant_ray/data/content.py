"""SHA-256 hashes of source files, cached by path, size, modification time, change time and inode.

Token caches are named after these hashes. Because the hashes are cached, a second run does not read the files again. A local
file counts as unchanged if path, size, modification time, change time (ctime, which programs cannot set) and inode are the
same, an object in object storage if URI, size and modification time are the same. The hash of a file that was changed less
than `SETTLED_SECONDS` before it was read is not cached, because the clock of a file system may be too coarse to distinguish
two changes in quick succession.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from savant_ray.data.atomic_files import dump_with_checksum, read_with_checksum, write_atomically
from savant_ray.data.formats import HEAD_BYTES, encoding_of, format_of
from savant_ray.data.sources import LISTING_THREADS, SourceFile, errors_as_data_error
from savant_ray.errors import DataError
from savant_ray.locations import printable

HASHES = "content-hashes.json"
BLOCK_BYTES = 1 << 20
SETTLED_SECONDS = 2.0


def content_hashes(files: Sequence[SourceFile], cache_dir: Path) -> list[str]:
    """Return the SHA-256 of each file's bytes up to its listed size; computed hashes are cached in `cache_dir`.

    Raises:
        DataError: a file cannot be read, has become shorter, or has an unsupported format.
    """
    hashes = read_with_checksum(cache_dir / HASHES)
    unknown = [file for file in files if _key(file) not in hashes]
    if unknown:
        started = time.time()
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            computed = dict(zip(map(_key, unknown), threads.map(_hash, unknown), strict=True))
        hashes |= computed
        settled = {_key(file) for file in unknown if _changed_at(file) < started - SETTLED_SECONDS}
        cacheable = {key: digest for key, digest in computed.items() if key in settled}
        if cacheable:
            stored = read_with_checksum(cache_dir / HASHES)
            write_atomically(cache_dir / HASHES, dump_with_checksum(stored | cacheable, indent=0))
    return [hashes[_key(file)] for file in files]


def refuse_changed(files: Sequence[SourceFile], hashes: Sequence[str]) -> None:
    """Check that the files have not changed since they were hashed; a file to which lines were appended is accepted.

    Raises:
        DataError: a file was changed, replaced, truncated or removed.
    """
    with ThreadPoolExecutor(LISTING_THREADS) as threads:
        list(threads.map(_refuse_changed, files, hashes))


def _refuse_changed(file: SourceFile, digest: str) -> None:
    try:
        is_same = _key(file.current()) == _key(file) or _hash(file) == digest
    except DataError as error:
        raise DataError(f"{printable(file.path)}: was changed while it was read ({error})") from error
    if not is_same:
        raise DataError(f"{printable(file.path)}: was changed while it was read; run the same command again")


def _key(file: SourceFile) -> str:
    """Return the cache key of a file, which changes whenever the file counts as changed."""
    return "|".join((file.path, str(file.size), str(file.mtime_ns), *filter(None, [file.version])))


def _changed_at(file: SourceFile) -> float:
    """Return the later of modification and change time, in seconds since the epoch."""
    ctime_ns = int(file.version.rpartition("-")[2] or 0)
    return max(file.mtime_ns, ctime_ns) / 1e9


def _hash(file: SourceFile) -> str:
    digest = hashlib.sha256()
    filesystem, path = file.resolve()
    remaining = file.size
    with errors_as_data_error(file.path, "read"), filesystem.open_input_stream(path, compression=None) as stream:
        while remaining and (block := stream.read(min(BLOCK_BYTES, remaining))):
            if remaining == file.size and not file.format and not encoding_of(block):
                format_of(block[:HEAD_BYTES], printable(file.path), setting=file.format_setting)  # raises early
            digest.update(block)
            remaining -= len(block)
    if remaining:
        raise DataError(
            f"{printable(file.path)}: has {file.size - remaining:,} of the {file.size:,} bytes it had when it was listed"
        )
    return digest.hexdigest()
