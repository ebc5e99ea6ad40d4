"""Documents: the texts that a model is trained on, and which parts of them."""

from __future__ import annotations

from typing import NamedTuple


class Document(NamedTuple):
    """What a record contributes: a document, a problem, or neither (blank, or left out by a filter)."""

    number: int
    text: str = ""
    problem: str = ""
    trained: tuple[tuple[int, int], ...] | None = None  # character ranges [start, stop) that are trained on; None: all
