"""Any text, nested values, options or variables give a Config or a SettingsError, and each Config reads back."""

from __future__ import annotations

import re
from random import Random
from typing import Any

import yaml

from savant_ray.config import Config, SourceConfig, all_settings, dump_yaml, load_config
from savant_ray.errors import SettingsError
from savant_ray.settings.table import PREFIX, Setting
from tests.fuzz.drawing import NUMBERS, UNUSUAL, damaged, from_seed, random_text, random_value
from tests.fuzz.property import holds_for, scratch

ROWS = all_settings()
NAMES = [row.name for row in ROWS]
FIELDS = [name.split(".")[1] for name in NAMES]
WORDS = ["auto", "adamw", "muon", "bf16", "fp32", "rotary", "none", "skip", "train", "data.jsonl", "CPU", "GPU", "a/b"]
FRAGMENTS = [
    *NAMES,
    *FIELDS,
    *Config.model_fields,
    *WORDS,
    *UNUSUAL,
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


def random_key(rng: Random) -> Any:
    """Return a key of a mapping: in most cases an existing name, or one that is similar."""
    name = rng.choice((*Config.model_fields, *FIELDS, *NAMES, *SourceConfig.model_fields))
    return rng.choice((name, name, name[1:], random_text(rng), rng.choice((None, True, 3, 2.5))))


def random_setting(rng: Random, name: str) -> Any:
    """Return a value for a setting: its default, a plausible one, or any value."""
    default = ROWS[NAMES.index(name)].default
    words = rng.choice(WORDS), random_text(rng), str(rng.choice(NUMBERS))
    small = rng.choice((1, 2, 3, 8, 64, 0.5, True, False))
    return rng.choice(
        (default, default, small, small, rng.choice(words), rng.choice(NUMBERS), random_value(rng, random_key))
    )


def random_settings(rng: Random) -> dict[Any, Any]:
    """Return sections with settings."""
    sections: dict[Any, Any] = {}
    for name in rng.sample(NAMES, rng.randrange(6)):
        section, field = name.split(".")
        sections.setdefault(section, {})[field] = random_setting(rng, name)
    return sections


def random_structure(rng: Random) -> Any:
    """Return sections, most of which contain an error, or any value."""
    content: Any = random_settings(rng)
    if rng.random() < 0.3:
        content[random_key(rng)] = random_value(rng, random_key)
    return content if rng.random() < 0.95 else random_value(rng, random_key)


def random_settings_file(rng: Random) -> bytes:
    """Return YAML, damaged YAML, a sequence of fragments, or any bytes."""
    kind = rng.randrange(8)
    if kind < 3:
        return to_bytes(yaml.safe_dump(random_structure(rng), default_flow_style=rng.choice((True, False, None))))
    if kind < 5:
        text = yaml.safe_dump(random_settings(rng), default_flow_style=rng.random() < 0.5, allow_unicode=True)
        return damaged(to_bytes(text), rng)
    if kind < 7:
        fragments = rng.choices(FRAGMENTS, k=rng.randrange(30))
        fragments.insert(
            rng.randrange(len(fragments) + 1),
            rng.choice((*TAGS, "&a [*a, ", '"\\ud800"', '"\\UFFFFFFFF"', "[" * 60)),
        )
        return to_bytes("".join(f"{fragment} " if fragment.startswith("!!") else fragment for fragment in fragments))
    return rng.randbytes(rng.randrange(60))


def to_bytes(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def options_and_variables(rng: Random) -> tuple[list[str], dict[str, str]]:
    """Return command-line arguments and an environment."""
    arguments: list[str] = []
    for _ in range(rng.randrange(5)):
        name = rng.choice(NAMES)
        text = as_text(random_setting(rng, name))
        option = "--" + rng.choice((name, name, name, name.replace("_", "-"), name[:-1], name.split(".")[1]))
        arguments += rng.choice(([option, text], [f"{option}={text}"], [option], [text]))
    names = [PREFIX + rng.choice((name, name[1:])).replace(".", "__").upper() for name in rng.sample(NAMES, 3)]
    environment = {
        name: rng.choice(("{}", "{}", '"{}"', "'{}'")).format(as_text(random_setting(rng, rng.choice(NAMES))))
        for name in names[: rng.randrange(4)]
    }
    return arguments, {**environment, "HOME": "/", random_text(rng): "x"}


def valid_settings(rng: Random) -> dict[str, dict[str, Any]]:
    """Return eight settings with unusual values, most of which are allowed."""
    sections: dict[str, dict[str, Any]] = {}
    for row in rng.sample(ROWS, 8):
        section, field = row.name.split(".")
        sections.setdefault(section, {})[field] = valid_value(rng, row)
    return sections


def valid_value(rng: Random, row: Setting) -> Any:
    default = row.default
    if default is None or isinstance(default, dict):
        if row.name == "training.profile":
            return rng.choice((None, {"first_step": 7, "steps": 3, "ranks": "all"}))
        if float in row.types or int in row.types:
            return rng.choice((None, 0.5 if float in row.types else 7))
        return rng.choice((None, {random_name(rng): 0.5} if dict in row.types else random_name(rng)))
    if isinstance(default, list):
        return [{"path": rng.choice((random_name(rng), [random_name(rng)])), "weight": 1e-300}]
    if isinstance(default, str) and (float in row.types or int in row.types):
        return rng.choice((default, 7, 7.5 if float in row.types else 1, None if type(None) in row.types else 2))
    if isinstance(default, str):
        return random_name(rng) if row.types.count(str) == 1 and bool not in row.types else default
    return rng.choice((default, {int: 7 * 2**50, float: 1e-7, bool: True}[type(default)]))


def random_name(rng: Random) -> str:
    """Return a text of unusual characters, or one that looks like a number."""
    text = rng.choice((random_text(rng, 12), str(rng.choice(NUMBERS)), rng.choice(UNUSUAL), random_text(rng)))
    return text.encode(errors="ignore").decode() or "x"


def as_text(value: Any) -> str:
    return (
        value
        if isinstance(value, str)
        else yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n")
    )


def read_back_or_refused(arguments: list[str], environment: dict[str, str], content: bytes | None) -> bool:
    """Return whether the settings are refused with a message, or accepted and read back unchanged."""
    file = scratch() / "settings.yaml"
    if content is not None:
        file.write_bytes(content)
    try:
        config = load_config(arguments, environment, None if content is None else file)
    except SettingsError as error:
        return bool(str(error).strip()) and error.exit_code == 2
    return reads_back(config)


def reads_back(config: Config) -> bool:
    """Return whether the settings are read back unchanged from YAML, by us and by PyYAML, and from plain values."""
    file = scratch() / "again.yaml"
    file.write_text(dump_yaml(config), encoding="utf-8")
    elsewhere = yaml.safe_load(file.read_text())
    plain = config.to_dict()
    same = load_config((), {}, file) == config == Config.from_dict(plain) == Config.from_validated(plain)
    return same and elsewhere == plain


@holds_for(
    "YAML of settings with valid and invalid values, damaged, assembled from names, tags and marks, or any bytes",
    quick=150,
    one_in=4,
    content=from_seed(random_settings_file),
)
def test_any_file_is_refused_or_gives_settings_that_read_back_unchanged(content: bytes) -> None:
    assert read_back_or_refused([], {}, content)


@holds_for(
    "up to 5 options and 4 variables, valid, misspelled and invalid",
    quick=100,
    one_in=10,
    case=from_seed(options_and_variables),
)
def test_any_options_and_variables_are_refused_or_give_settings_that_read_back_unchanged(
    case: tuple[list[str], dict[str, str]],
) -> None:
    assert read_back_or_refused(*case, None)


@holds_for(
    "nested Python values, most with names that exist", quick=100, one_in=2, structure=from_seed(random_structure)
)
def test_any_nested_values_are_accepted_or_refused_as_settings(structure: Any) -> None:
    if not isinstance(structure, dict):
        return
    try:
        Config.from_dict(structure)
    except SettingsError as error:
        assert str(error).strip() and error.exit_code == 2


@holds_for("8 settings with unusual values that are allowed", quick=60, one_in=20, settings=from_seed(valid_settings))
def test_valid_settings_read_back_unchanged(settings: dict[str, dict[str, Any]]) -> None:
    try:
        config = Config.from_dict(settings)
    except SettingsError as error:
        assert re.match(r"(run|run.name|model.n_heads|scaling.num_workers): ", str(error))
    else:
        assert reads_back(config)
