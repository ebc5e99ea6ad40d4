"""What is wrong with the settings, in the user's words."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from savant_ray.settings.yaml_text import show


def closest(word: str, known: Iterable[str]) -> str | None:
    """Return the known name that a misspelt one probably stands for; a setting without its section is found too."""
    by_folded = {_folded(name): name for name in known}
    folded = _folded(word)
    same_field = [name for name in by_folded if name.rpartition(".")[2] == folded.rpartition(".")[2]]
    close = difflib.get_close_matches(folded, same_field or list(by_folded), n=1, cutoff=0.0 if same_field else 0.6)
    return by_folded[close[0]] if close else None


def _folded(name: str) -> str:
    return name.lower().replace("-", "_")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean …?` if a known name is close, else nothing."""
    name = closest(word, known)
    return f"; did you mean {name}?" if name else ""


def explain(error: ValidationError, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Pairs of dotted name and message, one for each value however many types it could have had."""
    by_name: dict[str, list[Any]] = {}
    for problem in error.errors():
        by_name.setdefault(_dotted(problem["loc"]), []).append(problem)
    for name, problems in by_name.items():
        if any(other.startswith(f"{name}[") for other in by_name):
            continue  # a list, whose item is the culprit
        yield _complaint(name, problems, names)


def _complaint(name: str, problems: list[Any], names: Sequence[str]) -> tuple[str, str]:
    for problem in problems:
        if problem["type"] == "value_error":  # checks of several settings say themselves which one it is
            named, _, message = str(problem["ctx"]["error"]).partition(": ")
            return (named, message) if named in names else (name, str(problem["ctx"]["error"]))
        if not _wanted(problem):  # of the right type: the types it might have had instead do not matter
            return name, _outside(problem, name, names)
    *most, last = [word for problem in problems for word in _wanted(problem)]
    words = f"{', '.join(most)} or {last}" if most else last
    value = problems[0]["input"]
    return name, f"expected {words}, found {show(value)}{_what_to_write(value, words)}"


TYPOGRAPHIC_QUOTES = "“”„‟‘‚‛«»‹›″"
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:(?P<mark>[,'’ \u00a0\u2009\u202f])\d{3})(?:(?P=mark)\d{3})*")
_DECIMAL_COMMA = re.compile(r"[-+]?\d+,\d+(?:[eE][-+]?\d+)?")
_MULTIPLES = {"k": 1_000, "m": 1_000_000}


def _what_to_write(value: Any, words: str) -> str:
    """`; write …` if it is plain which number was meant, such as 8000 by 8,000."""
    whole = words.startswith("a whole number")
    if whole and isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return f"; write {int(value)}"
    if not isinstance(value, str) or not (whole or words.startswith("a number")):
        return ""
    if any(quote in value for quote in TYPOGRAPHIC_QUOTES):
        return "; typographic quotes do not quote: use ' or \""
    if _THOUSANDS.fullmatch(value):
        return f"; write {re.sub(r'[^-+0-9]', '', value)}"
    if not whole and _DECIMAL_COMMA.fullmatch(value):
        return f"; write {value.replace(',', '.')}"
    if (shortened := re.fullmatch(r"(\d{1,9})([kKmM])", value)) is not None:
        return f"; write {int(shortened[1]) * _MULTIPLES[shortened[2].lower()]}"
    return ""


_TYPES = {
    "int_type": ["a whole number"],
    "float_type": ["a number"],
    "finite_number": ["a finite number"],
    "bool_type": ["true", "false"],
    "string_type": ["text"],
    "list_type": ["a list"],
    "dict_type": ["names with values"],
    "model_type": ["names with values"],
}
_RANGES = {
    "greater_than": "has to be greater than {gt:g}",
    "greater_than_equal": "has to be at least {ge:g}",
    "less_than": "has to be less than {lt:g}",
    "less_than_equal": "has to be at most {le:g}",
    "too_short": "needs at least {min_length}",
    "too_long": "needs at most {max_length}",
    "string_too_short": "must not be empty",
    "string_unicode": "is not text that UTF-8 can hold",
}


def _wanted(problem: Any) -> list[str]:
    if problem["type"] == "literal_error":
        return re.findall(r"'([^']*)'", problem["ctx"]["expected"])
    return _TYPES.get(problem["type"], [])


def _outside(problem: Any, name: str, names: Sequence[str]) -> str:
    if problem["type"] == "extra_forbidden":
        word = name.rpartition(".")[2] if "[" in name else name
        return f"no such setting{did_you_mean(word, names)}"
    if problem["type"] == "missing":
        return "is missing"
    phrase = _RANGES.get(problem["type"], problem["msg"])
    return f"{show(problem['input'])} {phrase.format(**problem.get('ctx', {}))}"


def _dotted(location: tuple[int | str, ...]) -> str:
    """A pydantic location without the names of a union's members: `data.sources[0].path`."""
    parts = [
        p
        for p in location
        if isinstance(p, int)
        or not re.match(r"(bool|str|list|literal|constrained-str|constrained-int|function-after)(\[|$)", p)
    ]
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in parts).removeprefix(".")
