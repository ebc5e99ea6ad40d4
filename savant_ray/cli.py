"""Entry point of `savant`: runs a command of `commands.py` and returns its exit code."""

from __future__ import annotations

import difflib
import sys
import threading
from collections.abc import Sequence

from savant_ray import __version__
from savant_ray.commands import COMMANDS
from savant_ray.errors import SettingsError, error_context, print_error, report_thread_error
from savant_ray.streams import Output, open_standard_streams

HINT = "`savant COMMAND --help` lists the options of a command, `savant --version` prints the version."
INTERRUPTED = 130  # exit code of shells for a command that was ended by Ctrl+C


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code (see `savant_ray.errors`); raises no exception."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    output = open_standard_streams()
    command = COMMANDS.get(arguments[0]) if arguments else None
    output.tolerant = command is not None and not command.prints_result
    threading.excepthook = report_thread_error
    try:
        with error_context(f"running savant {' '.join(arguments[:1])}"):
            code = _run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as end:  # argparse: 0 after --help, 2 after a wrong option
        code = end.code if isinstance(end.code, int) else 1
    except BaseException as error:  # a Rust panic is not an Exception
        if error is not output.error:
            return print_error(error, verbose="--verbose" in arguments)
        code = 1  # standard output failed; the last line prints why
    return code if output.tolerant or output.error is None else _report_output_error(output, code)


def _report_output_error(output: Output, code: int) -> int:
    """Return the exit code if the result could not be written; print an error unless the reader closed a pipe."""
    if output.error is not None and not isinstance(output.error, BrokenPipeError):
        print(f"error: standard output cannot be written: {output.error.strerror}", file=sys.stderr)
    return code or 1


def _run(argv: Sequence[str]) -> int:
    if argv and argv[0] == "help" and len(argv) > 1:
        argv = [argv[1], "--help"]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"savant_ray {__version__}")
        return 0
    name, *arguments = argv
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, list(COMMANDS), n=1)
        hint = f"did you mean {close[0]}?" if close else f"the commands are {', '.join(COMMANDS)}"
        raise SettingsError(f"{name}: no such command; {hint}")
    return COMMANDS[name].run(arguments)


def _overview() -> str:
    commands = "\n".join(f"  {name:<12}{command.summary}" for name, command in COMMANDS.items())
    return f"usage: savant COMMAND …\n\n{commands}\n\n{HINT}"


if __name__ == "__main__":
    sys.exit(main())
