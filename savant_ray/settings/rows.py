"""The settings of a model of sections, one by one."""

from __future__ import annotations

from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel

from savant_ray.settings.sources import Setting


def rows_of(sections: BaseModel) -> list[Setting]:
    """Every setting with its name, default and meaning, in the order of the sections."""
    rows: list[Setting] = []
    for section, defaults in sections:
        for name, field in type(defaults).model_fields.items():
            default = defaults.model_dump()[name]
            rows.append(Setting(f"{section}.{name}", default, field.description or "", _types(field.annotation)))
    return rows


def _types(annotation: Any) -> tuple[type, ...]:
    """The plain types a value may have, through unions and `Annotated`."""
    origin = get_origin(annotation)
    if isinstance(annotation, type) and origin is None:
        return (annotation,)
    if origin in (list, dict):
        return (origin,)
    members = get_args(annotation)[:1] if origin is Annotated else get_args(annotation)
    return tuple(t for member in members for t in (_types(member) if not isinstance(member, str) else (str,)))
