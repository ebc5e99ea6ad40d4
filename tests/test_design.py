"""docs/DESIGN.md names files and functions that are there, in its four walks each of them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from savant_ray.commands import COMMANDS
from savant_ray.config import Config
from savant_ray.errors import STOPPED_EARLY, SavantError
from savant_ray.events import Event
from tests.tracked_files import tracked_files

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/DESIGN.md").read_text(encoding="utf-8")
WALKS = PAGE.partition("## 9.")[2].partition("## 10.")[0]
STATIONS = re.findall(r"^\d+\. (.*)$", WALKS, re.MULTILINE)
PATH_AND_NAMES = re.compile(r"`([\w/]+\.py)`((?:,? `\w[\w.]*`)+)")


def mentions(text: str) -> list[tuple[str, str]]:
    """(file, function) of each file with functions behind it, such as: `data/packing.py` `pack`, `Packing.fill`."""
    return [(path, name) for path, names in PATH_AND_NAMES.findall(text) for name in re.findall(r"`([\w.]+)`", names)]


def defined(path: Path) -> set[str]:
    """Functions and classes of a file, and methods behind their class."""
    return set(_names(ast.parse(path.read_text(encoding="utf-8")), ""))


def _names(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[str]:
    for each in node.body:
        if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield f"{prefix}{each.name}"
        if isinstance(each, ast.ClassDef):
            yield from _names(each, f"{prefix}{each.name}.")


def test_there_are_four_walks_and_each_station_begins_with_a_file_and_what_of_it_is_passed():
    assert WALKS.count("\n### ") == 4
    assert len(STATIONS) > 60
    assert [station for station in STATIONS if not PATH_AND_NAMES.match(station)] == []


@pytest.mark.parametrize("path", sorted({path for path, _ in mentions(WALKS)}))
def test_functions_that_the_walks_name_are_in_their_files(path):
    named = {name for each, name in mentions(WALKS) if each == path}
    assert named <= defined(ROOT / "savant_ray" / path)


def test_files_that_the_page_names_are_there():
    named = set(re.findall(r"`([\w/]+\.py)`", PAGE))
    assert [name for name in named if not any((ROOT / top / name).is_file() for top in ("savant_ray", "."))] == []


def test_parts_commands_exit_codes_and_events_are_all_told():
    folders = {
        path.parent.name for path in tracked_files("savant_ray/*/__init__.py") if len(path.relative_to(ROOT).parts) == 3
    }
    assert [name for name in folders if f"`{name}/`" not in PAGE] == []
    assert [name for name in COMMANDS if f"`{name}`" not in PAGE] == []
    codes = {STOPPED_EARLY, *(error.exit_code for error in SavantError.__subclasses__())}
    assert codes <= {int(code) for code in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)}
    assert [event.kind for event in Event.__subclasses__() if f"`{event.kind}`" not in PAGE] == []


def test_the_models_defaults_are_those_of_the_settings():
    told = dict(re.findall(r"`(\w+)` (?:D = )?([\d,]+)", PAGE.partition("Defaults:")[2].partition("\n")[0]))
    model = Config().model
    assert len(told) == 9
    assert {name: int(number.replace(",", "")) for name, number in told.items()} == {
        name: getattr(model, name) for name in told
    }
