"""Error messages about settings: suggestions for misspelt names, and pydantic's errors in plain words."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from savant_ray.settings.yaml_text import show

TYPOGRAPHIC_QUOTES = "“”„‟‘‚‛«»‹›″"
_THOUSANDS = re.compile(r"[-+]?[1-9]\d{0,2}(?:(?P<mark>[,'’ \u00a0\u2009\u202f])\d{3})(?:(?P=mark)\d{3})*")
_DECIMAL_COMMA = re.compile(r"[-+]?\d+,\d+(?:[eE][-+]?\d+)?")
_MULTIPLES = {"k": 1_000, "m": 1_000_000}

# By pydantic's error type: the types or values that would be accepted.
_EXPECTED = {
    "int_type": ["a whole number"],
    "float_type": ["a number"],
    "finite_number": ["a finite number"],
    "bool_type": ["true", "false"],
    "string_type": ["text"],
    "list_type": ["a list"],
    "dict_type": ["names with values"],
    "model_type": ["names with values"],
}
# By pydantic's error type: what is wrong with a value of an accepted type.
_INVALID_VALUE = {
    "greater_than": "has to be greater than {gt:g}",
    "greater_than_equal": "has to be at least {ge:g}",
    "less_than": "has to be less than {lt:g}",
    "less_than_equal": "has to be at most {le:g}",
    "too_short": "needs a length of at least {min_length}",
    "too_long": "needs a length of at most {max_length}",
    "string_too_short": "must not be empty",
    "string_unicode": "is not text that UTF-8 can hold",
}


def closest(word: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most similar to `word`, or None. `word` may lack the section of a setting."""
    by_folded = {_folded(name): name for name in known}
    folded = _folded(word)
    same_field = [name for name in by_folded if name.rpartition(".")[2] == folded.rpartition(".")[2]]
    close = difflib.get_close_matches(folded, same_field or list(by_folded), n=1, cutoff=0.0 if same_field else 0.6)
    return by_folded[close[0]] if close else None


def _folded(name: str) -> str:
    return name.lower().replace("-", "_")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean …?` if a known name is similar, else an empty string."""
    name = closest(word, known)
    return f"; did you mean {name}?" if name else ""


def validation_messages(error: ValidationError, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield dotted name and message, once per value even if pydantic reports an error for each member of a union.

    `names` are the known names, for suggestions.
    """
    by_name: dict[str, list[Any]] = {}
    for problem in error.errors():
        by_name.setdefault(_dotted(problem["loc"]), []).append(problem)
    for name, problems in by_name.items():
        if any(other.startswith((f"{name}[", f"{name}.")) for other in by_name):
            continue  # the error is reported for an item of this list or a field of this section
        yield _message(name, problems, names)


def _message(name: str, problems: list[Any], names: Sequence[str]) -> tuple[str, str]:
    """Return name and message for the errors of one value."""
    for problem in problems:
        if problem["type"] == "value_error":  # from our validators; most begin the message with the name of the setting
            text = str(problem["ctx"]["error"])
            setting, _, message = text.partition(": ")
            return (setting, message) if setting in names else (name, text)
        # The value has the right type for this member of a union, so the errors of the other members are irrelevant.
        if not _expected(problem):
            return name, _describe(problem, name, names)
    *others, last = [text for problem in problems for text in _expected(problem)]
    expected = f"{', '.join(others)} or {last}" if others else last
    value = problems[0]["input"]
    return name, f"expected {expected}, found {show(value)}{_correction(name, value, expected)}"


def _correction(name: str, value: Any, expected: str) -> str:
    """Return `; write …` if the intended value is clear, such as 8000 for `8,000`, else an empty string."""
    if isinstance(value, str) and re.fullmatch(r"data\.sources(\[\d+\])?", name):
        return "; write {path: PATH, weight: 1}" if name.endswith("]") else "; write [{path: PATH, weight: 1}]"
    is_integer = expected.startswith("a whole number")
    if is_integer and isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return f"; write {int(value)}"
    if not isinstance(value, str) or not (is_integer or expected.startswith("a number")):
        return ""
    if any(quote in value for quote in TYPOGRAPHIC_QUOTES):
        return "; use ' or \" instead of typographic quotes"
    if _THOUSANDS.fullmatch(value):
        return f"; write {re.sub(r'[^-+0-9]', '', value)}"
    if not is_integer and _DECIMAL_COMMA.fullmatch(value):
        return f"; write {value.replace(',', '.')}"
    if (abbreviated := re.fullmatch(r"(\d{1,9})([kKmM])", value)) is not None:
        return f"; write {int(abbreviated[1]) * _MULTIPLES[abbreviated[2].lower()]}"
    return ""


def _expected(problem: Any) -> list[str]:
    """Return the accepted types or values; empty unless the error is about the type."""
    if problem["type"] == "literal_error":
        return re.findall(r"(?<=')\w[^']*(?=')|\d+", problem["ctx"]["expected"])
    return _EXPECTED.get(problem["type"], [])


def _describe(problem: Any, name: str, names: Sequence[str]) -> str:
    """Return the message of an error that is not about the type."""
    if problem["type"] == "extra_forbidden":
        is_inside = "[" in name or name.count(".") > 1  # the field of a source or a profile
        word = name.rpartition(".")[2] if is_inside else name
        return f"no such setting{did_you_mean(word, names)}"
    if problem["type"] == "missing":
        return "is missing"
    phrase = _INVALID_VALUE.get(problem["type"], problem["msg"])
    return f"{show(problem['input'])} {phrase.format(**problem.get('ctx', {}))}"


def _dotted(location: tuple[int | str, ...]) -> str:
    """Return a pydantic location as `data.sources[0].path`, without the names of a union's members (types and classes)."""
    parts = [
        p
        for p in location
        if isinstance(p, int)
        or not re.match(r"(bool|int|float|str|list|literal|constrained-\w+|function-after)(\[|$)|[A-Z]\w*Config$", p)
    ]
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in parts).removeprefix(".")
