"""Reads plain text: a file is one document, or each block of lines between blank lines is one."""

from __future__ import annotations

from collections.abc import Iterator

from savant_ray.data.decoded_stream import DecodedStream, invalid_utf8, over_limit, split_lines
from savant_ray.data.formats import BYTE_ORDER_MARK
from savant_ray.data.records import Part, Record, is_blank


def text_document(stream: DecodedStream, part: Part, max_record_bytes: int) -> Iterator[Record]:
    """Yield one record with the text of the file; line ends become newlines, and those at the end are removed."""
    blocks: list[bytes] = []
    size = 0
    for block in stream.blocks():
        size += len(block)
        blocks = [*blocks, block] if size <= max_record_bytes else []
    yield _record(1, b"".join(blocks) if size <= max_record_bytes else size, max_record_bytes, "text")


def text_blocks(stream: DecodedStream, part: Part, max_record_bytes: int) -> Iterator[Record]:
    """Yield the blocks that start in the byte range of `part`; a block starts at a line after a blank line."""
    position = _end_of_text_before(stream, part.start)
    if part.start:
        stream.seek(position)
    belongs = position == 0  # whether the block starts in the range
    is_cut = position > 0  # reading begins within a line of the block before
    lines: list[bytes] = []
    size = number = 0
    for raw in split_lines(stream.blocks(), max_record_bytes):
        length = raw if isinstance(raw, int) else len(raw)
        if isinstance(raw, bytes) and not raw.strip() and not is_cut:
            if size and belongs:
                number += 1
                yield _block(number, lines, size, max_record_bytes)
            lines, size, belongs = [], 0, True
        else:
            if not size and not is_cut and belongs:
                if position >= part.stop:
                    return
                belongs = position >= part.start
            size += length + 1
            lines = [*lines, raw] if isinstance(raw, bytes) and size <= max_record_bytes and belongs else []
        is_cut = False
        position += length + 1
    if size and belongs:
        yield _block(number + 1, lines, size, max_record_bytes)


def _end_of_text_before(stream: DecodedStream, start: int) -> int:
    """Return the position after the last byte before `start` that is not whitespace."""
    while start:
        begin = max(start - 4096, 0)
        stream.seek(begin)
        before = stream.read(start - begin)
        if text := before.rstrip():
            return begin + len(text)
        start = begin
    return 0


def _block(number: int, lines: list[bytes], size: int, limit: int) -> Record:
    return _record(number, b"\n".join(lines) if size <= limit else size - 1, limit, "block")


def _record(number: int, raw: bytes | int, limit: int, what: str) -> Record:
    if isinstance(raw, int):
        return Record(number, problem=over_limit(what, raw, limit))
    raw = raw.removeprefix(BYTE_ORDER_MARK)
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        return Record(number, problem=invalid_utf8(raw, error))
    if "\0" in text:
        return Record(number, problem="contains a NUL character, so it is not text")
    text = text.replace("\r\n", "\n").rstrip("\r\n")
    return Record(number, None if is_blank(text) else {"text": text})
