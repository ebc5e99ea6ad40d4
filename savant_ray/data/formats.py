"""What a file is, by its first bytes: names lie (gzip named .jsonl, UTF-16 from Windows, an unfetched Git LFS pointer).

Compressed and UTF-16 files are read; what cannot be read is refused with what it is and what to do.
"""

from __future__ import annotations

import re
import shlex
from pathlib import PurePosixPath

from savant_ray.errors import DataError

HEAD_BYTES = 512
CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}  # suffix -> pyarrow's name
ENCODINGS = ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be")

_READABLE = (
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
_SPREAD_JSON = re.compile(rb"\s*[\[{]\s*\n")  # the first line is a bracket alone
_JSON_ARRAY = re.compile(rb"\s*\[\s*\{[^\n]*(,\s*\n|$)")  # its first line goes on in the next one, or there is no other
_WEB_PAGE = re.compile(rb"\s*<(!doctype html|html)\b", re.IGNORECASE)
_CONVERT = '; convert it to JSON lines with a "text" field'
_UNREADABLE = (
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
    """Return what the file's first `HEAD_BYTES` bytes are: a compression, an encoding, or `text`.

    Raises:
        DataError: JSON lines cannot be read from it; begins with `name`, which is the file's.
    """
    for magic, readable in _READABLE:
        if head.startswith(magic):
            return readable
    for magic, what, advice in _UNREADABLE:
        if head.startswith(magic):
            raise DataError(f"{name}: is {what}, not JSON lines{advice}")
    if head[257:262] == b"ustar":
        raise DataError(f"{name}: is a tar archive, not JSON lines; unpack it")
    start = head.removeprefix(b"\xef\xbb\xbf")
    if _WEB_PAGE.match(start):
        raise DataError(f"{name}: is a web page, not JSON lines; was the download refused?")
    if _SPREAD_JSON.match(start) or _JSON_ARRAY.match(start):
        is_array = start.lstrip().startswith(b"[")
        raise DataError(
            f"{name}: is one JSON {'array' if is_array else 'object over several lines'}, not JSON lines; one object per "
            f"line is wanted, as from `jq -c {'.[]' if is_array else '.'} {shlex.quote(PurePosixPath(name).name)}`"
        )
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in CODECS and start.lstrip()[:1] not in (b"{", b"[", b""):
        raise DataError(f"{name}: is named {suffix}, but is neither {CODECS[suffix]} nor JSON lines")
    return "text"
