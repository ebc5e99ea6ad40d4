"""The prompt loop of `savant chat`: reads messages and commands, and prints answers while they are generated.

If input and output are a terminal that supports it, messages are edited with prompt_toolkit; otherwise, for example with
`TERM=dumb`, they are read line by line. Answers are printed to standard output, notes and errors to standard error.
"""

from __future__ import annotations

import argparse
import codecs
import difflib
import io
import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from rich.console import Console
from rich.table import Table

from savant_ray.chat.conversation import Conversation
from savant_ray.command_line import file_path, loops, refuse_undecodable, temperature
from savant_ray.data.atomic_files import write_atomically
from savant_ray.errors import SavantError, describe, error_context, print_error
from savant_ray.reporting.wording import escape_controls

PROMPT = "> "
TRIPLE_QUOTES = '"""'  # begin and end a message of several lines
INCAPABLE_TERMINALS = ("", "dumb", "unknown")
HELP = {
    "/reset": "begin a new conversation; the system message stays",
    "/system TEXT": 'set the system message; "" removes it; without TEXT: show it',
    "/temperature T": "set the sampling temperature; 0: always the most likely token; without T: show it",
    "/loops N": "set the number of times that the recurrent block is applied; without N: show it",
    "/save FILE": "write the conversation as JSON Lines, a format that data.sources accepts",
    "/help": "show this help",
    "/exit": "end the program; also Ctrl+D",
}
INPUT_HELP = f"{TRIPLE_QUOTES} begins and ends a message of several lines. Ctrl+C stops an answer."
EDITOR_HELP = "Alt+Enter begins a new line."


