"""One event in, and the record, the log and the console have it.

A step is shown live on a terminal; on paper (the log, a plain console) it is worth a line at the first, at the last and
every 30 seconds. What happens between steps is told when it happens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from savant_ray.events import AttemptStarted, Event, Notice, StepDone, ValidationDone
from savant_ray.reporting.console import Console, open_console
from savant_ray.reporting.pace import Pace
from savant_ray.reporting.record import Follower, Record
from savant_ray.reporting.training_log import TrainingLog
from savant_ray.reporting.trend import Trend
from savant_ray.reporting.wording import (
    describe,
    duration,
    printable,
    progress_figures,
    skipped_update,
    step_figures,
    step_label,
    step_panel,
)

LOG = "training_log.txt"
SECONDS_BETWEEN_REMARKS = 30.0


class RunReport:
    """Speaks for one launch; without a run folder on the console only."""

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
        self._pace, self._stage = Pace(), "starting"
        self._trend, self._skipped = Trend(), 0  # of this launch
        self._limit_gb: float | None = None
        self._last_remark = clock()
        self._last_pause = ("the start", clock())
        self._unsaid = ""  # the newest step, when it was not worth a line yet
        self._first_step = True
        self._noticed: set[str] = set()
        self._log_refused = False
        self.last_step = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._say_newest_step()
        if isinstance(error, Exception) and self._log is not None:  # the terminal hears it from the command line
            self._log.write(printable(f"error: {str(error) or type(error).__name__}"))
        self.close()

    def handle(self, event: Event) -> None:
        """Records the event and says what there is to say about it; a notice that several workers give only once."""
        if isinstance(event, Notice):
            if event.text in self._noticed:
                return
            self._noticed.add(event.text)
        if isinstance(event, AttemptStarted):
            self._start(event)
        if self._record is not None:
            self._record.append(event)
            self._say_complaints(self._record)
        if isinstance(event, StepDone):
            self._step(event)
        elif isinstance(event, ValidationDone):
            self._validation(event)
        elif text := describe(event):
            self.say(text)

    def fill(self, lines: Iterable[dict[str, Any]]) -> None:
        """Completes the record of an earlier launch whose driver died."""
        if self._record is not None:
            self._record.fill(lines)

    @property
    def activity(self) -> str:
        """What is being done now, for the message about an unexpected error: "starting Ray", "training"."""
        return self._stage

    def stage(self, text: str) -> None:
        """What begins now, before there are steps: "starting Ray"."""
        self._stage, self._last_remark = text, self._clock()
        self._remark(f"{text} …")
        self._console.show(printable(text), 0, None, "")

    def progress(self, done: float, total: float, unit: str) -> None:
        """How far the stage is; `unit` is "bytes" or a plural."""
        figures = progress_figures(done, total, unit)
        self._console.show(printable(self._stage), done, total, printable(figures))
        if self._due():
            self._remark(f"{self._stage}: {figures}")

    def say(self, text: str) -> None:
        """Lines for the console and the log."""
        text = printable(text)
        if self._log is not None:
            self._log.write(text)
        self._console.say(text)

    def log(self, text: str) -> None:
        """Lines for the log only."""
        if self._log is not None:
            self._log.write(printable(text))

    def close(self) -> None:
        """Gives the terminal back and closes the files."""
        if self._record is not None:
            self._record.close()
            self._say_complaints(self._record)
        self._console.close()
        if self._log is not None:
            self._log.close()

    def _start(self, event: AttemptStarted) -> None:
        """The run stands at `event.step`: what was recorded after it happens again."""
        if self._record is not None:
            self._record.go_back_to(event.step, event.validates_first)
        self._stage = "training"
        self.last_step, self._max_steps, self._limit_gb = event.step, event.max_steps, event.vram_limit_gb
        self._trend, self._skipped = Trend(), 0
        self._pace, self._first_step, self._unsaid = Pace(), True, ""
        self._last_pause = ("the start", self._clock())

    def _step(self, event: StepDone) -> None:
        self.last_step = event.step
        self._pace.observe(event.step_seconds, self._clock())
        label = step_label(event.step, self._max_steps)
        left = self._pace.seconds_left(self._max_steps - event.step)
        figures = step_figures(event, left)
        self._trend.add(event.train_loss)
        self._skipped += event.skipped_micro_batches
        panel = step_panel(event, str(self._trend), self._skipped, self._limit_gb, left)
        self._console.show(label, event.step, self._max_steps, panel)
        self._unsaid = f"{label} · {figures}"
        special = self._first_step or event.step == self._max_steps
        self._first_step = False
        if event.update_skipped:
            self.say(skipped_update(event))
        if self._due() or special:
            self._say_newest_step()

    def _validation(self, event: ValidationDone) -> None:
        mark, then = self._last_pause
        self._last_pause = ("the last", self._clock())
        self.say(f"{describe(event)} · {duration(self._clock() - then)} since {mark}")

    def _say_complaints(self, record: Record) -> None:
        for text in record.complaints():
            self.say(text)
        if self._log is not None and self._log.refusal and not self._log_refused:
            self._log_refused = True
            self._console.say(
                f"WARNING: {self._log.path} cannot be written: {self._log.refusal}. Training goes on; its lines are lost."
            )

    def _say_newest_step(self) -> None:
        if self._unsaid:
            self._remark(self._unsaid)
            self._unsaid, self._last_remark = "", self._clock()

    def _remark(self, text: str) -> None:
        text = printable(text)
        if self._log is not None:
            self._log.write(text)
        self._console.remark(text)

    def _due(self) -> bool:
        now = self._clock()
        if now - self._last_remark < SECONDS_BETWEEN_REMARKS:
            return False
        self._last_remark = now
        return True
