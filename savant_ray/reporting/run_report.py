"""Report of one attempt: each event is written to the record (metrics.jsonl), the log and the console.

A live terminal shows each step. The log and a plain console get a line for the first step, the last step and every 30
seconds; of the other events, those with a text (`describe`) are printed when they happen.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Self

from savant_ray.events import AttemptStarted, Event, Notice, Rewound, StepDone, ValidationDone
from savant_ray.reporting.console import Console, Sparkline, open_console
from savant_ray.reporting.record import Follower, Record
from savant_ray.reporting.wording import (
    describe,
    duration,
    escape_controls,
    progress_figures,
    skipped_update,
    step_figures,
    step_label,
    step_panel,
)

LOG = "training_log.txt"
SECONDS_BETWEEN_LINES = 30.0
RECENT_STEPS = 100


class RunReport:
    """Reports one attempt; without a run folder on the console only."""

    def __init__(
        self,
        run_folder: Path | None,
        max_steps: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        followers: Sequence[Follower] = (),
    ) -> None:
        if run_folder is not None:
            run_folder.mkdir(parents=True, exist_ok=True)
        self._record = None if run_folder is None else Record(run_folder, followers)
        self._log = None if run_folder is None else TrainingLog(run_folder / LOG)
        self._console = open_console() if console is None else console
        self._clock, self._max_steps = clock, max_steps
        self._remaining_time, self._stage = RemainingTime(), "starting"
        self._loss_sparkline, self._skipped = Sparkline(), 0  # since the workers have started
        self._limit_gb: float | None = None
        self._last_line_time = clock()
        # The previous validation, or the start of the workers: its name in "5 min since …", and its time.
        self._previous_validation = ("the start", clock())
        self._unprinted_step = ""  # the newest step's line, until it is printed
        self._is_first_step = True
        self._notices: set[str] = set()
        self._log_failure_reported = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._print_newest_step()
        if isinstance(error, Exception) and self._log is not None:  # the command line prints it on the terminal
            self._log.write(escape_controls(f"error: {str(error) or type(error).__name__}"))
        self.close()

    def add_event(self, event: Event) -> None:
        """Record and print an event, except for a notice with the same text as an earlier one, of any worker."""
        if isinstance(event, Notice):
            if event.text in self._notices:
                return
            self._notices.add(event.text)
        if self._record is not None:
            self._record.append(event)
        if isinstance(event, AttemptStarted):  # after it is recorded, because trackers read the settings from its line
            self._on_attempt_started(event)
        elif isinstance(event, Rewound):
            self._on_rewound(event)
        if self._record is not None:
            self._print_warnings(self._record)
        if isinstance(event, StepDone):
            self._on_step(event)
        elif isinstance(event, ValidationDone):
            self._on_validation(event)
        elif text := describe(event):
            self.notify(text)

    def backfill(self, lines: Iterable[dict[str, Any]]) -> None:
        """Add lines to the record that an earlier attempt did not write because its driver was killed."""
        if self._record is not None:
            self._record.backfill(lines)

    def complete_trackers(self) -> None:
        """Send the trackers what they lack of a finished run, which no later attempt would send."""
        if self._record is not None:
            self._record.start_followers()

    @property
    def activity(self) -> str:
        """Current activity of the run, such as "starting Ray" or "training", for the message of an unexpected error."""
        return self._stage

    def begin_stage(self, text: str) -> None:
        """Begin a stage before the first step, such as "starting Ray"."""
        self._stage = text
        self._print_progress(f"{text} …")
        self._console.show(escape_controls(text), 0, None, "")

    def progress(self, done: float, total: float, unit: str) -> None:
        """Report the progress of the stage; `unit` is "bytes" or a plural noun."""
        figures = progress_figures(done, total, unit)
        self._console.show(escape_controls(self._stage), done, total, escape_controls(figures))
        if self._line_is_due():
            self._print_progress(f"{self._stage}: {figures}")

    def notify(self, text: str) -> None:
        """Print lines on the console and in the log."""
        text = escape_controls(text)
        if self._log is not None:
            self._log.write(text)
        self._console.print(text)

    def conclude(self, text: str) -> None:
        """Print how the attempt has ended, after the newest step."""
        self._print_newest_step()
        self.notify(text)

    def log(self, text: str) -> None:
        """Write lines to the log only."""
        if self._log is not None:
            self._log.write(escape_controls(text))

    def close(self) -> None:
        """Restore the terminal and close the files."""
        if self._record is not None:
            self._record.close()
            self._print_warnings(self._record)
        self._console.close()
        if self._log is not None:
            self._log.close()

    def _on_attempt_started(self, event: AttemptStarted) -> None:
        """Reset the record to `event.step`, since later steps are repeated; reset the figures of the live display."""
        if self._record is not None:
            self._record.rewind(event.step, event.validates_first)
        self._stage = "training"
        self._max_steps, self._limit_gb = event.max_steps, event.vram_limit_gb
        self._loss_sparkline, self._skipped = Sparkline(), 0
        self._remaining_time, self._is_first_step, self._unprinted_step = RemainingTime(), True, ""
        self._previous_validation = ("the start", self._clock())

    def _on_rewound(self, event: Rewound) -> None:
        """Reset the record to `event.step`, since later steps are repeated."""
        if self._record is not None:
            self._record.rewind(event.step, repeats_validation=False)
        self._unprinted_step = ""

    def _on_step(self, event: StepDone) -> None:
        self._remaining_time.observe(event.step_seconds, self._clock())
        label = step_label(event.step, self._max_steps)
        seconds_left = self._remaining_time.seconds(self._max_steps - event.step)
        figures = step_figures(event, seconds_left)
        self._loss_sparkline.add(event.train_loss)
        self._skipped += event.skipped_micro_batches
        panel = step_panel(event, str(self._loss_sparkline), self._skipped, self._limit_gb, seconds_left)
        self._console.show(label, event.step, self._max_steps, panel)
        self._unprinted_step = f"{label} · {figures}"
        is_first_or_last = self._is_first_step or event.step == self._max_steps
        self._is_first_step = False
        if event.update_skipped and not math.isfinite(
            event.grad_norm
        ):  # otherwise it is a spike, which has its own message
            self.notify(skipped_update(event))
        if self._line_is_due() or is_first_or_last:
            self._print_newest_step()

    def _on_validation(self, event: ValidationDone) -> None:
        now = self._clock()
        previous, previous_time = self._previous_validation
        self._previous_validation = ("the last", now)
        self.notify(f"{describe(event)} · {duration(now - previous_time)} since {previous}")

    def _print_warnings(self, record: Record) -> None:
        for text in record.warnings():
            self.notify(text)
        if self._log is not None and self._log.error and not self._log_failure_reported:
            self._log_failure_reported = True
            self._console.print(
                f"WARNING: {self._log.path} cannot be written: {self._log.error}. Training continues; its lines are lost."
            )

    def _print_newest_step(self) -> None:
        if self._unprinted_step:
            self._print_progress(self._unprinted_step)
            self._unprinted_step = ""

    def _print_progress(self, text: str) -> None:
        text = escape_controls(text)
        if self._log is not None:
            self._log.write(text)
        self._console.print_progress(text)
        self._last_line_time = self._clock()

    def _line_is_due(self) -> bool:
        return self._clock() - self._last_line_time >= SECONDS_BETWEEN_LINES


class RemainingTime:
    """Estimates the remaining time from the median of recent steps and the average time between steps.

    The median keeps one slow step from dominating the estimate. Validation and saving happen between steps.
    """

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self._first_end: float | None = None
        self._steps, self._step_seconds, self._elapsed = 0, 0.0, 0.0

    def observe(self, step_seconds: float, now: float) -> None:
        """Add a step that took `step_seconds` and ended at time `now`, in seconds."""
        self._recent.append(step_seconds)
        if self._first_end is None:  # the first step also compiles, so the average begins at its end
            self._first_end = now
            return
        self._steps += 1
        self._step_seconds += step_seconds
        self._elapsed = now - self._first_end

    def seconds(self, steps: int) -> float | None:
        """Return the estimated seconds of `steps` more steps; None before the second observed step."""
        if not self._steps:
            return None
        pause = max(0.0, self._elapsed - self._step_seconds) / self._steps
        return steps * (median(self._recent) + pause)


class TrainingLog:
    """`training_log.txt`: console lines with the time, appended over all attempts and flushed at each line.

    `error` is the reason if the last write failed.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.error = path, ""
        has_lines = path.exists() and path.stat().st_size > 0
        self._file = path.open("ab", buffering=0)
        if has_lines:  # an empty line separates attempts
            self._append("\n")

    def write(self, text: str) -> None:
        """Write the time and the text, further lines indented below the first; on a full disk the lines are lost."""
        now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        self._append(f"{now}  {text.replace(chr(10), chr(10) + ' ' * (len(now) + 2))}\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, text: str) -> None:
        try:
            self._file.write(text.encode())
            self.error = ""
        except OSError as error:
            self.error = error.strerror or str(error)