class ChatTerminal:
    """Handles messages and commands, and prints answers and notes."""

    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation
        self._is_interactive = sys.stdin.isatty()
        is_capable = sys.stdout.isatty() and os.environ.get("TERM", "") not in INCAPABLE_TERMINALS
        self._has_editor = self._is_interactive and is_capable
        self._stop_requested = False
        self._saved_file: Path | None = None  # to which this conversation was saved, so it may be replaced
        self._notes = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._commands = {
            "/reset": self._reset,
            "/system": self._system,
            "/temperature": self._temperature,
            "/loops": self._loops,
            "/save": self._save,
            "/help": self._help,
        }

    def run(self, title: str) -> int:
        """Read and answer messages until the end of the input, and return the exit code.

        It is 1 if the input is not a terminal and a message or command has failed, otherwise 0. The title is printed first
        if the input is a terminal.
        """
        if self._is_interactive:
            behavior = "answers your messages"
            if self.conversation.continues_text:
                behavior = "continues your text (with --conversation it answers questions)"
            self._note(f"{title} {behavior}. /help lists the commands, Ctrl+D ends the program.")
        read = self._reader()
        has_failed, is_leaving = False, False
        while True:
            try:
                text = read()
                is_leaving = False
                if not self._handle(text):
                    break
            except EOFError:
                break
            except KeyboardInterrupt:
                if not self._is_interactive:
                    raise
                if is_leaving:
                    break
                is_leaving = True
                self._note("Ctrl+C again ends the program, and so does Ctrl+D")
            except SavantError as error:
                print_error(error)
                has_failed = True
        return int(has_failed and not self._is_interactive)

    def _reader(self) -> Callable[[], str]:
        """Return the function that reads a message, and install the signal handlers that it needs.

        The function raises EOFError at the end of the input, and KeyboardInterrupt after Ctrl+C.
        """
        if isinstance(sys.stdin, io.TextIOWrapper):
            ascii_only = codecs.lookup(sys.stdin.encoding).name == "ascii"  # a locale without an encoding, such as C
            # Undecodable input is refused when it is handled.
            sys.stdin.reconfigure(encoding="utf-8" if ascii_only else None, errors="surrogateescape")
        if not self._is_interactive:
            return read_message
        signal.signal(signal.SIGINT, self._request_stop)
        signal.signal(signal.SIGTERM, _exit)  # by an exception, so that the editor restores the terminal's mode
        if self._has_editor:
            from savant_ray.chat.editor import message_editor

            return message_editor(PROMPT, [*self._commands, "/exit"], has_open_triple_quotes)
        self._signals, written = socket.socketpair()  # Python writes a byte for each signal
        self._signals.setblocking(False)
        written.setblocking(False)
        signal.set_wakeup_fd(written.detach(), warn_on_full_buffer=False)
        return self._read_with_prompt

    def _read_with_prompt(self) -> str:
        try:
            # First, so that Ctrl+C at the prompt raises KeyboardInterrupt.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            print(PROMPT, end="", file=sys.stderr, flush=True)
            return read_message(self._read_line)
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            raise
        finally:
            signal.signal(signal.SIGINT, self._request_stop)

    def _read_line(self) -> str:
        """Return the next line of the terminal.

        `select` also returns at a signal. With `readline` alone, a Ctrl+C just before it is noticed after the next line.
        """
        with suppress(BlockingIOError):
            self._signals.recv(4096)  # of signals whose handlers have been called
        select.select([sys.stdin, self._signals], [], [])
        return sys.stdin.readline()

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        self._stop_requested = True

    def _handle(self, text: str) -> bool:
        """Answer a message or execute a command; return whether to continue.

        Raises:
            SavantError: it cannot be answered or executed.
        """
        refuse_undecodable(text)
        if text.startswith("/"):
            name, argument = [*text.split(maxsplit=1), ""][:2]
            if name == "/exit":
                return False
            if name not in self._commands:
                raise SavantError(_unknown_command(name, [*self._commands, "/exit"]))
            try:
                self._commands[name](argument.strip())
            except argparse.ArgumentTypeError as error:
                raise SavantError(f"{name}: {error}") from error
        elif message := without_triple_quotes(text):
            self._answer(message)
        return True

    def _answer(self, message: str) -> None:
        show = escape_controls if sys.stdout.isatty() else str
        self._stop_requested = False
        with error_context("generating an answer"):
            for piece in self.conversation.ask(message, lambda: self._stop_requested):
                print(show(piece), end="", flush=True)
        print(flush=True)
        for note in self.conversation.notes:
            self._note(note)

    def _note(self, text: str) -> None:
        self._notes.print(escape_controls(text), style="dim")

    def _reset(self, argument: str) -> None:
        self.conversation.reset()
        self._saved_file = None
        self._note("conversation reset")

    def _system(self, argument: str) -> None:
        if argument:
            self.conversation.set_system("" if argument in ('""', "''") else without_triple_quotes(argument))
        self._note(f"system message: {self.conversation.system or 'none'}")

    def _temperature(self, argument: str) -> None:
        if argument:
            self.conversation.temperature = temperature(argument)
        self._note(f"temperature: {self.conversation.temperature:g}")

    def _loops(self, argument: str) -> None:
        if argument:
            self.conversation.n_loops = loops(argument)
        self._note(f"loops: {self.conversation.n_loops}")

    def _save(self, argument: str) -> None:
        if not argument:
            raise SavantError("/save: the name of the file is missing, such as /save conversation.jsonl")
        if not self.conversation.turns:
            raise SavantError("/save: there is no conversation yet")
        path = file_path(argument)
        try:
            if path != self._saved_file and path.exists():
                raise SavantError(f"/save: {argument} exists already; choose another name")
            write_atomically(path, self.conversation.to_jsonl())
        except OSError as error:
            raise SavantError(f"/save: {describe(error)}") from error
        self._saved_file = path
        self._note(f"{argument} is written")

    def _help(self, argument: str) -> None:
        table = Table.grid(padding=(0, 2))
        for command, meaning in HELP.items():
            table.add_row(command, meaning)
        self._notes.print(table)
        self._note(f"{INPUT_HELP} {EDITOR_HELP}" if self._has_editor else INPUT_HELP)


def read_message(read_line: Callable[[], str] | None = None) -> str:
    """Return the next message: a line, or the lines between triple quotes. `read_line` is `sys.stdin.readline` by default.

    Raises:
        EOFError: the input has ended.
    """
    read_line = read_line or sys.stdin.readline
    text = read_line()
    if not text:
        raise EOFError
    while has_open_triple_quotes(text) and (line := read_line()):
        text += line
    return text.rstrip("\r\n")


def has_open_triple_quotes(text: str) -> bool:
    """Return whether a message begins with triple quotes that are not closed yet."""
    stripped = text.strip()
    return stripped.startswith(TRIPLE_QUOTES) and not (
        len(stripped) >= 2 * len(TRIPLE_QUOTES) and stripped.endswith(TRIPLE_QUOTES)
    )


def without_triple_quotes(text: str) -> str:
    """Return a message without surrounding white space and triple quotes."""
    stripped = text.strip()
    return (
        stripped.removeprefix(TRIPLE_QUOTES).removesuffix(TRIPLE_QUOTES).strip()
        if stripped.startswith(TRIPLE_QUOTES)
        else stripped
    )


def _unknown_command(name: str, commands: list[str]) -> str:
    close = difflib.get_close_matches(name, commands, n=1)
    hint = f"did you mean {close[0]}?" if close else f"the commands are {', '.join(commands)}"
    return f"{escape_controls(name)}: no such command; {hint} (to send a message that begins with /, put a space before it)"


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)
