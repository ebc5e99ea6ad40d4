"""Terminal output of a run: a live progress display with permanent lines above it, or plain lines without a terminal."""

from __future__ import annotations

import itertools
import math
import sys
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from statistics import fmean
from typing import Protocol, TextIO

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.text import Text

BAR_WIDTH = 40
SPARKLINE_LEVELS = "▁▂▃▄▅▆▇█"
SPARKLINE_WIDTH = 16  # characters
ASCII_LEVELS = str.maketrans(SPARKLINE_LEVELS + "·", "__..-=+#" + "|")  # for terminals without Unicode


class Console(Protocol):
    """Output of a run; all text is formatted and printable."""

    def print(self, text: str) -> None:
        """Print permanent lines."""

    def show(self, label: str, done: float, total: float | None, figures: str) -> None:
        """Show the current progress on a live display."""

    def print_progress(self, text: str) -> None:
        """Print the current progress if there is no live display."""

    def close(self) -> None:
        """Restore the terminal."""


def open_console(stream: TextIO | None = None) -> Console:
    """Return a live console on a terminal that can move its cursor, else a plain one; without stdout it is silent."""
    stream = sys.stdout if stream is None else stream
    if stream is None or getattr(stream, "closed", False):
        return PlainConsole(None)
    rich = RichConsole(file=stream, force_terminal=stream.isatty(), highlight=False)
    return LiveConsole(rich) if rich.is_terminal and not rich.is_dumb_terminal else PlainConsole(stream)


class PlainConsole:
    """Lines without control characters; silent without a stream or once writing to it fails.

    A closed pipe (`| head`) must not end the training.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def print(self, text: str) -> None:
        """Print and flush."""
        if self._stream is None:
            return
        try:
            print(text, file=self._stream, flush=True)
        except (OSError, ValueError):  # ValueError: the stream was closed
            self._stream = None

    def show(self, label: str, done: float, total: float | None, figures: str) -> None:
        """Do nothing: there is no live display."""

    def print_progress(self, text: str) -> None:
        """Print and flush."""
        self.print(text)

    def close(self) -> None:
        """Do nothing."""


class LiveConsole:
    """A progress bar with figures below it, because one line of 80 columns has no room for both.

    `Text` is never parsed as markup. Errors of a closed terminal are ignored, because they must not end the training.
    """

    def __init__(self, rich: RichConsole) -> None:
        self._rich = rich
        columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(BAR_WIDTH)
        self._progress = _WithFigures(*columns, console=rich, transient=True)
        self._task: TaskID | None = None

    def print(self, text: str) -> None:
        """Print above the progress bar; the terminal wraps the lines, so that they can be copied."""
        with suppress(OSError, ValueError):
            self._rich.print(Text(text), soft_wrap=True)

    def show(self, label: str, done: float, total: float | None, figures: str) -> None:
        """Update the progress bar and the figures; without a total the bar is animated but shows no fraction."""
        with suppress(OSError, ValueError):
            if self._task is not None and total is not None:
                self._progress.update(self._task, description=label, total=total, completed=done, figures=figures)
            else:
                self._start_task(label, done, total, figures)

    def print_progress(self, text: str) -> None:
        """Do nothing: the live display shows it already."""

    def close(self) -> None:
        """Remove the progress bar and show the cursor."""
        with suppress(OSError, ValueError):
            self._progress.stop()

    def _start_task(self, label: str, done: float, total: float | None, figures: str) -> None:
        """Start a new task, because rich cannot remove the total of a task."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._progress.start()
        self._task = self._progress.add_task(label, total=total, completed=int(done), figures=figures)


class _WithFigures(Progress):
    """A progress bar with lines of text below it, truncated at the width of the terminal."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        lines = (line for task in self.tasks for line in task.fields["figures"].splitlines())
        yield from (Text(f"  {_encodable(line, self.console)}", no_wrap=True, overflow="ellipsis") for line in lines)


def _encodable(text: str, console: RichConsole) -> str:
    return text.translate(ASCII_LEVELS) if console.options.ascii_only else text


class Sparkline:
    """The recent values of a number as a line of block characters (▇▅▄▃▃▂▂▁), each the mean of consecutive values."""

    def __init__(self, per_character: int = 8) -> None:
        self._values: deque[float] = deque(maxlen=SPARKLINE_WIDTH * per_character)

    def add(self, value: float) -> None:
        """Add the next value; values that are not finite are ignored."""
        if math.isfinite(value):
            self._values.append(value)

    def __str__(self) -> str:
        """Return the line, scaled from the lowest to the highest mean; empty with fewer than two values."""
        values = list(self._values)
        if len(values) < 2:
            return ""
        n = min(SPARKLINE_WIDTH, len(values))
        edges = [round(i * len(values) / n) for i in range(n + 1)]
        means = [fmean(values[start:end]) for start, end in itertools.pairwise(edges)]
        low, span, top = min(means), max(means) - min(means), len(SPARKLINE_LEVELS) - 1
        return "".join(SPARKLINE_LEVELS[int((mean - low) / span * top) if span else 0] for mean in means)
