"""Collects settings from a YAML file, the environment and the command line, and the errors in them.

Each value is stored with its origin, so that an error message names the file, variable or option to change. This module
knows no particular setting: `config.py` passes their names and types. Text from all three sources is converted by the
same rules (those of `yaml_text.py`, so `2e-5` is a number) and then validated in strict mode.
"""

from __future__ import annotations

import codecs
import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from savant_ray.settings.files import suggestion
from savant_ray.settings.messages import TYPOGRAPHIC_QUOTES, closest, did_you_mean, validation_messages
from savant_ray.settings.table import PREFIX, Setting
from savant_ray.settings.yaml_text import YamlError, load_yaml, show

MAX_FILE_BYTES = 1 << 20  # a larger file, such as the training text, is refused without being parsed
# Dashes before the name of an option. A number such as -5 does not match: it is a value.
DASHES = re.compile(r"[-\u2010-\u2015\u2212\ufe58\ufe63\uff0d]+(?=[^\W\d])")

# Kubernetes adds these variables to every pod for each service of its namespace, and Docker for each linked container:
# https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
_SERVICE = re.compile(
    r"\w+_SERVICE_HOST|\w+_SERVICE_PORT(_\w+)?|\w+_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?|\w+_ENV_\w+"
)
_SERVICE_WITH_VALUE = re.compile(r"\w+_PORT=(tcp|udp|sctp)://.*|\w+_NAME=/[^/]+/[^/]+", re.DOTALL)


@dataclass(frozen=True)
class SettingValue:
    """A value and its origin: file and setting, environment variable, or option."""

    value: Any
    origin: str


