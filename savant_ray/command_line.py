"""What the commands share: a parser that knows the settings, and numbers that are checked."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from savant_ray.errors import SettingsError

if TYPE_CHECKING:
    from savant_ray.config import Config


class _HelpWithSettings(argparse.Action):
    """`--help` that loads the settings only when it is asked for them."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from savant_ray.config import section_meanings, setting_rows
        from savant_ray.settings.table import settings_table

        width = shutil.get_terminal_size().columns
        print(parser.format_help())
        print("settings (SAVANT_TRAINING__MAX_STEPS=1000 in the environment is --training.max_steps 1000):\n")
        print(settings_table(setting_rows(), section_meanings(), width))
        parser.exit()


def new_parser(command: str, summary: str, settings: bool = False) -> argparse.ArgumentParser:
    """Of `savant COMMAND`; with `settings` it also takes --config, and its --help lists them all."""
    usage = "%(prog)s [--config FILE.yaml] [--section.setting VALUE …]" if settings else None
    parser = argparse.ArgumentParser(
        prog=f"savant {command}",
        usage=usage,
        description=summary,
        allow_abbrev=False,
        add_help=not settings,
    )
    if settings:
        parser.add_argument("-h", "--help", action=_HelpWithSettings, nargs=0, help="this, and all settings")
        parser.add_argument(
            "--config", type=Path, metavar="FILE.yaml", help="YAML file with what differs from the defaults"
        )
    parser.add_argument(
        "--verbose", action="store_true", help="also print what Ray says, and the traceback of an unexpected error"
    )
    return parser


def with_settings(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[argparse.Namespace, Config]:
    """The command's own options, and the settings from file, environment and what is left of the command line.

    Raises:
        SettingsError: a setting is wrong.
    """
    options, settings = parser.parse_known_args(arguments)
    for option, value in zip(["", *settings], settings, strict=False):
        refuse_undecodable(value, option if option.startswith("--") and "=" not in option else "")
    from savant_ray.config import load_config

    return options, load_config(settings, file=options.config)


def refuse_undecodable(text: str, option: str = "") -> None:
    """Refuse bytes of the command line that are not UTF-8, which Python keeps as surrogates.

    Raises:
        SettingsError: there are some; a setting cannot hold them, and no tokenizer takes them.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        shown = os.fsencode(text).decode(errors="backslashreplace")
        raise SettingsError(f"{option}{': ' * bool(option)}{shown} is not UTF-8 text") from None


def utf8_text(text: str) -> str:
    """Text for the model."""
    try:
        refuse_undecodable(text)
    except SettingsError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def counts(text: str) -> list[int]:
    """Whole numbers of at least 1, with commas between them."""
    return [count(part) for part in text.split(",")]


def temperature(text: str) -> float:
    """A number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value
