"""Argument parser of the commands, and the types of their options."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from savant_ray.errors import SettingsError

if TYPE_CHECKING:
    from savant_ray.config import Config

HELP_FOR_ORIGINAL = (
    "A checkpoint may also be a file of the original script (step_X.pt), or a folder or s3://… that contains only such "
    "files. It includes neither a tokenizer nor all settings of the model: pass them with --config, or as --section.setting "
    "VALUE, for instance --data.tokenizer FOLDER --model.n_heads 16 --model.n_loops 12. Widths are derived from the "
    "weights. `savant config --help` lists all settings."
)
MAX_COUNT = 1_000_000  # of replicas or requests
MIN_SEED, MAX_SEED = -(2**63), 2**64 - 1  # of torch.Generator
API_KEY_VARIABLE = "SAVANT_API_KEY"  # of `savant serve`; other commands ignore it without a note
_SETTING = re.compile(r"--\w+\.[\w.]+(=.*)?", re.DOTALL)


class _HelpWithSettings(argparse.Action):
    """`--help` with all settings, which are imported only when it is used."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from savant_ray.config import all_settings, section_descriptions
        from savant_ray.settings.table import settings_table

        width = shutil.get_terminal_size().columns
        print(parser.format_help())
        print("settings (SAVANT_TRAINING__MAX_STEPS=1000 in the environment is --training.max_steps 1000):\n")
        print(settings_table(all_settings(), section_descriptions(), width))
        parser.exit()


class _ConfigFile(argparse.Action):
    """`--config FILE`, a path or the name of a shipped file.

    It is accepted once, because with two files it would be unclear whether they are merged.
    """

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        if not values:
            raise SettingsError("--config: the name of the file is missing")
        from savant_ray.settings.files import settings_file, shadowed_file

        named = _local_path(values)
        earlier, path = getattr(namespace, self.dest), settings_file(named)
        if earlier not in (None, path):
            raise SettingsError(f"--config: given twice, {earlier} and {path}; use one file (with make: CONFIG={path})")
        if earlier is None and (shipped := shadowed_file(named)) is not None:
            print(f"note: --config {named} is {path} in this folder, not the shipped {shipped}", file=sys.stderr)
        setattr(namespace, self.dest, path)


def new_parser(
    command: str,
    summary: str,
    settings: bool = False,
    takes_original: bool = False,
    shows_config: bool = True,
    arguments: str = "",
) -> argparse.ArgumentParser:
    """Return the parser of a command.

    Args:
        command: name of the command.
        summary: description in its `--help`.
        settings: whether the command takes --config and settings; its `--help` then lists all settings.
        takes_original: whether the command takes --config and settings for files of the original.
        shows_config: whether `--help` shows --config; not if the command itself passes it.
        arguments: positional arguments and required options in the usage of a command with settings.
    """
    config = "[--config FILE.yaml]" if shows_config else ""
    parts = ("%(prog)s", arguments, config, "[options] [--section.setting VALUE …]")
    usage = " ".join(filter(None, parts)) if settings else None
    parser = argparse.ArgumentParser(
        prog=f"savant {command}",
        usage=usage,
        description=summary,
        allow_abbrev=False,
        add_help=not settings,
        epilog=HELP_FOR_ORIGINAL if takes_original else None,
    )
    if settings:
        parser.add_argument("-h", "--help", action=_HelpWithSettings, nargs=0, help="print this help and all settings")
    if settings or takes_original:
        content = (
            f"settings {'for a file of the original script' if takes_original else 'that differ from the defaults'}"
        )
        shipped = "" if takes_original else ", or the name of a shipped file such as quickstart"
        help_text = f"YAML file with {content}{shipped}" if shows_config else argparse.SUPPRESS
        parser.add_argument("--config", action=_ConfigFile, metavar="FILE.yaml", help=help_text)
    parser.add_argument(
        "--verbose", action="store_true", help="also print the output of Ray, and the traceback of an unexpected error"
    )
    return parser


