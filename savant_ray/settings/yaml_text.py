"""Reading and writing of YAML with the decimal numbers of version 1.2; duplicate keys are an error.

PyYAML implements version 1.1, in which `2e-5` is text, `012` is ten, `1:30` is ninety, and of two equal keys the last one
is used. Kept from version 1.1 are `_` between digits (`80_000`) and `yes`, `no`, `on` and `off` as booleans; hexadecimal and
octal numbers are text. What `to_yaml` writes has the same meaning in both versions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import yaml

MAX_DEPTH = 50  # levels of nesting; settings need six


class YamlError(Exception):
    """Text that is not valid; `args` holds one message per error, beginning with the line if it is known."""


def load_yaml(text: str) -> Any:
    """Return the content of the one YAML document in `text`, None if it is empty.

    JSON that PyYAML cannot read is accepted too: indented with tabs, or with surrogate pairs as escape sequences.

    Raises:
        YamlError: the text is not valid YAML, contains anything but plain data, or repeats a key.
    """
    if "\t" in text or "\\u" in text:
        with suppress(ValueError, RecursionError):  # raised for text that is not JSON, which may still be YAML
            return json.loads(text, object_pairs_hook=_dict_of_unique_keys, parse_int=_parse_int)
    try:
        loader = _Loader(text)
        content = loader.get_single_data()
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the latter two for an invalid character
        raise YamlError(_error_message(error)) from error
    if loader.duplicates:
        raise YamlError(*loader.duplicates)
    return content


def key_lines(text: str) -> dict[str, int]:
    """Return the line of each outermost key of YAML text that `load_yaml` reads; nothing for JSON indented with tabs."""
    with suppress(yaml.YAMLError):
        node = yaml.compose(text, Loader=_Loader)
        if isinstance(node, yaml.MappingNode):
            return {key.value: key.start_mark.line + 1 for key, _ in node.value}
    return {}


def to_yaml(content: Any, **layout: Any) -> str:
    """Return plain values as YAML from which `load_yaml` restores them; `layout` is passed to `yaml.dump`."""
    text: str = yaml.dump(content, Dumper=_Dumper, allow_unicode=True, sort_keys=False, **layout)
    return text


def in_one_line(value: Any) -> str:
    """Return a value as it is written in YAML, in one line."""
    style = '"' if isinstance(value, str) and "\n" in value else None
    text = to_yaml(value, default_flow_style=True, default_style=style, width=1 << 20)
    return text.strip().removesuffix("...").strip()


def show(value: Any) -> str:
    """Return a value as it is written in YAML, truncated to 60 characters, for messages."""
    try:
        text = in_one_line(value)
    except yaml.YAMLError:
        text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _dict_of_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of a JSON object as a dict.

    Raises:
        YamlError: a key is repeated.
    """
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise YamlError(f": {key} is given twice")
        content[key] = value
    return content


def _parse_int(digits: str) -> int | float:
    return int(digits) if re.fullmatch(_INT, digits) else float(digits)


def _error_message(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    line = f" line {mark.line + 1}" if mark is not None else ""
    reason = getattr(error, "problem", None) or getattr(error, "reason", None) or error
    if "'\\t'" in str(reason):
        reason = f"{reason}; write spaces instead of tabs"
    elif getattr(error, "context", None) == "while scanning an alias":  # a glob
        reason = f"{reason}; a text that begins with * needs quotes"
    elif reason == "mapping values are not allowed here":  # a template, or a prompt
        reason = f"{reason}; check the indentation, or quote a text that contains ': '"
    return f"{line}: not valid YAML: {reason}"


_STANDARD = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """Loader of null, booleans, numbers, text, lists and mappings; collects duplicate keys."""

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
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, f"nested more than {MAX_DEPTH} levels deep", mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                self.duplicates.append(f" line {line}: {key.value} was already given in line {seen[key.value]}")
            elif isinstance(key, yaml.ScalarNode):
                seen[key.value] = line
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


class _Dumper(yaml.SafeDumper):
    """Dumper that quotes text which either version of YAML would read as another type."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # These are line breaks in version 1.1 and ordinary characters in 1.2.
        style = '"' if re.search("[\x85\u2028\u2029]", data) else None
        return self.represent_scalar(f"{_STANDARD}str", data, style)


_Dumper.add_representer(str, _Dumper.represent_str)

# An integer of more than 18 digits is read as a float: it may not fit into 64 bits, and Python converts a limited number of
# digits.
_INT = r"[-+]?[0-9](?:_?[0-9]){0,17}"
_FLOAT = r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
_BOOL = "(?i:true|false|yes|no|on|off)"


def _add_scalar(tag: str, pattern: str, expected: str, construct: Callable[[_Loader, yaml.ScalarNode], Any]) -> None:
    """Register the constructor of a tag such as `!!int`, which accepts only text that matches `pattern`."""

    def constructor(loader: _Loader, node: yaml.ScalarNode) -> Any:
        text = loader.construct_scalar(node)
        if not re.fullmatch(pattern, text):
            raise yaml.constructor.ConstructorError(None, None, f"{show(text)} is not {expected}", node.start_mark)
        return construct(loader, node)

    _Loader.add_constructor(_STANDARD + tag, constructor)


_add_scalar("int", _INT, "a whole number", lambda loader, node: int(loader.construct_scalar(node)))
_add_scalar("float", _FLOAT, "a number", _Loader.construct_yaml_float)
_add_scalar("bool", _BOOL, "true or false", _Loader.construct_yaml_bool)
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(f"{_STANDARD}int", re.compile(f"{_INT}$"), list("-+0123456789"))
    _class.add_implicit_resolver(f"{_STANDARD}float", re.compile(f"(?:{_FLOAT})$"), list("-+0123456789."))
