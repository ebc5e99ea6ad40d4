"""YAML text to plain values: the numbers of version 1.2, and duplicate keys refused.

PyYAML speaks version 1.1, in which `2e-5` is text, `012` is ten, `1:30` is ninety and the last of two equal keys wins.
"""

from __future__ import annotations

import re
from typing import Any

import yaml


class YamlProblems(Exception):  # noqa: N818 - several at once
    """What is wrong with a text; one message each in `args`, with line where it is known."""


def load_yaml(text: str) -> Any:
    """The one document in a text; None if it is empty.

    Raises:
        YamlProblems: it is not YAML, holds something else than plain data, or gives a key twice.
    """
    try:
        loader = _Loader(text)
        content = loader.get_single_data()
    except yaml.YAMLError as error:
        raise YamlProblems(_explain(error)) from error
    except (ValueError, RecursionError) as error:  # a tag such as `!!int` before a word; a text of brackets
        raise YamlProblems(f": not valid YAML: {error}") from error
    if loader.duplicates:
        raise YamlProblems(*loader.duplicates)
    return content


def show(value: Any) -> str:
    """A value as the user would write it in YAML, shortened."""
    try:
        lines = isinstance(value, str) and "\n" in value
        text = yaml.safe_dump(
            value,
            default_flow_style=True,
            default_style='"' if lines else None,
            allow_unicode=True,
            sort_keys=False,
            width=1 << 20,
        )
    except yaml.YAMLError:
        text = repr(value)
    text = text.strip().removesuffix("...").strip()
    return text if len(text) <= 60 else f"{text[:57]}…"


def _explain(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    line = f" line {mark.line + 1}" if mark is not None else ""
    why = getattr(error, "problem", None) or getattr(error, "reason", None) or error
    return f"{line}: not valid YAML: {why}"


_STANDARD = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """Null, booleans, numbers, text, lists and mappings; collects duplicate keys."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as the base class has it
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":int", ":float", ":timestamp"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {  # noqa: RUF012
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix(_STANDARD) in ("null", "bool", "float", "str", "seq", "map")
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.duplicates: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                self.duplicates.append(f" line {line}: {key.value} was already given in line {seen[key.value]}")
            elif isinstance(key, yaml.ScalarNode):
                seen[key.value] = line
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


# More digits than 64 bits hold are no whole number; Python would refuse to convert thousands of them.
_INT = r"[-+]?[0-9](?:_?[0-9]){0,17}"
_FLOAT = r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
_Loader.add_implicit_resolver(f"{_STANDARD}int", re.compile(f"{_INT}$"), list("-+0123456789"))
_Loader.add_implicit_resolver(f"{_STANDARD}float", re.compile(f"(?:{_FLOAT})$"), list("-+0123456789."))
_Loader.add_constructor(f"{_STANDARD}int", _construct_int)
