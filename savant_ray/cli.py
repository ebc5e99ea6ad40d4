"""Commands → one function call each → exit code. What the commands are is in `commands.py`."""

from __future__ import annotations

import difflib
import io
import os
import sys

from savant_ray.commands import COMMANDS
from savant_ray.errors import SavantError, SettingsError, tell

INTERRUPTED = 130  # what shells say of a command that Ctrl+C ended


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code (see `savant_ray.errors`)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without Unicode must not end a training
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()  # where a reader went away, here is the place to notice
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `| head` has seen enough; the interpreter must not stumble over it again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (SavantError, OSError) as error:
        return tell(error)
    except SystemExit as end:  # argparse: 0 after --help, 2 after a wrong option
        return end.code if isinstance(end.code, int) else 1


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
