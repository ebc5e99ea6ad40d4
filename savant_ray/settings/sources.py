"""From a YAML file, the environment and the command line to one set of named values, and what is wrong with them.

Each value keeps its origin, so that a complaint names the line of text the user has to change. This module knows
nothing about particular settings: those are in `config.py`, which hands in their names and types. Values are typed the
same way wherever they come from (YAML 1.2 scalars, so `2e-5` is a number), and then checked strictly.
"""

from __future__ import annotations

import codecs
import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from savant_ray.settings.complaints import TYPOGRAPHIC_QUOTES, closest, did_you_mean, explain
from savant_ray.settings.variables import PREFIX, is_of_a_service, misspelt_variable, unquoted
from savant_ray.settings.yaml_text import YamlProblems, load_yaml, show

LARGEST_FILE = 1 << 20  # bytes; somebody who names the training text is told so, instead of waiting for it to be parsed
DASHES = re.compile(r"[-\u2010-\u2015\u2212\ufe58\ufe63\uff0d]+(?=[^\W\d])")  # at the beginning of a name


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

    def __init__(self, settings: Sequence[Setting], defaults: Mapping[str, Any] | None = None) -> None:
        self.settings = {setting.name: setting for setting in settings}
        self.given = {name: Given(value, name) for name, value in (defaults or {}).items()}
        self.problems: list[str] = []

    def file(self, path: Path) -> None:
        """Settings of a YAML file."""
        try:
            content = load_yaml(_read(path.expanduser()))
        except YamlProblems as problems:
            self.problems += [f"{path}{problem}" for problem in problems.args]
        except OSError as error:
            where = "" if error.filename in (None, str(path)) else f" ({error.filename})"
            self.problems.append(f"{path}: {(error.strerror or str(error)).lower()}{where}")
        except RuntimeError:  # of expanduser
            self.problems.append(f"{path}: there is no such user, or no home folder")
        except ValueError as error:  # a NUL in the name
            self.problems.append(f"{path}: {error}")
        else:
            self._sections(content, path)

    def environment(self, variables: Mapping[str, str]) -> list[str]:
        """Take settings such as `SAVANT_TRAINING__MAX_STEPS=1000`.

        Quotes around a whole value are removed: `docker --env-file` and Kubernetes leave them.

        Returns:
            The variables that look like settings of ours but are none, and are ignored; those that Kubernetes and
            Docker add for a service named savant-… are left out.
        """
        known = {setting.variable: setting for setting in self.settings.values()}
        ignored = []
        for variable in sorted(v for v in variables if v.upper().startswith(PREFIX)):
            if variable in known:
                self._take(known[variable], unquoted(variables[variable]), variable)
            elif is_of_a_service(variable, variables[variable]):
                continue
            elif (meant := misspelt_variable(variable, known)) is not None:
                self.problems.append(f"{variable}: no such setting{meant}")
            else:
                ignored.append(variable)
        return ignored

    def command_line(self, arguments: Sequence[str]) -> None:
        """Settings such as `--training.max_steps 1000` or `--training.max_steps=1000`."""
        for option, text in self._options(arguments):
            name = option.removeprefix("--")
            if name not in self.settings:
                self.problems.append(f"{option}: no such setting{self._instead_of(name)}")
            elif text is None:
                values = ": true or false" if self.settings[name].types == (bool,) else ""
                self.problems.append(f"{option}: a value is missing{values}")
            else:
                self._take(self.settings[name], text, option)

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

    def _take(self, setting: Setting, text: str, origin: str) -> None:
        """Add a value of the environment or the command line."""
        if not text and not {str, type(None)} & set(setting.types):
            self.problems.append(f"{origin}: a value is missing")
        elif any(0xD800 <= ord(character) <= 0xDFFF for character in text):  # how Python keeps what it cannot decode
            self.problems.append(f"{origin}: not UTF-8 text")
        else:
            self.given[setting.name] = Given(_from_text(text, setting.types), origin)

    def _instead_of(self, name: str) -> str:
        positive = closest(name.removeprefix("no-"), self.settings) if name.startswith("no-") else None
        if positive and bool in self.settings[positive].types:
            return f"; did you mean --{positive} false?"
        return did_you_mean(name, self.settings)

    def _sections(self, content: Any, path: Path) -> None:
        names = sorted({name.split(".")[0] for name in self.settings})
        if not isinstance(content, dict):
            self.problems += [f"{path}: expected sections with settings, found {show(content)}"] if content else []
            return
        for section, fields in content.items():
            if section not in names:
                self.problems.append(f"{path}: {section}: {self._instead_of_section(str(section), names, fields)}")
            elif not isinstance(fields, dict | None):
                self.problems.append(f"{path}: {section}: expected settings below it, found {show(fields)}")
            else:
                self._fields(section, fields or {}, path)

    def _instead_of_section(self, key: str, sections: Sequence[str], value: Any) -> str:
        """What to write for a key on the outermost level that is no section's name."""
        dotted = key.removeprefix("--").removeprefix(PREFIX).replace("__", ".").lower()
        if dotted in self.settings:
            return f"settings are nested in a file; write {_nested(dotted, value)}"
        if "." not in dotted and (section := closest(dotted, sections)):
            return f"no such setting; did you mean {section}?"
        setting = closest(dotted, self.settings)
        return f"no such setting; did you mean {_nested(setting, value)}?" if setting else "no such setting"

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
            dashes = DASHES.match(option)
            if dashes and dashes[0] != "--":  # -training.max_steps, or with a dash that a text processor made
                right = f"--{option.removeprefix(dashes[0])}"
                self.problems.append(f"{option}: an option begins with two plain hyphens; write {right}")
                if not equals and waiting and not DASHES.match(waiting[-1]):
                    waiting.pop()
            elif not option.startswith("--"):
                quotes = any(quote in f"{option}{text}" for quote in TYPOGRAPHIC_QUOTES)
                hint = "; typographic quotes do not quote: use ' or \"" if quotes else ""
                self.problems.append(f"{option}{equals}{text}: expected --section.setting VALUE{hint}")
            elif equals:
                yield option, text
            else:
                yield option, waiting.pop() if waiting and not waiting[-1].startswith("--") else None


def _nested(name: str, value: Any) -> str:
    """A setting as it stands in a file: `training: {max_steps: 5}`."""
    section, _, field = name.partition(".")
    return f"{section}: {{{field}: {show(value)}}}"


def _read(path: Path) -> str:
    """The text of a settings file, in UTF-8, or in UTF-16 as PowerShell's `>` writes it.

    Raises:
        YamlProblems: it is too large, or not text.
        OSError: it cannot be read.
    """
    with contextlib.suppress(OSError):  # the current folder was deleted
        path = path.absolute()
    with path.open("rb") as file:
        content = file.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise YamlProblems(f": larger than {LARGEST_FILE >> 20} MiB, so probably not a settings file")
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        where = ": not a text file" if b"\0" in content else f" line {line}: not UTF-8 text; save the file as UTF-8"
        raise YamlProblems(where) from error
    if "\0" in text:
        raise YamlProblems(": not a text file")
    return text


def _from_text(text: str, types: tuple[type, ...]) -> Any:
    """A value of the environment or command line; text stays as typed where the setting is text."""
    try:
        value = load_yaml(text)
    except YamlProblems:
        return text
    is_text = isinstance(value, str) or (str in types and not isinstance(value, types))
    return text if is_text else value
