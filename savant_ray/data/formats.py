"""Detects the format of a file from its first bytes, because the suffix may be wrong.

Examples are gzip files named .jsonl, UTF-16 from Windows, and Git LFS pointers. Compressed files, and local files in UTF-16
or UTF-32, are supported; for other formats the error names the format and what to do.
"""

from __future__ import annotations

import re
import shlex
from pathlib import PurePosixPath

from savant_ray.errors import DataError

HEAD_BYTES = 512
CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}  # suffix -> pyarrow's name
ENCODINGS = ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be")

_SUPPORTED = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"BZh", "bz2"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
    (b"{\x00\x00\x00", "utf-32-le"),
    (b"\x00\x00\x00{", "utf-32-be"),
    (b"{\x00", "utf-16-le"),
    (b"\x00{", "utf-16-be"),
)
_MULTILINE_JSON = re.compile(rb"\s*[\[{]\s*\n")  # the first line is only a bracket
_JSON_ARRAY = re.compile(rb"\s*\[\s*\{[^\n]*(,\s*\n|$)")  # the first line ends with a comma, or is the only one
_WEB_PAGE = re.compile(rb"\s*<(!doctype html|html)\b", re.IGNORECASE)
_CONVERT = '; convert it to JSON lines with a "text" field'
_UNSUPPORTED = (
    (b"\xfd7zXZ\x00", "xz-compressed", "; compress it with gzip or zstd instead"),
    (b"PK\x03\x04", "a zip archive", "; unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "; unpack it"),
    (b"Rar!", "a rar archive", "; unpack it"),
    (b"\xff\x06\x00\x00sNaPpY", "snappy-compressed", "; compress it with gzip or zstd instead"),
    (b"PAR1", "a Parquet file", _CONVERT),
    (b"ARROW1", "an Arrow file", _CONVERT),
    (b"Obj\x01", "an Avro file", _CONVERT),
    (b"\x89HDF", "an HDF5 file", _CONVERT),
    (b"SQLite format 3", "an SQLite database", _CONVERT),
    (b"\x93NUMPY", "a NumPy array", _CONVERT),
    (b"%PDF", "a PDF", _CONVERT),
    (b"version https://git-lfs", "a Git LFS pointer whose text was not fetched", "; fetch it with `git lfs pull`"),
)


def format_of(head: bytes, name: str) -> str:
    """Return the format of a file whose first `HEAD_BYTES` bytes are `head`: a compression, an encoding, or `text`.

    Raises:
        DataError: the format is not supported; the message begins with `name`, the name of the file.
    """
    for magic, detected in _SUPPORTED:
        if head.startswith(magic):
            return detected
    for magic, description, advice in _UNSUPPORTED:
        if head.startswith(magic):
            raise DataError(f"{name}: is {description}, not JSON lines{advice}")
    if head[257:262] == b"ustar":
        raise DataError(f"{name}: is a tar archive, not JSON lines; unpack it")
    start = head.removeprefix(b"\xef\xbb\xbf")
    if _WEB_PAGE.match(start):
        raise DataError(f"{name}: is a web page, not JSON lines; probably an error page was downloaded")
    if _MULTILINE_JSON.match(start) or _JSON_ARRAY.match(start):
        is_array = start.lstrip().startswith(b"[")
        raise DataError(
            f"{name}: is one JSON {'array' if is_array else 'object over several lines'}, not JSON lines; write one object "
            f"per line, for instance with `jq -c {'.[]' if is_array else '.'} {shlex.quote(PurePosixPath(name).name)}`"
        )
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in CODECS and start.lstrip()[:1] not in (b"{", b"[", b""):
        raise DataError(f"{name}: is named {suffix}, but is neither {CODECS[suffix]} nor JSON lines")
    return "text"
