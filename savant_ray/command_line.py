"""What the commands share: a parser that knows the settings, and numbers that are checked."""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from savant_ray.config import Config

MOST_NEW_TOKENS = 1_000_000  # each token takes milliseconds, and memory in the global loops
MOST_LOOPS = 1024  # each has keys and values of its own
SEEDS = (-(2**63), 2**64 - 1)  # of torch.Generator


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
    return parser


def with_settings(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[argparse.Namespace, Config]:
    """The command's own options, and the settings from file, environment and what is left of the command line."""
    options, settings = parser.parse_known_args(arguments)
    from savant_ray.config import load_config

    return options, load_config(settings, file=options.config)


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