def parse_with_settings(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[argparse.Namespace, Config]:
    """Parse the options of a command, and load the settings from --config, environment and the remaining arguments.

    Raises:
        SettingsError: a setting is invalid.
    """
    options, settings = parser.parse_known_args(arguments)
    return options, load_settings(parser, options, settings)


def load_settings(parser: argparse.ArgumentParser, options: argparse.Namespace, settings: Sequence[str]) -> Config:
    """Load the settings from --config, environment and arguments, among which may be misspelt options of the command.

    Raises:
        SettingsError: a setting is invalid, or an argument resembles an option.
    """
    own_options = [option for option in parser._option_string_actions if option.startswith("--")]
    for previous, argument in zip(["", *settings], settings, strict=False):
        follows_option = previous.startswith("--") and "=" not in previous
        refuse_undecodable(argument, previous if follows_option else "")
        # The value of a setting may resemble an option, as in `--run.name fresh`.
        is_value = follows_option and not argument.startswith("--")
        close = difflib.get_close_matches(argument.replace("_", "-"), own_options, n=1, cutoff=0.8)
        if close and "." not in argument and not is_value:
            raise SettingsError(f"{argument}: no such option; did you mean {close[0]}?")
    from savant_ray.config import ignored_variables, load_config

    config = load_config(settings, file=options.config)
    for variable in sorted({*ignored_variables()} - {API_KEY_VARIABLE}):
        print(
            f"note: {variable} is not a setting and is ignored; settings look like SAVANT_TRAINING__MAX_STEPS",
            file=sys.stderr,
        )
    return config


def parse_with_original_settings(
    parser: argparse.ArgumentParser, arguments: Sequence[str]
) -> tuple[argparse.Namespace, dict[str, dict[str, Any]]]:
    """Parse the options of a command; return them and the settings of --config and `--section.setting VALUE` by section.

    Raises:
        SettingsError: a name is not a setting, or a value is missing.
    """
    own_arguments, settings = split_settings(arguments)
    options = parser.parse_args(own_arguments)
    if not settings and options.config is None:
        return options, {}
    from savant_ray.config import explicit_settings

    return options, explicit_settings(settings, options.config)


def split_settings(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return a command's own arguments, and those of the form `--section.setting VALUE`."""
    own_arguments: list[str] = []
    settings: list[str] = []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if not _SETTING.fullmatch(argument):
            own_arguments.append(argument)
            continue
        settings.append(argument)
        if "=" not in argument and remaining and not remaining[0].startswith("--"):
            settings.append(remaining.pop(0))
    return own_arguments, settings


def refuse_deleted_folder() -> None:
    """Check that the working directory exists, because importing torch aborts the process without it.

    Raises:
        SettingsError: the working directory was deleted.
    """
    from savant_ray.locations import working_directory

    working_directory()


def refuse_undecodable(text: str, option: str = "") -> None:
    """Check that an argument is UTF-8, because neither settings nor tokenizers accept anything else.

    Raises:
        SettingsError: `text` contains surrogates, by which Python represents undecodable bytes.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        shown = os.fsencode(text).decode(errors="backslashreplace")
        named = f"{option}: {shown}" if option else shown
        raise SettingsError(f"{named} is not UTF-8 text") from None


def utf8_text(text: str) -> str:
    """Return an argument that is text for the model."""
    try:
        refuse_undecodable(text)
    except SettingsError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def file_path(text: str) -> Path:
    """Return a local path from an argument, which may begin with `~` or be a `file:` URI."""
    try:
        return _local_path(text)
    except SettingsError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def output_file(text: str) -> Path:
    """Return the path of a file that a command writes at its end; refuse one that cannot be written."""
    path = file_path(text)
    try:
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{text} is a folder")
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"{text}: there is no folder {path.parent}")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise argparse.ArgumentTypeError(f"{text} is not writable by this user")
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}") from error
    return path


def _local_path(text: str) -> Path:
    from savant_ray.locations import is_uri, local_path, working_directory

    if is_uri(text):
        raise SettingsError(f"{text} is a URI; this has to be a path on this machine")
    path = local_path(text)
    if not path.is_absolute():
        working_directory()  # raises SettingsError if it was deleted
    return path


def _whole_number(minimum: int, maximum: int) -> Callable[[str], int]:
    """Return a function that returns an argument as a number within these limits."""

    def number(text: str) -> int:
        if not re.fullmatch(r"[-+]?\d{1,20}", text.strip()) or not minimum <= int(text) <= maximum:
            shown = text if len(text) <= 40 else f"{text[:40]}…"
            raise argparse.ArgumentTypeError(f"{shown!r} is not a whole number from {minimum:,} to {maximum:,}")
        return int(text)

    return number


new_tokens = _whole_number(1, 1_000_000)  # a token takes milliseconds, and memory in the cache of each global loop
loops = _whole_number(1, 1024)  # each loop caches keys and values of its own
trials = _whole_number(1, 10_000)
count = _whole_number(1, MAX_COUNT)
port = _whole_number(1, (1 << 16) - 1)
seed = _whole_number(MIN_SEED, MAX_SEED)
_step = _whole_number(1, 10**12)


def depths(text: str) -> list[int]:
    """Return numbers of loops from a comma-separated list."""
    return [loops(part) for part in text.split(",")]


def step_range(text: str) -> tuple[int | None, int | None]:
    """Return the first and the last step of a range such as 100..200 or 100; None for an end that is left out."""
    first, dots, last = text.partition("..")
    if not dots and not first.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a step nor a range such as 100..200, 100.. or ..200")
    start, end = (_step(step) if step else None for step in (first, last if dots else first))
    if start is not None and end is not None and start > end:
        raise argparse.ArgumentTypeError(f"{text!r} ends before it begins")
    return start, end


def replicas(text: str) -> tuple[int, int]:
    """Return the smallest and the largest number of replicas, from a number or a range such as 1-4."""
    first, dash, last = text.partition("-")
    if not first or (dash and not last):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of at least 1 nor a range such as 1-4")
    smallest = count(first)
    return smallest, _whole_number(smallest, MAX_COUNT)(last) if dash else smallest


def temperature(text: str) -> float:
    """Return a number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value
