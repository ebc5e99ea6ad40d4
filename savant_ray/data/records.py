"""What the readers of all formats produce: records, and the parts of files in which they are read."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

from savant_ray.data.sources import SourceFile

UNBOUNDED = sys.maxsize
MAX_RECORD_BYTES = 64 << 20
MISSING = object()  # the value of a field that a record does not have

_INDEX = re.compile("[0-9]{1,9}")  # of an array, from 0


class Record(NamedTuple):
    """A row, line or block of a source: a value, a problem (an invalid record), or neither (a blank line)."""

    number: int  # from 1 at the beginning of the part
    value: dict[str, Any] | None = None  # JSON-like Python values; plain text is {"text": …}
    problem: str = ""


@dataclass(frozen=True)
class Part:
    """The records of `file` that start at positions [start, stop).

    A position is a byte of JSON lines and of text in blocks, a row group of Parquet, a record batch of Arrow. A file in
    another format, and a compressed file, is one part.
    """

    file: SourceFile
    start: int
    stop: int
    stored_bytes: int  # bytes of the file that count as the part's; those of all parts add up to the size of the file


class InvalidRecordError(Exception):
    """A record that is invalid; the message is the reason."""


def look_up(value: dict[str, Any], name: str) -> Any:
    """Return the value of a field, `MISSING` without it.

    Dots lead into objects and arrays, unless a field has the name with the dots.
    """
    if name in value:
        return value[name]
    inner: Any = value
    for part in name.split("."):
        if isinstance(inner, dict) and part in inner:
            inner = inner[part]
        elif isinstance(inner, list) and _INDEX.fullmatch(part) and int(part) < len(inner):
            inner = inner[int(part)]
        else:
            return MISSING
    return inner


def json_type(value: Any) -> str:
    """Return what a value is called in messages: `an array`, `a number`, `null`."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names: dict[type, str] = {
        dict: "an object",
        list: "an array",
        str: "a string",
        bytes: "binary data that is not UTF-8",
    }
    return names.get(type(value), "a number")


def is_blank(text: str) -> bool:
    """Return whether the text has no characters, or only whitespace."""
    return not text or text.isspace()
