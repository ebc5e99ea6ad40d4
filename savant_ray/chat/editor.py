"""Reads messages in a terminal with prompt_toolkit: history, several lines, pasted text, completion of commands."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import create_output
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.shortcuts import CompleteStyle


def message_editor(prompt: str, commands: Sequence[str], is_unfinished: Callable[[str], bool]) -> Callable[[], str]:
    """Return a function that reads a message.

    Enter ends the message unless `is_unfinished` returns True for it. Ctrl+C discards the text. If there is no text, the
    function raises KeyboardInterrupt after Ctrl+C, and EOFError after Ctrl+D or if the terminal is closed.
    """
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_unfinished(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    @keys.add("<sigint>")
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    @keys.add(Keys.Vt100MouseEvent)
    def _(event: KeyPressEvent) -> None:
        """Ignore the event: pasted color codes (`ESC[31m`) look like one, and the default handler fails on them."""

    output = create_output()
    if isinstance(output, Vt100_Output):
        # No requests for the cursor position: some terminals do not answer them, and prompt_toolkit then prints a warning.
        output.enable_cpr = False
    session: PromptSession[str] = PromptSession(
        prompt,
        multiline=True,
        key_bindings=keys,
        completer=WordCompleter(commands, sentence=True),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,  # reserves no lines below the prompt for a menu
        enable_suspend=True,  # by Ctrl+Z
        output=output,
    )
    return session.prompt
