"""Detects compression, encoding and format of a file from its first bytes, because the suffix may be wrong.

Examples are gzip files named .jsonl, Parquet named .json, UTF-16 from Windows, and Git LFS pointers. The suffix decides only
where the content cannot: between CSV, plain text and JSON lines. For a format that cannot be read the error names the
format and what to do.
"""

from __future__ import annotations

import lzma
import re
from pathlib import PurePosixPath
from typing import BinaryIO, Protocol

import pyarrow as pa

from savant_ray.errors import DataError

HEAD_BYTES = 512
CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4", ".xz": "xz"}  # suffix -> name of the compression
ENCODINGS = ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be")
TABLES = ("parquet", "arrow")  # formats with columns, which are neither compressed nor encoded as a whole
FORMAT_SUFFIXES = {
    "jsonl": (".jsonl", ".json", ".ndjson"),
    "json": (".json", ".jsonl"),
    "parquet": (".parquet",),
    "arrow": (".arrow", ".feather"),
    "csv": (".csv", ".tsv"),
    "text": (".txt", ".text", ".md"),
}
FORMATS = tuple(FORMAT_SUFFIXES)
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_ENCODING_MAGIC = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"BZh", "bz2"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
    (b"{\x00\x00\x00", "utf-32-le"),
    (b"\x00\x00\x00{", "utf-32-be"),
    (b"{\x00", "utf-16-le"),
    (b"\x00{", "utf-16-be"),
)
ARROW_STREAM_MAGIC = b"\xff\xff\xff\xff"
_TABLE_MAGIC = ((b"PAR1", "parquet"), (b"ARROW1", "arrow"), (ARROW_STREAM_MAGIC, "arrow"))
_DESCRIPTIONS = {
    "jsonl": "JSON lines",
    "json": "JSON",
    "parquet": "a Parquet file",
    "arrow": "an Arrow file",
    "csv": "CSV",
    "text": "plain text",
}
_MULTILINE_JSON = re.compile(rb"\s*[\[{]\s*\n")  # the first line is only a bracket
# An empty array, or one whose first line begins an object and does not end with a bracket, unless it is the only line.
_JSON_ARRAY = re.compile(rb"\s*\[\s*(\{[^\n]*((?<![\]\s])\s*\n|\s*$)|\]\s*$)")
_JSON_OBJECT = re.compile(rb'\s*(\[\s*)?\{\s*"')  # begins like an object with a key, or an array of them
_WEB_PAGE = re.compile(rb"\s*<(!doctype html|html)\b", re.IGNORECASE)
_CONVERT = "; convert it to JSON lines or Parquet"
_UNSUPPORTED = (
    (b"PK\x03\x04", "a zip archive", "; unpack it, or export a document as text and a spreadsheet as CSV"),
    (b"\xd0\xcf\x11\xe0", "an old Office file", "; export a document as text and a spreadsheet as CSV"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "; unpack it"),
    (b"Rar!", "a rar archive", "; unpack it"),
    (b"\xff\x06\x00\x00sNaPpY", "snappy-compressed", "; compress it with gzip or zstd instead"),
    (b"Obj\x01", "an Avro file", _CONVERT),
    (b"\x89HDF", "an HDF5 file", _CONVERT),
    (b"SQLite format 3", "an SQLite database", _CONVERT),
    (b"\x93NUMPY", "a NumPy array", _CONVERT),
    (b"FEA1", "a Feather file of version 1", _CONVERT),
    *((b"\x80" + version + b"\x95", "a Python pickle", _CONVERT) for version in (b"\x04", b"\x05")),
    (b"%PDF", "a PDF", _CONVERT),
    (b"version https://git-lfs", "a Git LFS pointer whose text was not fetched", "; fetch it with `git lfs pull`"),
)


class ByteStream(Protocol):
    """A stream of bytes: a file of Python, of Arrow, or of a decompressor."""

    def read(self, size: int = -1, /) -> bytes:
        """Return up to `size` bytes; none at the end."""


