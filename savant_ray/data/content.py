"""Hashes of what is in the files, remembered by path, size and time of change.

So a cache is named by content, and still a second run reads no file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from savant_ray.data.sources import SourceFile
from savant_ray.errors import DataError, doing

MEMORY = "content-hashes.json"
BLOCK_BYTES = 1 << 20


def content_hashes(files: Sequence[SourceFile], cache_dir: Path) -> list[str]:
    """SHA-256 of each file's bytes; what is hashed anew is remembered in `cache_dir`.

    Raises:
        DataError: a file cannot be read.
    """
    known = _recall(cache_dir / MEMORY)
    unknown = [file for file in files if _key(file) not in known]
    if unknown:
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            fresh = dict(zip(map(_key, unknown), threads.map(_hash, unknown), strict=True))
        known |= fresh
        write_aside(cache_dir / MEMORY, json.dumps(_recall(cache_dir / MEMORY) | fresh, indent=0))
    return [known[_key(file)] for file in files]


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


def _key(file: SourceFile) -> str:
    return f"{file.path}|{file.size}|{file.mtime_ns}"


def _recall(path: Path) -> dict[str, str]:
    try:
        remembered = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return remembered if isinstance(remembered, dict) else {}


def _hash(file: SourceFile) -> str:
    digest = hashlib.sha256()
    filesystem, path = file.resolve()
    try:
        with filesystem.open_input_stream(path, compression=None) as stream:
            while block := stream.read(BLOCK_BYTES):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{file.path}: cannot be read ({error})") from error
    return digest.hexdigest()
