"""Reads the decoded bytes of a source file in blocks, and divides them into lines."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pyarrow as pa

from savant_ray.data.formats import decoded
from savant_ray.data.sources import SourceFile

BLOCK_BYTES = 1 << 20  # read in one call


class DecodedStream:
    """The decompressed UTF-8 bytes of a file, up to the size with which it was listed."""

    def __init__(self, stored: pa.NativeFile, file: SourceFile) -> None:
        self._listed = _ListedBytes(stored, file.size)
        self._decoded = decoded(self._listed, file.encoding)

    def seek(self, position: int) -> None:
        """Continue at this byte; only for a file that is neither compressed nor encoded."""
        self._listed.seek(position)

    def read(self, size: int | None = None) -> bytes:
        """Return up to `size` bytes, by default `BLOCK_BYTES`; none at the end."""
        return self._decoded.read(BLOCK_BYTES if size is None else size)

    def blocks(self) -> Iterator[bytes]:
        """Yield the bytes up to the end of the file in blocks."""
        while block := self.read():
            yield block

    @property
    def position(self) -> int:
        """Number of bytes before the current position, as they are stored."""
        return self._listed.position


class _ListedBytes(io.RawIOBase):
    """The first `size` bytes of a file; what was appended after it was listed is not read, since it was not hashed."""

    def __init__(self, stored: pa.NativeFile, size: int) -> None:
        self.position = 0
        self._stored = stored
        self._size = size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET:
            raise io.UnsupportedOperation
        self._stored.seek(position)
        self.position = position
        return position

    def read(self, size: int = -1) -> bytes:
        remaining = max(self._size - self.position, 0)
        block: bytes = self._stored.read(remaining if size < 0 else min(size, remaining))
        self.position += len(block)
        return block


def split_lines(blocks: Iterator[bytes], max_line_bytes: int) -> Iterator[bytes | int]:
    """Yield each line without its newline; of a line over the limit, yield its length."""
    parts: list[bytes] = []
    size = 0
    for block in blocks:
        *ends, tail = block.split(b"\n")
        for end in ends:
            size += len(end)
            yield b"".join((*parts, end)) if size <= max_line_bytes else size
            parts, size = [], 0
        size += len(tail)
        parts = [*parts, tail] if size <= max_line_bytes else []
    if size:
        yield b"".join(parts) if size <= max_line_bytes else size


def over_limit(what: str, size: int, limit: int) -> str:
    """Return the problem of a line, row or block of `size` bytes."""
    return f"{what} of {size:,} bytes, over the limit of {limit:,}"


def invalid_utf8(raw: bytes, error: UnicodeDecodeError) -> str:
    """Return the problem of a record that is not UTF-8."""
    return f"invalid UTF-8 (0x{raw[error.start]:02x} at byte {error.start + 1})"
