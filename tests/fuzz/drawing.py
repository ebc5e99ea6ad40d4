"""Texts, values and damage drawn from one seed each: ten times as many cases as of draws one by one."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any, TypeVar

from hypothesis import note
from hypothesis import strategies as st

T = TypeVar("T")
ODD = (
    *("\x00", "\t", "\n", "\r", "\x1b[31m", "\x7f", "\x85", "\xa0", "\u2028", "\ud83d", "\udc80", "\ufeff", "\uffff"),
    *(
        "é",
        "漢字",
        "🎉",
        '"',
        "\\",
        "'",
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        "#",
        "&a ",
        "*a",
        "!!int ",
        "- ",
        "? ",
        "| ",
        "%",
        "~",
    ),
    *("1e5", "08", "012", "0x1f", "1:30", ".inf", "-.nan", "true", "null", "yes", "=", "<<", "---", "...", "../", "//"),
)
NUMBERS = (0, 1, -1, 2, 3, 7, 192, 1024, 2**31, 2**53 + 1, 10**17, 10**18, 2**64, 10**400, 0.5, -0.0, 1e-300, 1e300)
NO_NUMBERS = (float("nan"), float("inf"), -float("inf"))


def drawn(make: Callable[[Random], T]) -> st.SearchStrategy[T]:
    """What `make` makes of a seed; it is shown where a property fails."""

    def made(name: bytes) -> T:
        value = make(Random(name))
        note(value)  # written out only where it is needed
        return value

    return st.binary(min_size=8, max_size=8).map(
        made
    )  # of integers hypothesis takes mostly small ones, again and again


def a_text(chance: Random, longest: int = 6) -> str:
    """A few words and odd characters, half surrogate pairs among them."""
    parts = chance.choices(ODD, k=chance.randrange(longest)) + chance.choices(("a", "word", " ", "12"), k=2)
    chance.shuffle(parts)
    return "".join(parts[: chance.randrange(len(parts) + 1)])


def a_value(chance: Random, key: Callable[[Random], Any] = a_text, depth: int = 3) -> Any:
    """Plain data, nested up to `depth` levels."""
    kind = chance.randrange(9 if depth else 6)
    if kind < 6:
        return (None, chance.random() < 0.5, chance.choice(NUMBERS), chance.choice(NO_NUMBERS), a_text(chance), "x")[
            kind
        ]
    if kind == 6:
        return [a_value(chance, key, depth - 1) for _ in range(chance.randrange(4))]
    return {key(chance): a_value(chance, key, depth - 1) for _ in range(chance.randrange(4))}


def spoilt(content: bytes, chance: Random) -> bytes:
    """Cut, with other bytes in it, a bit flipped, a stretch of it zero, doubled or moved, or something behind it."""
    at, to = sorted(chance.randrange(len(content) + 1) for _ in range(2))
    junk = chance.choice((b"\x00", b"\xff", b"\n", b'"', b"}", b"{", b"\xed\xa0\x80", chance.randbytes(3)))
    flipped = bytes([content[at] ^ 1 << chance.randrange(8)]) if at < len(content) else b""
    near = min(to, at + chance.randrange(1, 600))
    return chance.choice(
        (
            content[:at],
            content[at:],
            content[:at] + junk + content[at:],
            content[:at] + junk + content[at + len(junk) :],
            content[:at] + flipped + content[at + 1 :],
            content[:at] + bytes(near - at) + content[near:],
            content[:near] + content[at:near] + content[near:],
            content[:at] + content[near:],
            content + junk * chance.randrange(1, 20),
        )
    )
