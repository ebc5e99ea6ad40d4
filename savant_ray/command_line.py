"""What the commands share: a parser that knows the settings, and numbers that are checked."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from savant_ray.errors import SettingsError

if TYPE_CHECKING:
    from savant_ray.config import Config

FOR_AN_ORIGINAL = (
    "A checkpoint may also be a file of the original program (step_X.pt), or a folder or s3://… with nothing but such "
    "files. It holds neither a tokenizer nor all settings of its model: give them with --config, or as --section.setting "
    "VALUE, for instance --data.tokenizer FOLDER --model.n_heads 16 --model.n_loops 12. Widths are read off its weights. "
    "`savant config --help` lists all settings."
)
MOST_NEW_TOKENS = 1_000_000  # each token takes milliseconds, and memory in the global loops
MOST_LOOPS = 1024  # each has keys and values of its own
SEEDS = (-(2**63), 2**64 - 1)  # of torch.Generator
_DOTTED = re.compile(r"--\w+\.[\w.]+(=.*)?", re.DOTALL)  # an option that is a setting


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


class _ConfigFile(argparse.Action):
    """`--config FILE`, once: of two files it would not be clear whether one replaces the other or adds to it."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        if not values:
            raise SettingsError("--config: the name of a file is missing")
        earlier, path = getattr(namespace, self.dest), _path_on_this_machine(values)
        if earlier not in (None, path):
            raise SettingsError(
                f"--config: given twice, {earlier} and {path}; give one file (with make: CONFIG={path})"
            )
        setattr(namespace, self.dest, path)


def new_parser(
    command: str, summary: str, settings: bool = False, takes_original: bool = False
) -> argparse.ArgumentParser:
    """Of `savant COMMAND`; with `settings` it also takes --config, and its --help lists them all.

    With `takes_original` it takes settings for a file of the original only, and its --help says so.
    """
    usage = "%(prog)s [--config FILE.yaml] [--section.setting VALUE …]" if settings else None
    parser = argparse.ArgumentParser(
        prog=f"savant {command}",
        usage=usage,
        description=summary,
        allow_abbrev=False,
        add_help=not settings,
        epilog=FOR_AN_ORIGINAL if takes_original else None,
    )
    if settings:
        parser.add_argument("-h", "--help", action=_HelpWithSettings, nargs=0, help="this, and all settings")
    if settings or takes_original:
        of_what = "settings for a file of the original" if takes_original else "what differs from the defaults"
        parser.add_argument("--config", action=_ConfigFile, metavar="FILE.yaml", help=f"YAML file with {of_what}")
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
    own_options = [f"--{name.replace('_', '-')}" for name in vars(options)]
    for previous, argument in zip(["", *settings], settings, strict=False):
        follows_option = previous.startswith("--") and "=" not in previous
        refuse_undecodable(argument, previous if follows_option else "")
        is_value = follows_option and not argument.startswith("--")
        close = difflib.get_close_matches(argument.replace("_", "-"), own_options, n=1, cutoff=0.8)
        if close and "." not in argument and not is_value:
            raise SettingsError(f"{argument}: no such option; did you mean {close[0]}?")
    from savant_ray.config import ignored_variables, load_config

    config = load_config(settings, file=options.config)
    for variable in ignored_variables():
        print(
            f"note: {variable} is not a setting and is ignored; settings look like SAVANT_TRAINING__MAX_STEPS",
            file=sys.stderr,
        )
    return options, config


def with_settings_for_original(
    parser: argparse.ArgumentParser, arguments: Sequence[str]
) -> tuple[argparse.Namespace, dict[str, dict[str, Any]]]:
    """The command's own options, and by section the settings from --config and `--section.setting VALUE`.

    Raises:
        SettingsError: something is no setting, or has no value.
    """
    own: list[str] = []
    settings: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not _DOTTED.fullmatch(word):
            own.append(word)
            continue
        settings.append(word)
        if "=" not in word and words and not words[0].startswith("--"):
            settings.append(words.pop(0))
    options = parser.parse_args(own)
    if not settings and options.config is None:
        return options, {}
    from savant_ray.config import explicit_settings

    return options, explicit_settings(settings, options.config)


def refuse_deleted_folder() -> None:
    """Check that the working directory is there, without which torch ends the process while it is imported.

    Raises:
        SettingsError: it was deleted.
    """
    from savant_ray.locations import working_directory

    working_directory()


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


def file_path(text: str) -> Path:
    """A path: `~` and `file:` URIs are understood, and what cannot be a path is refused."""
    try:
        return _path_on_this_machine(text)
    except SettingsError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _path_on_this_machine(text: str) -> Path:
    from savant_ray.locations import is_uri, local_path, working_directory

    if is_uri(text):
        raise SettingsError(f"{text} is a URI; this has to be a path on this machine")
    path = local_path(text)
    if not path.is_absolute():
        working_directory()
    return path


def new_tokens(text: str) -> int:
    """A number of tokens to generate."""
    return _whole_number(text, 1, MOST_NEW_TOKENS)


def loops(text: str) -> int:
    """A number of passes of the recurrent block."""
    return _whole_number(text, 1, MOST_LOOPS)


def depths(text: str) -> list[int]:
    """Numbers of passes of the recurrent block, with commas between them."""
    return [loops(part) for part in text.split(",")]


def seed(text: str) -> int:
    """A seed that PyTorch's generators take."""
    return _whole_number(text, *SEEDS)


def _whole_number(text: str, least: int, most: int) -> int:
    if not re.fullmatch(r"[-+]?\d{1,20}", text.strip()) or not least <= int(text) <= most:
        shown = text if len(text) <= 40 else f"{text[:40]}…"
        raise argparse.ArgumentTypeError(f"{shown!r} is not a whole number from {least:,} to {most:,}")
    return int(text)


def temperature(text: str) -> float:
    """A number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value
