"""Commands → one function call each → exit code.

What a command needs is imported when it runs, so that `savant --help` answers at once and a wrong setting is told
before torch and Ray are loaded.
"""

from __future__ import annotations

import argparse
import difflib
import io
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from savant_ray.errors import SavantError, SettingsError

if TYPE_CHECKING:
    from savant_ray.config import Config

INTERRUPTED = 130  # what shells say of a command that Ctrl+C ended
QUICKSTART_FOLDER = Path("dataset")


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code (see `savant_ray.errors`)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without Unicode must not end a training
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()  # where a reader went away, here is the place to notice
        return code
    except SavantError as error:
        print(textwrap.indent(str(error), "       ").replace("       ", "error: ", 1), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `| head` has seen enough; the interpreter must not stumble over it again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a file or folder that cannot be read or written, wherever it was
        print(f"error: {error}", file=sys.stderr)
        return 1
    except SystemExit as end:  # argparse: 0 after --help, 2 after a wrong option
        return end.code if isinstance(end.code, int) else 1


class Command(NamedTuple):
    """A word after `savant`."""

    run: Callable[[Sequence[str]], int]
    summary: str


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if argv else 2
    name, *arguments = argv
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, list(COMMANDS), n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(COMMANDS)}"
        raise SettingsError(f"{name}: no such command; {hint}")
    return COMMANDS[name].run(arguments)


def _overview() -> str:
    commands = "\n".join(f"  {name:<11}{command.summary}" for name, command in COMMANDS.items())
    return f"usage: savant COMMAND …\n\n{commands}\n\nsavant COMMAND --help tells more."


def _train(arguments: Sequence[str]) -> int:
    parser = _parser("train", settings=True)
    parser.add_argument("--fresh", action="store_true", help="start anew; an older run of that name is moved aside")
    parser.add_argument(
        "--allow-changes",
        action="store_true",
        help="go on although model, tokenizer or text are not those of the checkpoint, and keep what fits",
    )
    options, config = _settings(parser, arguments)
    from savant_ray.cluster.driver import train

    return train(config, fresh=options.fresh, allow_changes=options.allow_changes)


def _prepare(arguments: Sequence[str]) -> int:
    parser = _parser("prepare", settings=True)
    parser.add_argument("--quickstart", action="store_true", help="write the quickstart's text files into dataset/")
    parser.add_argument("--force", action="store_true", help="with --quickstart: also those that are there already")
    options, config = _settings(parser, arguments)
    if options.force and not options.quickstart:
        parser.error("--force goes with --quickstart")
    if options.quickstart:
        from savant_ray.data.quickstart import write_quickstart

        write_quickstart(QUICKSTART_FOLDER, force=options.force)
        if options.config is None:
            return 0
    from savant_ray.cluster.preparation import prepare

    prepare(config)
    return 0


def _generate(arguments: Sequence[str]) -> int:
    parser = _parser("generate")
    parser.add_argument(
        "--checkpoint", metavar="PATH", required=True, help="a run folder or a step_N in it; also s3://…"
    )
    parser.add_argument("--prompt", metavar="TEXT", required=True, help="the text to go on with")
    parser.add_argument("--max-new-tokens", type=_count, metavar="N", help="longest answer [the run's]")
    parser.add_argument(
        "--temperature", type=_temperature, metavar="T", help="0: always the likeliest token [the run's]"
    )
    parser.add_argument("--seed", type=int, metavar="N", default=0, help="another seed, another answer [0]")
    parser.add_argument("--loops", type=_count, metavar="N", help="passes of the recurrent block [the model's n_loops]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write {prompt, text, checkpoint} to this file")
    options = parser.parse_args(arguments)
    from savant_ray.cluster.storage import on_this_machine
    from savant_ray.training.sampling import stream_answer

    with on_this_machine(options.checkpoint) as checkpoint:
        pieces = stream_answer(
            checkpoint,
            options.prompt,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            seed=options.seed,
            n_loops=options.loops,
        )
        text = _print_answer(options.prompt, pieces)
    if options.json is not None:
        _write_json(options.json, {"prompt": options.prompt, "text": text, "checkpoint": options.checkpoint})
    return 0


def _export(arguments: Sequence[str]) -> int:
    parser = _parser("export")
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a run folder, a step_N in it (also s3://…), or a file of the original"
    )
    parser.add_argument(
        "--format",
        choices=("original", "safetensors"),
        required=True,
        help="a file that the original script loads, or a folder with weights, settings and tokenizer",
    )
    parser.add_argument("--output", type=Path, metavar="PATH", required=True, help="the new file or folder")
    options = parser.parse_args(arguments)
    from savant_ray.cluster.storage import on_this_machine
    from savant_ray.training.export import export

    with on_this_machine(options.checkpoint) as checkpoint:
        for warning in export(checkpoint, options.format, options.output):
            print(f"warning: {warning}", file=sys.stderr)
    print(f"{options.output} is written")
    return 0


def _config(arguments: Sequence[str]) -> int:
    _, config = _settings(_parser("config", settings=True), arguments)
    from savant_ray.config import dump_yaml

    print(dump_yaml(config), end="")
    return 0


def _benchmark(arguments: Sequence[str]) -> int:
    parser = _parser("benchmark")
    parser.add_argument("name", metavar="NAME", help="what to measure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    options = parser.parse_args(arguments)
    from savant_ray.benchmarks.registry import run

    run(options.name, options.json)
    return 0


COMMANDS = {
    "train": Command(_train, "train a run, or go on with it"),
    "prepare": Command(_prepare, "tokenise and pack the training text, which train does by itself too"),
    "generate": Command(_generate, "let a checkpoint go on with a prompt"),
    "export": Command(_export, "write a checkpoint for other programs"),
    "config": Command(_config, "print the complete settings"),
    "benchmark": Command(_benchmark, "measure against the straightforward way"),
}


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


def _parser(command: str, settings: bool = False) -> argparse.ArgumentParser:
    usage = "%(prog)s [--config FILE.yaml] [--section.setting VALUE …]" if settings else None
    parser = argparse.ArgumentParser(
        prog=f"savant {command}",
        usage=usage,
        description=COMMANDS[command].summary,
        allow_abbrev=False,
        add_help=not settings,
    )
    if settings:
        parser.add_argument("-h", "--help", action=_HelpWithSettings, nargs=0, help="this, and all settings")
        parser.add_argument(
            "--config", type=Path, metavar="FILE.yaml", help="YAML file with what differs from the defaults"
        )
    return parser


def _settings(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[argparse.Namespace, Config]:
    """The command's own options, and the settings from file, environment and what is left of the command line."""
    options, settings = parser.parse_known_args(arguments)
    from savant_ray.config import load_config

    return options, load_config(settings, file=options.config)


def _print_answer(prompt: str, pieces: Any) -> str:
    """Prints prompt and answer as it comes; a terminal gets no control characters from the model."""
    from savant_ray.reporting.wording import printable

    show = printable if sys.stdout.isatty() else str
    print(show(prompt), end="", flush=True)
    text = ""
    for piece in pieces:
        text += piece
        print(show(piece), end="", flush=True)
    print()
    return text


def _write_json(path: Path, content: dict[str, Any]) -> None:
    import json

    try:
        path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise SavantError(f"--json {path}: {error.strerror}") from error


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value
