"""The content of a file with every kind of line, and the expected problem of each line."""

from __future__ import annotations

import json

MAX_LINE_BYTES = 2_000

GOOD = ["first", "with\u2028separators\u0085 and\rreturns", "déjà 漢字 🎉", "2024-01-01", "12345", "last, unended"]


def _object(text: object) -> bytes:
    return json.dumps({"text": text}, ensure_ascii=False).encode()


# line → the beginning of its reason; None for a document or a blank line
LINES: list[tuple[bytes, str | None]] = [
    (b"\xef\xbb\xbf" + _object(GOOD[0]), None),
    (b'{"text": "cut off in the mid', "truncated JSON"),
    (b'{"text": "bad \xff byte"}', "invalid UTF-8 (0xff at byte 15)"),
    (b"", None),
    (_object(GOOD[1]) + b"\r", None),
    (b'["text"]', "an array, not an object"),
    (b'"text"', "a string, not an object"),
    (b"17", "a number, not an object"),
    (b"null", "null, not an object"),
    (b'{"id": 7, "body": "x"}', 'no "text" field (found: body, id); if body has the text, set text: body'),
    (b"{}", 'no "text" field (found: nothing)'),
    (b"   \t \r", None),
    (_object(None), '"text" is null, not a string'),
    (_object(12), '"text" is a number, not a string'),
    (_object(True), '"text" is true, not a string'),
    (_object(["a"]), '"text" is an array, not a string'),
    (_object({"a": 1}), '"text" is an object, not a string'),
    (_object(""), '"text" is empty'),
    (_object(" \n"), '"text" is empty'),
    (_object(GOOD[2]), None),
    (_object("x" * MAX_LINE_BYTES), "line of 2,012 bytes, over the limit of 2,000"),
    (b'{"text": "\\ud83d alone"}', '"text" contains half a surrogate pair (\\ud83d)'),
    (b'{"text": "a"} {"text": "b"}', "not JSON: Extra data at character 15"),
    (b"not json at all", "not JSON: Expecting value at character 1"),
    (b"{ \r", "JSON over several lines; write one object per line, without commas between them"),
    (b'{"text": "a",', "JSON over several lines; write one object per line, without commas between them"),
    (b'{"text": "a"},\r', "JSON over several lines; write one object per line, without commas between them"),
    (b"[", "JSON over several lines; write one object per line, without commas between them"),
    (b'{"text": ' + b"[" * 1_900, "JSON nested too deeply"),
    (b'{"text": "' + GOOD[3].encode() + b'", "score": NaN}', None),
    (_object(GOOD[4]), None),
    (_object(GOOD[5]), None),
]

CONTENT = b"\n".join(line for line, _ in LINES)
PROBLEMS = {number: reason for number, (_, reason) in enumerate(LINES, start=1) if reason}
