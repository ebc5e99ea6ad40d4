"""From a YAML file, the environment and the command line to one set of named values, and what is wrong with them.

Each value keeps its origin, so that a complaint names the line of text the user has to change. This module knows
nothing about particular settings: those are in `config.py`, which hands in their names and types. Values are typed the
same way wherever they come from (YAML 1.2 scalars, so `2e-5` is a number), and then checked strictly.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from savant_ray.settings.complaints import did_you_mean, explain
from savant_ray.settings.yaml_text import YamlProblems, load_yaml, show

PREFIX = "SAVANT_"


@dataclass(frozen=True)
class Setting:
    """One setting as documentation, `--help` and the readers below need it."""

    name: str  # dotted: "training.max_steps"
    default: Any
    meaning: str  # with its unit
    types: tuple[type, ...]  # what a value may be

    @property
    def variable(self) -> str:
        """Its name in the environment."""
        return PREFIX + self.name.replace(".", "__").upper()


@dataclass(frozen=True)
class Given:
    """A value somebody gave, and where: `origin` is what the user would look for."""

    value: Any
    origin: str


class Reading:
    """Collects values, later ones winning, and everything that is wrong, so that it is said at once."""

    def __init__(self, settings: Sequence[Setting]) -> None:
        self.settings = {setting.name: setting for setting in settings}
        self.given: dict[str, Given] = {}
        self.problems: list[str] = []

    def file(self, path: Path) -> None:
        """Settings of a YAML file."""
        try:
            content = load_yaml(path.read_text(encoding="utf-8-sig"))
        except YamlProblems as problems:
            self.problems += [f"{path}{problem}" for problem in problems.args]
        except UnicodeDecodeError:
            self.problems.append(f"{path}: not UTF-8 text")
        except OSError as error:
            self.problems.append(f"{path}: {(error.strerror or str(error)).lower()}")
        else:
            self._sections(content, path)

    def environment(self, variables: Mapping[str, str]) -> None:
        """Settings such as `SAVANT_TRAINING__MAX_STEPS=1000`."""
        known = {setting.variable: setting for setting in self.settings.values()}
        for variable in sorted(v for v in variables if v.startswith(PREFIX)):
            if variable in known:
                value = _from_text(variables[variable], known[variable].types)
                self.given[known[variable].name] = Given(value, variable)
            else:
                self.problems.append(f"{variable}: no such setting{did_you_mean(variable, known)}")

    def command_line(self, arguments: Sequence[str]) -> None:
        """Settings such as `--training.max_steps 1000` or `--training.max_steps=1000`."""
        for option, text in self._options(arguments):
            name = option.removeprefix("--")
            if name not in self.settings:
                self.problems.append(f"{option}: no such setting{did_you_mean(name, self.settings)}")
            elif text is None:
                self.problems.append(f"{option}: a value is missing")
            else:
                self.given[name] = Given(_from_text(text, self.settings[name].types), option)

    def nested(self) -> dict[str, dict[str, Any]]:
        """What was given, by section and name."""
        sections: dict[str, dict[str, Any]] = {}
        for name, given in self.given.items():
            section, field = name.split(".", 1)
            sections.setdefault(section, {})[field] = given.value
        return sections

    def complain(self, error: ValidationError, names: Sequence[str]) -> None:
        """Adds what pydantic found, each under the place it was given at; `names` are for suggestions."""
        for name, message in explain(error, names):
            setting = ".".join(re.split(r"[.\[]", name)[:2])
            if setting in self.given:
                self.problems.append(f"{self.given[setting].origin}{name.removeprefix(setting)}: {message}")
            else:  # a default that does not go with what was given for another setting
                causes = [given.origin for other, given in self.given.items() if other in message]
                self.problems.append(f"{name}: {message}{f' ({causes[0]})' if causes else ''}")

    def _sections(self, content: Any, path: Path) -> None:
        names = sorted({name.split(".")[0] for name in self.settings})
        if not isinstance(content, dict):
            self.problems += [f"{path}: expected sections with settings, found {show(content)}"] if content else []
            return
        for section, fields in content.items():
            if section not in names:
                hint = did_you_mean(str(section), names) or did_you_mean(str(section), self.settings)
                self.problems.append(f"{path}: {section}: no such setting{hint}")
            elif not isinstance(fields, dict | None):
                self.problems.append(f"{path}: {section}: expected settings below it, found {show(fields)}")
            else:
                self._fields(section, fields or {}, path)

    def _fields(self, section: str, fields: dict[Any, Any], path: Path) -> None:
        for field, value in fields.items():
            name = f"{section}.{field}"
            if name in self.settings:
                self.given[name] = Given(value, f"{path}: {name}")
            else:
                self.problems.append(f"{path}: {name}: no such setting{did_you_mean(name, self.settings)}")

    def _options(self, arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
        waiting = list(reversed(arguments))
        while waiting:
            option, equals, text = waiting.pop().partition("=")
            if not option.startswith("--"):
                self.problems.append(f"{option}{equals}{text}: expected --section.setting VALUE")
            elif equals:
                yield option, text
            else:
                yield option, waiting.pop() if waiting and not waiting[-1].startswith("--") else None


def _from_text(text: str, types: tuple[type, ...]) -> Any:
    """A value of the environment or command line; text stays as typed where the setting is text."""
    try:
        value = load_yaml(text)
    except YamlProblems:
        return text
    is_text = isinstance(value, str) or (str in types and not isinstance(value, types))
    return text if is_text else value
