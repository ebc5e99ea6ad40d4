"""JSON objects with a checksum of their own, so that an altered or truncated file is noticed.

A file without a checksum, as earlier versions wrote it, is accepted as it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

CHECKSUM = "sha256"


def seal(values: Mapping[str, Any], indent: int | None = None) -> str:
    """Return the object as JSON text, with its checksum as a further key."""
    return json.dumps({**values, CHECKSUM: _checksum(values)}, indent=indent)


def unseal(text: str) -> dict[str, Any]:
    """Return the object without its checksum.

    Raises:
        ValueError: the text is not a JSON object, or not the one that was sealed.
    """
    try:
        values = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, found {type(values).__name__}")
    checksum = values.pop(CHECKSUM, None)
    if checksum is not None and checksum != _checksum(values):
        raise ValueError("its checksum differs")
    return values


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
