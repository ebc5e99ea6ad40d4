"""Hashes of what is in the files, remembered by path, size, times of change and inode.

So a cache is named by content, and still a second run reads no file. What is trusted: a local file whose path, size,
modification time, change time (ctime, which no program can set) and inode are the same has not been changed; in object
storage size and modification time. A file that was changed less than `SETTLED_SECONDS` before it was hashed is hashed
again next time, because a file system's clock ticks too slowly to tell two changes at once apart.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from savant_ray.data.formats import HEAD_BYTES, format_of
from savant_ray.data.sealed import seal, unseal
from savant_ray.data.sources import LISTING_THREADS, SourceFile
from savant_ray.errors import DataError, SavantError, doing
from savant_ray.locations import printable, why

MEMORY = "content-hashes.json"
BLOCK_BYTES = 1 << 20
SETTLED_SECONDS = 2.0


def content_hashes(files: Sequence[SourceFile], cache_dir: Path) -> list[str]:
    """SHA-256 of each file's bytes up to its listed size; what is hashed anew is remembered in `cache_dir`.

    Raises:
        DataError: a file cannot be read, has become shorter, or is not what its name says.
    """
    known = _recall(cache_dir / MEMORY)
    unknown = [file for file in files if _key(file) not in known]
    if unknown:
        started = time.time()
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            fresh = dict(zip(map(_key, unknown), threads.map(_hash, unknown), strict=True))
        known |= fresh
        settled = {_key(file) for file in unknown if _changed_at(file) < started - SETTLED_SECONDS}
        remembered = {key: digest for key, digest in fresh.items() if key in settled}
        if remembered:
            write_aside(cache_dir / MEMORY, seal(_recall(cache_dir / MEMORY) | remembered, indent=0))
    return [known[_key(file)] for file in files]


def refuse_changed(files: Sequence[SourceFile], hashes: Sequence[str]) -> None:
    """Check that what was read is what was hashed; a file that only grew since it was listed is.

    Raises:
        DataError: a file was changed, replaced, cut short or removed.
    """
    with ThreadPoolExecutor(LISTING_THREADS) as threads:
        list(threads.map(_refuse_changed, files, hashes))


def fingerprint(values: dict[str, Any]) -> str:
    """SHA-256 of plain values, the same in every process."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def write_aside(path: Path, text: str) -> None:
    """Writes a file that is complete or absent; creates its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with doing(f"writing {path}"):
        try:
            aside.write_text(text, encoding="utf-8")
            aside.replace(path)
        except OSError:
            aside.unlink(missing_ok=True)
            raise


def _refuse_changed(file: SourceFile, digest: str) -> None:
    try:
        same = _key(file.current()) == _key(file) or _hash(file) == digest
    except DataError as error:
        raise DataError(f"{printable(file.path)}: was changed while it was read ({error})") from error
    if not same:
        raise DataError(f"{printable(file.path)}: was changed while it was read; run the same command again")


def _key(file: SourceFile) -> str:
    return "|".join((file.path, str(file.size), str(file.mtime_ns), *filter(None, [file.version])))


def _changed_at(file: SourceFile) -> float:
    """The later of modification and change time, seconds since the epoch."""
    ctime_ns = int(file.version.rpartition("-")[2] or 0)
    return max(file.mtime_ns, ctime_ns) / 1e9


def _recall(path: Path) -> dict[str, str]:
    try:
        return unseal(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # without it, or altered: everything is hashed anew
        return {}


def _hash(file: SourceFile) -> str:
    digest = hashlib.sha256()
    filesystem, path = file.resolve()
    left = file.size
    try:
        with filesystem.open_input_stream(path, compression=None) as stream:
            while left and (block := stream.read(min(BLOCK_BYTES, left))):
                if left == file.size:
                    _refuse_other_format(file, block[:HEAD_BYTES])
                digest.update(block)
                left -= len(block)
    except SavantError:
        raise
    except Exception as error:  # a file system that is written in Python may raise anything
        raise DataError(f"{printable(file.path)}: cannot be read ({why(error)})") from error
    if left:
        raise DataError(
            f"{printable(file.path)}: has {file.size - left:,} of the {file.size:,} bytes that it had when it was listed"
        )
    return digest.hexdigest()


def _refuse_other_format(file: SourceFile, head: bytes) -> None:
    """What is listed without a look into it, in object storage, has to be what its name says."""
    found = format_of(head, printable(file.path))
    if found != (file.codec or "text"):
        raise DataError(
            f"{printable(file.path)}: its name says {file.codec or 'plain text'}, but it is {found}; rename it"
        )
