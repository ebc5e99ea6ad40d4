"""Random texts, values and damage, generated from one seed per case; ten times faster than drawing each part."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any, TypeVar

from hypothesis import note
from hypothesis import strategies as st

T = TypeVar("T")
UNUSUAL = (
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
NOT_FINITE = (float("nan"), float("inf"), -float("inf"))


def from_seed(make: Callable[[Random], T]) -> st.SearchStrategy[T]:
    """Return a strategy that calls `make` with a random seed; hypothesis prints the value of a failing case."""

    def generate(seed: bytes) -> T:
        value = make(Random(seed))
        note(value)  # formatted only for a failing case
        return value

    return st.binary(min_size=8, max_size=8).map(
        generate
    )  # not integers, of which hypothesis draws mostly small ones, repeatedly


def random_text(rng: Random, longest: int = 6) -> str:
    """Return up to `longest` words and unusual characters, including half surrogate pairs."""
    parts = rng.choices(UNUSUAL, k=rng.randrange(longest)) + rng.choices(("a", "word", " ", "12"), k=2)
    rng.shuffle(parts)
    return "".join(parts[: rng.randrange(len(parts) + 1)])


def random_value(rng: Random, key: Callable[[Random], Any] = random_text, depth: int = 3) -> Any:
    """Return plain data, nested up to `depth` levels; `key` generates the keys of dicts."""
    kind = rng.randrange(9 if depth else 6)
    if kind < 6:
        return (None, rng.random() < 0.5, rng.choice(NUMBERS), rng.choice(NOT_FINITE), random_text(rng), "x")[kind]
    if kind == 6:
        return [random_value(rng, key, depth - 1) for _ in range(rng.randrange(4))]
    return {key(rng): random_value(rng, key, depth - 1) for _ in range(rng.randrange(4))}


def damaged(content: bytes, rng: Random) -> bytes:
    """Return `content` after one random damage: truncated, with bytes inserted, replaced, zeroed, repeated or appended."""
    at, to = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    junk = rng.choice((b"\x00", b"\xff", b"\n", b'"', b"}", b"{", b"\xed\xa0\x80", rng.randbytes(3)))
    flipped = bytes([content[at] ^ 1 << rng.randrange(8)]) if at < len(content) else b""
    near = min(to, at + rng.randrange(1, 600))
    return rng.choice(
        (
            content[:at],
            content[at:],
            content[:at] + junk + content[at:],
            content[:at] + junk + content[at + len(junk) :],
            content[:at] + flipped + content[at + 1 :],
            content[:at] + bytes(near - at) + content[near:],
            content[:near] + content[at:near] + content[near:],
            content[:at] + content[near:],
            content + junk * rng.randrange(1, 20),
        )
    )
