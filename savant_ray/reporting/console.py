"""The terminal: a live display with the story scrolling above it, or plain lines where nobody watches."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Protocol, TextIO

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.text import Text

from savant_ray.reporting.trend import HEIGHTS

BAR_WIDTH = 40
PLAIN_HEIGHTS = str.maketrans(HEIGHTS + "·", "__..-=+#" + "|")  # for terminals without Unicode


class Console(Protocol):
    """Where a run speaks; all text comes formatted and printable."""

    def say(self, text: str) -> None:
        """Lines that stay."""

    def show(self, label: str, done: float, total: float | None, figures: str) -> None:
        """What is going on right now, for a display that changes."""

    def remark(self, text: str) -> None:
        """The same from time to time, for a display that does not."""

    def close(self) -> None:
        """Leaves the terminal as it was."""


def open_console(stream: TextIO | None = None) -> Console:
    """A live one on a terminal that can move its cursor, else a plain one; a silent one if there is no stdout."""
    stream = sys.stdout if stream is None else stream
    if stream is None or getattr(stream, "closed", False):
        return PlainConsole(None)
    rich = RichConsole(file=stream, force_terminal=stream.isatty(), highlight=False)
    return LiveConsole(rich) if rich.is_terminal and not rich.is_dumb_terminal else PlainConsole(stream)


class PlainConsole:
    """Lines without control characters. A reader that went away (`| head`) must not end the training.

    Without a stream, or when it was closed, nothing is printed.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def say(self, text: str) -> None:
        """Prints and flushes."""
        if self._stream is None:
            return
        try:
            print(text, file=self._stream, flush=True)
        except (OSError, ValueError):  # ValueError: somebody closed it
            self._stream = None

    def show(self, label: str, done: float, total: float | None, figures: str) -> None:
        """Nothing changes on paper."""

    def remark(self, text: str) -> None:
        """Prints."""
        self.say(text)

    def close(self) -> None:
        """Nothing to undo."""


class LiveConsole:
    """What is done with a bar, and the figures below it: together they would not fit into 80 columns.

    `Text` is never read as markup. A terminal that was closed must not end the training either: its errors are
    left alone.
    """

    def __init__(self, rich: RichConsole) -> None:
        self._rich = rich
        columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(BAR_WIDTH)
        self._progress = _WithFigures(*columns, console=rich, transient=True)
        self._task: TaskID | None = None

    def say(self, text: str) -> None:
        """Prints above the live line; wrapped by the terminal, so that it can be copied."""
        with suppress(OSError, ValueError):
            self._rich.print(Text(text), soft_wrap=True)

    def show(self, label: str, done: float, total: float | None, figures: str) -> None:
        """Changes the live line; without a total the bar only shows that something happens."""
        with suppress(OSError, ValueError):
            if self._task is not None and total is not None:
                self._progress.update(self._task, description=label, total=total, completed=done, figures=figures)
            else:
                self._begin(label, done, total, figures)

    def remark(self, text: str) -> None:
        """The live line says it already."""

    def close(self) -> None:
        """Removes the live line and gives the cursor back."""
        with suppress(OSError, ValueError):
            self._progress.stop()

    def _begin(self, label: str, done: float, total: float | None, figures: str) -> None:
        """A new task, because rich cannot take a task's total back."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._progress.start()
        self._task = self._progress.add_task(label, total=total, completed=int(done), figures=figures)


class _WithFigures(Progress):
    """A bar with lines of text below it, which are cut where the terminal ends."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        lines = (line for task in self.tasks for line in task.fields["figures"].splitlines())
        yield from (Text(f"  {_drawable(line, self.console)}", no_wrap=True, overflow="ellipsis") for line in lines)


def _drawable(text: str, console: RichConsole) -> str:
    return text.translate(PLAIN_HEIGHTS) if console.options.ascii_only else text
