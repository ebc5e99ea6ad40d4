"""`savant chat` in a pseudo-terminal: editing, Ctrl+C, Ctrl+D, what is printed, and the end of the terminal."""

from __future__ import annotations

import os
import re
import signal
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.chat.fixed_answers import write_run
from tests.terminal import ended, read_until, start_in_terminal

ROOT = Path(__file__).parents[2]
BEGINS_READING = "\x1b[?2004h"  # prompt_toolkit turns bracketed paste on
ENTER, CTRL_C, CTRL_D, ALT_ENTER = "\r", "\x03", "\x04", "\x1b\r"
SECONDS = 40
ENDLESS = {"model": {"max_seq_len": 100_000}, "validation": {"max_new_tokens": 99_000}}


class Terminal:
    """`savant chat` in a pseudo-terminal."""

    def __init__(self, run: Path, kind: str, command: list[str]) -> None:
        variables = {**os.environ, "TERM": kind, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        chat = [sys.executable, "-m", "savant_ray.cli", "chat", str(run), "--conversation"]
        self.process, self.terminal = start_in_terminal([*command, *chat], run.parent, variables)
        self._prompt = "> " if kind == "dumb" else BEGINS_READING
        self._unread = ""
        self.read_until("Ctrl+D ends the program")
        self.read_prompt()

    def read_until(self, words: str) -> str:
        """Wait for these words behind those of the previous call; return what is shown up to their end."""
        if words not in self._unread:
            self._unread += read_until(self.terminal, words, SECONDS, self._unread)
        shown, words, self._unread = self._unread.partition(words)
        return shown + words

    def read_prompt(self) -> None:
        """Wait until the next message can be typed."""
        self.read_until(self._prompt)

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def ended(self) -> int:
        process, self.process = self.process, 0
        return ended(process)

    def close(self) -> None:
        if self.terminal:
            os.close(self.terminal)
            self.terminal = 0


Start = Callable[..., Terminal]


@pytest.fixture
def start() -> Iterator[Start]:
    """Return a function that starts `savant chat`; what still runs at the end is killed."""
    started: list[Terminal] = []

    def start(run: Path, kind: str = "xterm-256color", command: tuple[str, ...] = ()) -> Terminal:
        started.append(Terminal(run, kind, list(command)))
        return started[-1]

    yield start
    for terminal in started:
        terminal.close()
        if terminal.process:
            os.kill(terminal.process, signal.SIGKILL)
            terminal.ended()


@pytest.mark.parametrize("kind", ["xterm-256color", "dumb"])
def test_ctrl_c_stops_an_answer_and_at_an_empty_prompt_only_the_second_one_ends_the_program(
    kind: str, tmp_path: Path, start: Start
) -> None:
    terminal = start(write_run(tmp_path, " a\x1b]0;é🙂", end=None, **ENDLESS), kind)
    for _ in range(2):
        terminal.type("who?" + ENTER)
        # Control characters are escaped, and characters of several tokens are whole.
        terminal.read_until("a\\x1b]0;é🙂: a\\x1b]0;é🙂: a\\x1b")
        terminal.type(CTRL_C)
        terminal.read_until("stopped")
        terminal.read_prompt()
    terminal.type(CTRL_C)
    terminal.read_until("Ctrl+C again ends the program")
    terminal.read_prompt()
    terminal.type("/loops" + ENTER)
    terminal.read_until("loops: 1")
    terminal.read_prompt()
    terminal.type(CTRL_C)
    terminal.read_until("Ctrl+C again ends the program")
    terminal.read_prompt()
    terminal.type(CTRL_C)
    assert terminal.ended() == 0


def test_a_message_has_the_lines_of_alt_enter_of_a_paste_and_of_a_block(tmp_path: Path, start: Start) -> None:
    terminal = start(write_run(tmp_path, " 7!"))
    terminal.type("this is discarded" + CTRL_C + "\x1b[200~" + "word\n" * 9000 + "\x1b[201~" + ENTER)
    terminal.read_until("the message is too long: 45,")
    terminal.read_prompt()
    for message in ["1" + ALT_ENTER + "2", "\x1b[200~3\n4\x1b[201~", f'"""5{ENTER}6"""', "\x1b[31m7\x1b[0m8"]:
        terminal.type(message + ENTER)
        terminal.read_until("7!")
        terminal.read_prompt()
    terminal.type("/sa\t a.jsonl" + ENTER)
    terminal.read_until("is written")
    terminal.read_prompt()
    terminal.type(CTRL_D)
    assert terminal.ended() == 0
    written = (tmp_path / "a.jsonl").read_text()
    assert re.findall(r'"user","content":"(.*?)"', written) == [r"1\n2", r"3\n4", r"5\n6", "78"]


def test_lines_that_are_typed_during_an_answer_are_the_next_messages(tmp_path: Path, start: Start) -> None:
    terminal = start(write_run(tmp_path, " 7!"))
    terminal.type("1\n2\n\n/system Be brief.\n/system\n")
    for _ in range(2):
        terminal.read_until("system message: Be brief.")
    terminal.read_prompt()
    terminal.type("/save a.jsonl" + ENTER)
    terminal.read_until("is written")
    assert re.findall(r'"user","content":"(.*?)"', (tmp_path / "a.jsonl").read_text()) == ["1", "2"]


@pytest.mark.parametrize(("hangup", "codes"), [("default", {-signal.SIGHUP}), ("ignored", {0, 1})])
def test_the_program_ends_with_its_terminal(hangup: str, codes: set[int], tmp_path: Path, start: Start) -> None:
    run = write_run(tmp_path, " abc", end=None, **ENDLESS)
    ignoring = ("/bin/sh", "-c", "trap '' HUP; exec \"$@\"", "sh")
    terminal = start(run, command=ignoring if hangup == "ignored" else ())
    terminal.type("who?" + ENTER)
    terminal.read_until("abc: abc")
    if hangup == "ignored":
        terminal.type(CTRL_C)
        terminal.read_until("stopped")
        terminal.read_prompt()
    terminal.close()
    assert terminal.ended() in codes


def test_a_program_that_is_ended_leaves_the_terminal_in_its_normal_mode(tmp_path: Path, start: Start) -> None:
    terminal = start(write_run(tmp_path, " 7!"))
    terminal.type("who?" + ENTER)
    terminal.read_until("7!")
    terminal.read_prompt()
    terminal.type("half a mess")
    terminal.read_until("half a mess")
    os.kill(terminal.process, signal.SIGTERM)
    assert terminal.ended() == 128 + signal.SIGTERM
    modes = termios.tcgetattr(terminal.terminal)
    assert modes[3] & termios.ICANON and modes[3] & termios.ECHO
