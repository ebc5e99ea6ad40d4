"""Descriptions of the settings, and the table of them that `--help` prints."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel

from savant_ray.settings.yaml_text import show

PREFIX = "SAVANT_"  # of the environment variables that are settings
OPTION_WIDTH = 34  # columns of `--help` for the option


@dataclass(frozen=True)
class Setting:
    """Name, default, description and accepted types of one setting."""

    name: str  # dotted: "training.max_steps"
    default: Any
    description: str  # with its unit
    types: tuple[type, ...]  # that a value may have

    @property
    def variable(self) -> str:
        """Name of the environment variable."""
        return PREFIX + self.name.replace(".", "__").upper()


def list_settings(sections: BaseModel) -> list[Setting]:
    """Return all settings of a model whose fields are sections, in the order of declaration."""
    settings: list[Setting] = []
    for section, defaults in sections:
        values = defaults.model_dump()
        for name, field in type(defaults).model_fields.items():
            types = _plain_types(field.annotation)
            settings.append(Setting(f"{section}.{name}", values[name], field.description or "", types))
    return settings


def settings_table(settings: Sequence[Setting], sections: Mapping[str, str], width: int) -> str:
    """Return a text table with option, meaning and default of each setting, grouped by section.

    `sections` maps the name of a section to its description; `width` is the width of the terminal in columns.
    """
    groups = groupby(settings, lambda setting: setting.name.partition(".")[0])
    return "\n\n".join(
        "\n".join([f"{section}: {sections[section]}", *(_row(setting, width) for setting in group)])
        for section, group in groups
    )


def _row(setting: Setting, width: int) -> str:
    option = f"  --{setting.name}".ljust(OPTION_WIDTH - 1)
    text = f"{setting.description} [{show(setting.default)}]"
    return textwrap.fill(
        text,
        max(width, OPTION_WIDTH + 20),
        initial_indent=f"{option} ",
        subsequent_indent=" " * OPTION_WIDTH,
        break_on_hyphens=False,
    )


def _plain_types(annotation: Any) -> tuple[type, ...]:
    """Return the types that an annotation accepts, with unions and `Annotated` resolved."""
    origin = get_origin(annotation)
    if isinstance(annotation, type) and origin is None:
        return (dict,) if issubclass(annotation, BaseModel) else (annotation,)
    if origin in (list, dict):
        return (origin,)
    members = get_args(annotation)[:1] if origin is Annotated else get_args(annotation)
    return tuple(t for member in members for t in (_plain_types(member) if not isinstance(member, str) else (str,)))
