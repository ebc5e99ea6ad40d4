"""Writes small files atomically, and JSON objects with a checksum.

JSON objects without a checksum, as earlier versions wrote them, are accepted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from savant_ray.errors import error_context
from savant_ray.locations import replacing

CHECKSUM = "sha256"  # key of the checksum in the object


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that readers see either its previous or its complete new content; create its folder.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with error_context(f"writing {path}"), replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def fingerprint(values: Mapping[str, Any]) -> str:
    """Return the SHA-256 of plain values, which is the same in every process."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def dump_with_checksum(values: Mapping[str, Any], indent: int | None = None) -> str:
    """Return a JSON object with the checksum of `values` as an additional key."""
    return json.dumps({**values, CHECKSUM: fingerprint(values)}, indent=indent)


def load_with_checksum(text: str) -> dict[str, Any]:
    """Return the values that were passed to `dump_with_checksum`.

    Raises:
        ValueError: the text is not a JSON object, or its checksum does not match.
    """
    try:
        values = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, found {type(values).__name__}")
    checksum = values.pop(CHECKSUM, None)
    if checksum is not None and checksum != fingerprint(values):
        raise ValueError("its checksum differs")
    return values


def read_with_checksum(path: Path) -> dict[str, Any]:
    """Return the values in a file that `dump_with_checksum` made; none if it is missing or damaged."""
    try:
        return load_with_checksum(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