class SettingsReader:
    """Collects values, of which later ones replace earlier ones, and error messages in `problems`."""

    def __init__(self, settings: Sequence[Setting], defaults: Mapping[str, Any] | None = None) -> None:
        self.settings = {setting.name: setting for setting in settings}
        self.values = {name: SettingValue(value, name) for name, value in (defaults or {}).items()}
        self.problems: list[str] = []

    def read_file(self, path: Path) -> None:
        """Read the settings of a YAML file."""
        try:
            content = load_yaml(_read_text(path.expanduser()))
        except YamlError as error:
            self.problems += [f"{path}{message}" for message in error.args]
        except OSError as error:
            where = "" if error.filename in (None, str(path)) else f" ({error.filename})"
            hint = suggestion(path) if isinstance(error, FileNotFoundError) else ""
            self.problems.append(f"{path}: {(error.strerror or str(error)).lower()}{where}{hint}")
        except RuntimeError:  # raised by expanduser
            self.problems.append(f"{path}: there is no such user, or no home folder")
        except ValueError as error:  # a NUL character in the name
            self.problems.append(f"{path}: {error}")
        else:
            self._read_sections(content, path)

    def read_environment(self, variables: Mapping[str, str]) -> list[str]:
        """Read settings such as `SAVANT_TRAINING__MAX_STEPS=1000`.

        Quotes around a value are removed, because `docker --env-file` and Kubernetes pass them on.

        Returns:
            The ignored variables: they begin with `SAVANT_` but resemble no setting. Variables that Kubernetes and
            Docker define for a service named savant-… are not included.
        """
        known = {setting.variable: setting for setting in self.settings.values()}
        ignored = []
        for variable in sorted(v for v in variables if v.upper().startswith(PREFIX)):
            if variable in known:
                self._add_text(known[variable], _unquote(variables[variable]), variable)
            elif _is_service_variable(variable, variables[variable]):
                continue
            elif (suggestion := _suggest_variable(variable, known)) is not None:
                self.problems.append(f"{variable}: no such setting{suggestion}")
            else:
                ignored.append(variable)
        return ignored

    def read_command_line(self, arguments: Sequence[str]) -> None:
        """Read settings such as `--training.max_steps 1000` or `--training.max_steps=1000`."""
        for option, text in self._split_options(arguments):
            name = option.removeprefix("--")
            if name not in self.settings:
                self.problems.append(f"{option}: no such setting{self._suggest_option(name)}")
            elif text is None:
                values = ": true or false" if self.settings[name].types == (bool,) else ""
                self.problems.append(f"{option}: a value is missing{values}")
            else:
                self._add_text(self.settings[name], text, option)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return the values by section and name."""
        sections: dict[str, dict[str, Any]] = {}
        for name, value in self.values.items():
            section, field = name.split(".", 1)
            sections.setdefault(section, {})[field] = value.value
        return sections

    def add_validation_error(self, error: ValidationError, names: Sequence[str]) -> None:
        """Add the messages of pydantic's error, each with the origin of the value; `names` are used for suggestions."""
        for name, message in validation_messages(error, names):
            setting = ".".join(re.split(r"[.\[]", name)[:2])
            if setting in self.values:
                self.problems.append(f"{self.values[setting].origin}{name.removeprefix(setting)}: {message}")
            else:  # the setting has its default, which is incompatible with another setting, named in the message
                origins = [value.origin for other, value in self.values.items() if other in message]
                self.problems.append(f"{name}: {message}{f' ({origins[0]})' if origins else ''}")

    def _add_text(self, setting: Setting, text: str, origin: str) -> None:
        """Add a value of the environment or the command line."""
        if not text and not {str, type(None)} & set(setting.types):
            self.problems.append(f"{origin}: a value is missing")
        elif any(0xD800 <= ord(character) <= 0xDFFF for character in text):  # Python's form of undecodable bytes
            self.problems.append(f"{origin}: not UTF-8 text")
        else:
            try:
                self.values[setting.name] = SettingValue(_convert(text, setting.types), origin)
            except YamlError as error:
                self.problems += [f"{origin}{message}" for message in error.args]

    def _suggest_option(self, name: str) -> str:
        positive = closest(name.removeprefix("no-"), self.settings) if name.startswith("no-") else None
        if positive and bool in self.settings[positive].types:
            return f"; did you mean --{positive} false?"
        return did_you_mean(name, self.settings)

    def _read_sections(self, content: Any, path: Path) -> None:
        sections = sorted({name.split(".")[0] for name in self.settings})
        if not isinstance(content, dict):
            if content is not None:  # the file is not empty
                self.problems.append(f"{path}: expected sections with settings, found {show(content)}")
            return
        for section, fields in content.items():
            if section not in sections:
                suggestion = self._suggest_section(str(section), sections, fields)
                self.problems.append(f"{path}: {section}: {suggestion}")
            elif not isinstance(fields, dict | None):
                self.problems.append(f"{path}: {section}: expected settings below it, found {show(fields)}")
            else:
                self._read_fields(section, fields or {}, path)

    def _suggest_section(self, key: str, sections: Sequence[str], value: Any) -> str:
        """Return what to write instead of an outermost key that is not the name of a section."""
        dotted = key.removeprefix("--").removeprefix(PREFIX).replace("__", ".").lower()
        if dotted in self.settings:
            return f"settings are nested in a file; write {_nested(dotted, value)}"
        if "." not in dotted and (section := closest(dotted, sections)):
            return f"no such setting; did you mean {section}?"
        setting = closest(dotted, self.settings)
        return f"no such setting; did you mean {_nested(setting, value)}?" if setting else "no such setting"

    def _read_fields(self, section: str, fields: dict[Any, Any], path: Path) -> None:
        for field, value in fields.items():
            name = f"{section}.{field}"
            if name in self.settings:
                self.values[name] = SettingValue(value, f"{path}: {name}")
            else:
                self.problems.append(f"{path}: {name}: no such setting{did_you_mean(name, self.settings)}")

    def _split_options(self, arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
        """Yield each option with its value, None if the value is missing."""
        remaining = list(reversed(arguments))
        while remaining:
            option, equals, text = remaining.pop().partition("=")
            dashes = DASHES.match(option)
            if dashes and dashes[0] != "--":  # one hyphen, or a dash that a word processor has inserted
                corrected = f"--{option.removeprefix(dashes[0])}"
                self.problems.append(f"{option}: an option begins with two plain hyphens; write {corrected}")
                if not equals and remaining and not DASHES.match(remaining[-1]):
                    remaining.pop()  # the option's value, which must not be reported as a second error
            elif not option.startswith("--"):
                has_quotes = any(quote in f"{option}{text}" for quote in TYPOGRAPHIC_QUOTES)
                hint = "; use ' or \" instead of typographic quotes" if has_quotes else ""
                self.problems.append(f"{option}{equals}{text}: expected --section.setting VALUE{hint}")
            elif equals:
                yield option, text
            else:
                yield option, remaining.pop() if remaining and not remaining[-1].startswith("--") else None


def _nested(name: str, value: Any) -> str:
    """Return a setting as it is written in a file: `training: {max_steps: 5}`."""
    section, _, field = name.partition(".")
    return f"{section}: {{{field}: {show(value)}}}"


def _read_text(path: Path) -> str:
    """Read a settings file in UTF-8, or in UTF-16 as PowerShell's `>` writes it.

    Raises:
        YamlError: the file is too large or not text.
        OSError: the file cannot be read.
    """
    with contextlib.suppress(OSError):  # the working directory was deleted
        path = path.absolute()
    with path.open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise YamlError(f": larger than {MAX_FILE_BYTES >> 20} MiB, so probably not a settings file")
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        message = ": not a text file" if b"\0" in content else f" line {line}: not UTF-8 text; save the file as UTF-8"
        raise YamlError(message) from error
    if "\0" in text:
        raise YamlError(": not a text file")
    return text


def _convert(text: str, types: tuple[type, ...]) -> Any:
    """Convert a value of the environment or the command line as YAML.

    It stays a string if the setting accepts strings, but not the type that the value has in YAML.

    Raises:
        YamlError: it looks like a list or mapping, which the setting requires, but is not valid.
    """
    try:
        value = load_yaml(text)
    except YamlError:
        if str not in types and text.lstrip().startswith(("[", "{")):
            raise
        return text
    is_number = float in types and type(value) is int
    is_text = isinstance(value, str) or (str in types and not isinstance(value, types) and not is_number)
    return text if is_text else value


def _unquote(text: str) -> str:
    """Remove quotes around the whole value, interpreting it as YAML does, and the carriage return of Windows."""
    text = text.removesuffix("\r")
    stripped = text.strip()
    if len(stripped) < 2 or stripped[0] not in "'\"" or stripped[-1] != stripped[0]:
        return text
    inner = stripped[1:-1]
    try:
        value = load_yaml(stripped)
    except YamlError:
        # Quotes inside belong to several words, such as "a" "b". Otherwise the text has an invalid escape sequence.
        return text if stripped[0] in inner else inner
    return value if isinstance(value, str) else text


def _is_service_variable(variable: str, value: str) -> bool:
    """Whether Kubernetes or Docker defines the variable for a service whose name begins with `savant`."""
    return bool(_SERVICE.fullmatch(variable) or _SERVICE_WITH_VALUE.fullmatch(f"{variable}={value}"))


def _suggest_variable(variable: str, known: Iterable[str]) -> str | None:
    """Return `; did you mean …?`, "" if no setting is similar, or None if the variable is probably not a setting.

    A variable counts as a setting if it has the form SAVANT_SECTION__NAME or is similar to the name of a setting, with
    or without the section. `known` are the variables of all settings.
    """
    known = list(known)
    words = _words(variable)
    # Other programs may use the prefix, too. A shorter part of a setting's name therefore needs a closer match.
    section = next((s for s in {_section(name) for name in known} if words.startswith(f"{s}_")), None)
    if section is not None:
        fields = {_field(name): name for name in known if _section(name) == section}
        suggestion = _most_similar(words.removeprefix(f"{section}_"), fields, 0.8)
    else:
        suggestion = _most_similar(words, {_words(name): name for name in known}, 0.85)
        first_with_field = {_field(name): name for name in reversed(known)}  # the first setting with that field
        suggestion = suggestion or _most_similar(words, first_with_field, 0.9)
    if suggestion is not None:
        return f"; did you mean {suggestion}?"
    return did_you_mean(variable, known) if re.search(r"__|\.", variable) else None


def _most_similar(word: str, names: Mapping[str, str], cutoff: float) -> str | None:
    close = difflib.get_close_matches(word, names, n=1, cutoff=cutoff)
    return names[close[0]] if close else None


def _section(variable: str) -> str:
    return _words(variable.partition("__")[0])


def _field(variable: str) -> str:
    return _words(variable.partition("__")[2])


def _words(variable: str) -> str:
    """Return the words of a variable in upper case, without the prefix and joined by single underscores."""
    return re.sub(r"[\W_]+", "_", variable.upper().removeprefix(PREFIX)).strip("_")