def inspect(stored: BinaryIO | pa.NativeFile, name: str, setting: str = "auto") -> tuple[str, str]:
    """Return encoding ("": none) and format of a file; `setting` is one of `FORMATS`, or "auto".

    A compressed file whose beginning cannot be decompressed has the format that its name suggests: reading it raises the
    error.

    Raises:
        DataError: the format is not supported, or is not that of the setting; the message begins with `name`.
    """
    head = stored.read(HEAD_BYTES)
    encoding = encoding_of(head)
    if encoding:
        stored.seek(0)
        try:
            head = decoded(stored, encoding).read(HEAD_BYTES) if encoding not in ENCODINGS else _as_utf8(head, encoding)
        except Exception:  # also of lzma, and of a file system that is implemented in Python
            head = b""
    return encoding, format_of(head, name, encoding, setting)


def decoded(stored: ByteStream | pa.NativeFile, encoding: str) -> ByteStream:
    """Return a stream of the decompressed bytes, in UTF-8, of a file with this encoding."""
    if not encoding:
        return stored
    if encoding == "xz":  # which pyarrow does not support
        return lzma.LZMAFile(stored)  # type: ignore[arg-type]
    file = pa.PythonFile(stored, mode="r")
    stream: ByteStream = (
        pa.transcoding_input_stream(file, encoding, "utf-8")
        if encoding in ENCODINGS
        else pa.CompressedInputStream(file, encoding)
    )
    return stream


def data_suffix(path: str) -> str:
    """Return the suffix of a path in lower case, without that of a compression."""
    pure = PurePosixPath(path)
    pure = pure.with_suffix("") if pure.suffix.lower() in CODECS else pure
    return pure.suffix.lower()


def encoding_of(head: bytes) -> str:
    """Return the compression or encoding of a file that begins with `head`; "" for UTF-8 and for tables."""
    return next((encoding for magic, encoding in _ENCODING_MAGIC if head.startswith(magic)), "")


def format_of(head: bytes, name: str, encoding: str = "", setting: str = "auto") -> str:
    """Return the format of a file whose first decoded bytes are `head`: one of `FORMATS`.

    Raises:
        DataError: as `inspect`.
    """
    table = next((table for magic, table in _TABLE_MAGIC if head.startswith(magic)), "")
    if table and encoding:
        raise DataError(f"{name}: is {encoding}-compressed, but contains {_DESCRIPTIONS[table]}; decompress it")
    if encoding in CODECS.values() and (inner := encoding_of(head)) in CODECS.values():
        raise DataError(f"{name}: is compressed twice ({encoding}, then {inner}); decompress it once")
    if setting != "auto":
        if head and table != setting and (table or setting in TABLES):
            what = f"is {_DESCRIPTIONS[table]}" if table else f"is not {_DESCRIPTIONS[setting]}"
            raise DataError(f"{name}: {what}, but its setting is format: {setting}; set format: {table or 'auto'}")
        return setting
    if table:
        return table
    _refuse_unsupported(head, name)
    codec = CODECS.get(PurePosixPath(name).suffix.lower())
    by_suffix = next((kind for kind in ("csv", "text") if data_suffix(name) in FORMAT_SUFFIXES[kind]), "")
    start = head.removeprefix(BYTE_ORDER_MARK)
    may_be_json = start.lstrip()[:1] in (b"{", b"[", b"")
    if codec and not encoding and not may_be_json and (not by_suffix or b"\0" in head):
        suffix = PurePosixPath(name).suffix.lower()
        raise DataError(f"{name}: is named {suffix}, but is neither {codec} nor JSON lines")
    if by_suffix and not _JSON_OBJECT.match(start):
        return by_suffix
    return "json" if _MULTILINE_JSON.match(start) or _JSON_ARRAY.match(start) else "jsonl"


def _refuse_unsupported(head: bytes, name: str) -> None:
    for magic, description, advice in _UNSUPPORTED:
        if head.startswith(magic):
            raise DataError(f"{name}: is {description}, which is not supported{advice}")
    if head[257:262] == b"ustar":
        raise DataError(f"{name}: is a tar archive, which is not supported; unpack it")
    if _WEB_PAGE.match(head.removeprefix(BYTE_ORDER_MARK)):
        raise DataError(f"{name}: is a web page, which is not supported; probably an error page was downloaded")


def _as_utf8(head: bytes, encoding: str) -> bytes:
    return head.decode(encoding, "ignore").removeprefix("\ufeff").encode("utf-8", "ignore")
