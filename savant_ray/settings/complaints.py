"""What is wrong with the settings, in the user's words."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from savant_ray.settings.yaml_text import show


def did_you_mean(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """`; did you mean …?` if something is close, counting a setting's last word as its whole name."""
    word = word.replace("-", "_")
    same_field = [name for name in known if name.rpartition(".")[2] == word.rpartition(".")[2]]
    close = difflib.get_close_matches(word, same_field or list(known), n=1, cutoff=0.0 if same_field else 0.6)
    return f"; did you mean {close[0]}?" if close else ""


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
    return name, f"expected {words}, found {show(problems[0]['input'])}"


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
