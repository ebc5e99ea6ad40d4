"""The settings: from any text, structure, options or variables a Config or a SettingsError, and a Config reads back."""

from __future__ import annotations

import re
from random import Random
from typing import Any

import yaml

from savant_ray.config import Config, SourceConfig, dump_yaml, load_config, setting_rows
from savant_ray.errors import SettingsError
from savant_ray.settings.table import PREFIX, Setting
from tests.fuzz.drawing import NUMBERS, ODD, a_text, a_value, drawn, spoilt
from tests.fuzz.property import holds_for, scratch

ROWS = setting_rows()
NAMES = [row.name for row in ROWS]
FIELDS = [name.split(".")[1] for name in NAMES]
WORDS = ["auto", "adamw", "muon", "bf16", "fp32", "rotary", "none", "skip", "train", "data.jsonl", "CPU", "GPU", "a/b"]
BRICKS = [
    *NAMES,
    *FIELDS,
    *Config.model_fields,
    *WORDS,
    *ODD,
    "\n",
    "\n  ",
    ": ",
    ": ",
    " ",
    ", ",
    "{",
    "}",
    "[",
    "]",
    "1",
]
TAGS = (
    "!!int",
    "!!float",
    "!!bool",
    "!!null",
    "!!str",
    "!!map",
    "!!seq",
    "!!set",
    "!!binary",
    "!!python/name:os.system",
)


def a_key(chance: Random) -> Any:
    """Of a mapping: mostly a name that exists, or nearly."""
    name = chance.choice((*Config.model_fields, *FIELDS, *NAMES, *SourceConfig.model_fields))
    return chance.choice((name, name, name[1:], a_text(chance), chance.choice((None, True, 3, 2.5))))


def a_setting(chance: Random, name: str) -> Any:
    """A value for it: its default, plausible, or anything."""
    default = ROWS[NAMES.index(name)].default
    words = chance.choice(WORDS), a_text(chance), str(chance.choice(NUMBERS))
    small = chance.choice((1, 2, 3, 8, 64, 0.5, True, False))
    return chance.choice(
        (default, default, small, small, chance.choice(words), chance.choice(NUMBERS), a_value(chance, a_key))
    )


def some_settings(chance: Random) -> dict[Any, Any]:
    """Sections with settings."""
    sections: dict[Any, Any] = {}
    for name in chance.sample(NAMES, chance.randrange(6)):
        section, field = name.split(".")
        sections.setdefault(section, {})[field] = a_setting(chance, name)
    return sections


def a_structure(chance: Random) -> Any:
    """Sections, most with something wrong in them, or anything."""
    content: Any = some_settings(chance)
    if chance.random() < 0.3:
        content[a_key(chance)] = a_value(chance, a_key)
    return content if chance.random() < 0.95 else a_value(chance, a_key)


def a_settings_file(chance: Random) -> bytes:
    """YAML, spoilt YAML, a pile of bricks, or any bytes."""
    kind = chance.randrange(8)
    if kind < 3:
        return to_bytes(yaml.safe_dump(a_structure(chance), default_flow_style=chance.choice((True, False, None))))
    if kind < 5:
        text = yaml.safe_dump(some_settings(chance), default_flow_style=chance.random() < 0.5, allow_unicode=True)
        return spoilt(to_bytes(text), chance)
    if kind < 7:
        bricks = chance.choices(BRICKS, k=chance.randrange(30))
        bricks.insert(
            chance.randrange(len(bricks) + 1),
            chance.choice((*TAGS, "&a [*a, ", '"\\ud800"', '"\\UFFFFFFFF"', "[" * 60)),
        )
        return to_bytes("".join(f"{brick} " if brick.startswith("!!") else brick for brick in bricks))
    return chance.randbytes(chance.randrange(60))


