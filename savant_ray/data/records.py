"""What readers of source files yield: one record for each row, line or block."""

from __future__ import annotations

import json
from typing import Any, NamedTuple


class Record(NamedTuple):
    """A row, line or block of a source: a value, a problem (an invalid record), or neither (a blank line)."""

    number: int  # from 1 at the beginning of the part
    value: dict[str, Any] | None = None  # JSON-like Python values; plain text is {"text": …}
    problem: str = ""


def json_type(value: Any) -> str:
    """Return what a value is called in messages: `an array`, `a number`, `null`."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names: dict[type, str] = {dict: "an object", list: "an array", str: "a string", bytes: "binary"}
    return names.get(type(value), "a number")
