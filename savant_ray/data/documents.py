"""Makes documents from the records of a source."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from savant_ray.data.records import Record, json_type


class Document(NamedTuple):
    """What a record contributes: a document, a problem, or neither (blank, or left out by a filter)."""

    number: int
    text: str = ""
    problem: str = ""
    trained: tuple[tuple[int, int], ...] | None = None  # character ranges [start, stop) that are trained on; None: all


@dataclass(frozen=True)
class DocumentRule:
    """Takes the text of a record from its field "text"."""

    def documents(self, records: Iterable[Record]) -> Iterator[Document]:
        """Yield what each record contributes."""
        for number, value, problem in records:
            if value is None:
                yield Document(number, problem=problem)
                continue
            text = value.get("text")
            if not isinstance(text, str) or not text or text.isspace():
                yield Document(number, problem=_missing_text(value))
            elif half := _half_surrogate_pair(text):
                yield Document(number, problem=f'"text" contains half a surrogate pair ({half})')
            else:
                yield Document(number, text)


TEXT_RULE = DocumentRule()


def _half_surrogate_pair(text: str) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return f"\\u{ord(text[error.start]):04x}"
    return ""


def _missing_text(value: dict[str, Any]) -> str:
    if "text" not in value:
        names = [_escaped(name[:40]) for name in sorted(value)[:8]]
        return f'no "text" field (found: {", ".join(names) or "nothing"})'
    text = value["text"]
    return '"text" is empty' if isinstance(text, str) else f'"text" is {json_type(text)}, not a string'


def _escaped(name: str) -> str:
    """Return `name` with control characters and lone surrogates as escape sequences."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