def to_bytes(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def options_and_variables(chance: Random) -> tuple[list[str], dict[str, str]]:
    """A command line and an environment."""
    arguments: list[str] = []
    for _ in range(chance.randrange(5)):
        name = chance.choice(NAMES)
        text = as_text(a_setting(chance, name))
        option = "--" + chance.choice((name, name, name, name.replace("_", "-"), name[:-1], name.split(".")[1]))
        arguments += chance.choice(([option, text], [f"{option}={text}"], [option], [text]))
    names = [PREFIX + chance.choice((name, name[1:])).replace(".", "__").upper() for name in chance.sample(NAMES, 3)]
    environment = {
        name: chance.choice(("{}", "{}", '"{}"', "'{}'")).format(as_text(a_setting(chance, chance.choice(NAMES))))
        for name in names[: chance.randrange(4)]
    }
    return arguments, {**environment, "HOME": "/", a_text(chance): "x"}


def right_settings(chance: Random) -> dict[str, dict[str, Any]]:
    """A few settings with odd values that are allowed."""
    sections: dict[str, dict[str, Any]] = {}
    for row in chance.sample(ROWS, 8):
        section, field = row.name.split(".")
        sections.setdefault(section, {})[field] = a_right_value(chance, row)
    return sections


def a_right_value(chance: Random, row: Setting) -> Any:
    default = row.default
    if default is None or isinstance(default, dict):
        return (
            chance.choice((None, {a_name(chance): 0.5})) if dict in row.types else chance.choice((None, a_name(chance)))
        )
    if isinstance(default, list):
        return [{"path": chance.choice((a_name(chance), [a_name(chance)])), "weight": 1e-300}]
    if isinstance(default, str):
        return a_name(chance) if row.types.count(str) == 1 and bool not in row.types else default
    return chance.choice((default, {int: 7 * 2**50, float: 1e-7, bool: True}[type(default)]))


def a_name(chance: Random) -> str:
    """Text of odd characters, or that looks like a number."""
    text = chance.choice((a_text(chance, 12), str(chance.choice(NUMBERS)), chance.choice(ODD), a_text(chance)))
    return text.encode(errors="ignore").decode() or "x"


def as_text(value: Any) -> str:
    return (
        value
        if isinstance(value, str)
        else yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n")
    )


def read_back_or_refused(arguments: list[str], environment: dict[str, str], content: bytes | None) -> bool:
    """Whether they are settings, which then read back to the same, or refused with a message."""
    file = scratch() / "settings.yaml"
    if content is not None:
        file.write_bytes(content)
    try:
        config = load_config(arguments, environment, None if content is None else file)
    except SettingsError as error:
        return bool(str(error).strip()) and error.exit_code == 2
    return reads_back(config)


def reads_back(config: Config) -> bool:
    """By us, by every other program, and from plain values."""
    file = scratch() / "again.yaml"
    file.write_text(dump_yaml(config), encoding="utf-8")
    elsewhere = yaml.safe_load(file.read_text())
    return load_config((), {}, file) == config == Config.from_dict(config.to_dict()) and elsewhere == config.to_dict()


@holds_for(
    "YAML of settings with right and wrong values, spoilt, piled up from names, tags and marks, or any bytes",
    quick=150,
    one_in=4,
    content=drawn(a_settings_file),
)
def test_any_file_is_refused_or_gives_settings_that_read_back_unchanged(content: bytes) -> None:
    assert read_back_or_refused([], {}, content)


@holds_for(
    "up to 5 options and 4 variables, right, misspelt and wrong",
    quick=100,
    one_in=10,
    a_case=drawn(options_and_variables),
)
def test_any_options_and_variables_are_refused_or_give_settings_that_read_back_unchanged(
    a_case: tuple[list[str], dict[str, str]],
) -> None:
    assert read_back_or_refused(*a_case, None)


@holds_for("nested Python values, most with names that exist", quick=100, one_in=2, structure=drawn(a_structure))
def test_any_nested_values_are_accepted_or_refused_as_settings(structure: Any) -> None:
    if not isinstance(structure, dict):
        return
    try:
        Config.from_dict(structure)
    except SettingsError as error:
        assert str(error).strip() and error.exit_code == 2


@holds_for("8 settings with odd values that are allowed", quick=60, one_in=20, settings=drawn(right_settings))
def test_valid_settings_read_back_unchanged(settings: dict[str, dict[str, Any]]) -> None:
    try:
        config = Config.from_dict(settings)
    except SettingsError as error:
        assert re.match(r"(run.name|model.n_heads|scaling.num_workers): ", str(error))
    else:
        assert reads_back(config)
