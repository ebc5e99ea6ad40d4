"""Output of a run on a live terminal, on a plain console and in the log."""

from __future__ import annotations

import io
import os
import re
import resource
from pathlib import Path

import pytest

from savant_ray.errors import DataError
from savant_ray.events import Notice, Rewound
from savant_ray.reporting import RunReport
from savant_ray.reporting.console import LiveConsole, PlainConsole, open_console
from savant_ray.reporting.record import METRICS, read_records
from savant_ray.reporting.run_report import LOG
from tests.reporting.events import attempt, checkpoint, sample, spike, step_done, validation


class Clock:
    """A clock that the test advances."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def paper() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    return Terminal()


def log_of(folder: Path) -> list[str]:
    """Return the lines of the log without their times."""
    text = (folder / LOG).read_text(encoding="utf-8")
    return [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d  | {27}", "", line) for line in text.splitlines()]


def add_steps(report: RunReport, clock: Clock, steps: range, seconds: float = 2.0) -> None:
    for step in steps:
        clock.now += seconds
        report.add_event(step_done(step, step_seconds=seconds))


def test_a_plain_console_prints_the_first_and_last_step_and_one_every_30_seconds(
    tmp_path: Path, clock: Clock, paper: io.StringIO
) -> None:
    with RunReport(tmp_path, console=PlainConsole(paper), clock=clock) as report:
        report.add_event(attempt(max_steps=100))
        add_steps(report, clock, range(1, 101))
    steps = [int(step) for step in re.findall(r"^step (\d+)/100 · loss 6.3915 ", paper.getvalue(), re.MULTILINE)]
    assert steps == [1, 16, 31, 46, 61, 76, 91, 100]
    assert len(list(read_records(tmp_path / METRICS))) == 101


def test_the_log_has_the_lines_of_the_plain_console(tmp_path: Path, clock: Clock, paper: io.StringIO) -> None:
    with RunReport(tmp_path, console=PlainConsole(paper), clock=clock) as report:
        report.begin_stage("starting Ray")
        report.add_event(attempt(notes=("a note",)))
        add_steps(report, clock, range(1, 40))
        for event in (checkpoint(39), validation(39), sample(39), Notice(text="two\nlines")):
            report.add_event(event)
        report.notify("done")
    assert log_of(tmp_path) == paper.getvalue().splitlines()
    assert "\x1b" not in paper.getvalue() and "\r" not in paper.getvalue()


def test_the_log_is_appended_over_all_attempts(tmp_path: Path) -> None:
    for number in range(2):
        with RunReport(tmp_path, console=PlainConsole(io.StringIO())) as report:
            report.notify(f"attempt {number}")
    assert log_of(tmp_path) == ["attempt 0", "", "attempt 1"]


def test_a_validation_shows_the_time_since_the_last_one_and_prints_no_line_for_its_step(
    tmp_path: Path, clock: Clock, paper: io.StringIO
) -> None:
    with RunReport(tmp_path, console=PlainConsole(paper), clock=clock) as report:
        report.add_event(attempt())
        for step in (1, 2):
            add_steps(report, clock, range(step * 5 - 4, step * 5 + 1), seconds=5.0)
            report.add_event(validation(step * 5))
    lines = paper.getvalue().splitlines()
    first, second = [line for line in lines if line.startswith("validation")]
    assert first.endswith("· 25 s since the start") and second.endswith("· 25 s since the last")
    steps = [line.split(" ·")[0] for line in lines if line.startswith("step")]
    assert steps == ["step 1/1,000", "step 7/1,000", "step 10/1,000"]  # the first, one after 30 s, the last


def test_a_skipped_update_is_printed_immediately(tmp_path: Path, clock: Clock, paper: io.StringIO) -> None:
    with RunReport(tmp_path, console=PlainConsole(paper), clock=clock) as report:
        report.add_event(attempt())
        report.add_event(step_done(1))
        report.add_event(step_done(2, update_skipped=True, grad_norm=float("inf")))
        assert "WARNING: step 2 did not change the weights: its gradient norm was inf" in paper.getvalue()
        assert "step 2/1,000" not in paper.getvalue()


def test_a_skipped_spike_is_printed_once(tmp_path: Path, clock: Clock, paper: io.StringIO) -> None:
    with RunReport(tmp_path, console=PlainConsole(paper), clock=clock) as report:
        report.add_event(attempt())
        report.add_event(spike(2, update_skipped=True))
        report.add_event(step_done(2, update_skipped=True))
    assert paper.getvalue().count("did not change the weights") == 1


def test_a_rewind_removes_the_steps_that_are_repeated_and_keeps_the_spike(
    tmp_path: Path, clock: Clock, paper: io.StringIO
) -> None:
    with RunReport(tmp_path, console=PlainConsole(paper), clock=clock) as report:
        report.add_event(attempt())
        add_steps(report, clock, range(1, 9))
        report.add_event(Rewound(step=5, spike=spike(9)))
        add_steps(report, clock, range(6, 8))
    lines = list(read_records(tmp_path / METRICS))
    kinds = [(line["event"], line["step"]) for line in lines]
    steps = [("step", step) for step in range(1, 8)]
    assert kinds == [("attempt", 0), *steps[:5], ("rewind", 5), *steps[5:]]
    assert lines[6]["spike"]["step"] == 9 and len(lines[6]["spike"]["documents"]) == 5
    assert "back to step 5" in paper.getvalue()
    with RunReport(tmp_path, console=PlainConsole(paper), clock=clock) as report:
        report.add_event(attempt(5))
    kinds = [(line["event"], line["step"]) for line in read_records(tmp_path / METRICS)]
    assert kinds == [("attempt", 0), *steps[:5], ("rewind", 5), ("attempt", 5)]


def test_the_newest_step_is_printed_when_a_run_is_stopped(tmp_path: Path, clock: Clock, paper: io.StringIO) -> None:
    with RunReport(tmp_path, console=PlainConsole(paper), clock=clock) as report:
        report.add_event(attempt())
        add_steps(report, clock, range(1, 4))
    assert "step 3/1,000" in paper.getvalue()


def test_preparation_prints_its_progress(tmp_path: Path, clock: Clock, paper: io.StringIO) -> None:
    with RunReport(tmp_path, console=PlainConsole(paper), clock=clock) as report:
        report.begin_stage("preparing data")
        for done in range(101):
            clock.now += 1
            report.progress(done, 100, "files")
    assert paper.getvalue().splitlines() == [
        "preparing data …",
        "preparing data: 29 %, 29 of 100 files",
        "preparing data: 59 %, 59 of 100 files",
        "preparing data: 89 %, 89 of 100 files",
    ]


def test_lost_steps_are_removed_from_the_record_when_workers_resume_from_a_checkpoint(tmp_path: Path) -> None:
    with RunReport(tmp_path, console=PlainConsole(io.StringIO())) as report:
        for event in (attempt(0), *map(step_done, (1, 2, 3)), attempt(1), *map(step_done, (2, 3, 4))):
            report.add_event(event)
    steps = [line["step"] for line in read_records(tmp_path / METRICS) if line["event"] == "step"]
    assert steps == [1, 2, 3, 4]


def test_an_error_that_ends_a_run_is_in_the_log_and_the_report_does_not_print_it(
    tmp_path: Path, paper: io.StringIO
) -> None:
    with pytest.raises(DataError), RunReport(tmp_path, console=PlainConsole(paper)):
        raise DataError("train.jsonl: no such file")
    assert log_of(tmp_path) == ["error: train.jsonl: no such file"]
    assert paper.getvalue() == ""


def test_an_error_without_a_message_is_named_in_the_log(tmp_path: Path, paper: io.StringIO) -> None:
    with pytest.raises(MemoryError), RunReport(tmp_path, console=PlainConsole(paper)):
        raise MemoryError
    assert log_of(tmp_path) == ["error: MemoryError"]


def test_without_a_run_folder_only_the_console_gets_output(paper: io.StringIO) -> None:
    with RunReport(None, console=PlainConsole(paper)) as report:
        report.begin_stage("preparing data")
        report.add_event(Notice(text="two bad lines"))
    assert paper.getvalue() == "preparing data …\ntwo bad lines\n"


def test_a_terminal_shows_a_live_display_with_events_above_it(tmp_path: Path, clock: Clock, terminal: Terminal) -> None:
    with RunReport(tmp_path, console=open_console(terminal), clock=clock) as report:
        report.begin_stage("starting Ray")
        report.add_event(attempt(max_steps=10))
        add_steps(report, clock, range(1, 6))
        report.add_event(validation(5))
        report.add_event(sample(5, "[bold]five[/bold] \x1b[2Jten"))
    shown = terminal.getvalue()
    assert "starting Ray" in shown and "step 5/10" in shown and "10 s left" in shown
    assert "validation at step 5: loss 5.1234" in shown
    assert r"[bold]five[/bold] \x1b[2Jten" in shown and "\x1b[2J" not in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # the cursor comes back


def test_a_long_command_is_not_broken_into_lines(terminal: Terminal) -> None:
    command = f"next: python jobs/generate.py --checkpoint {'x' * 200}"
    open_console(terminal).print(command)
    assert command in terminal.getvalue()


def test_a_console_is_live_only_on_a_terminal_that_can_move_its_cursor(
    terminal: Terminal, paper: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(open_console(terminal), LiveConsole)
    assert isinstance(open_console(paper), PlainConsole)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(open_console(terminal), PlainConsole)


def test_a_closed_pipe_does_not_end_the_training(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    stream = os.fdopen(write, "w")
    with RunReport(tmp_path, console=PlainConsole(stream)) as report:
        report.notify("one")
        report.notify("two")
    assert log_of(tmp_path) == ["one", "two"]
    with pytest.raises(BrokenPipeError):
        stream.close()


def test_a_notice_from_several_workers_is_printed_and_recorded_once(tmp_path: Path, paper: io.StringIO) -> None:
    with RunReport(tmp_path, console=PlainConsole(paper)) as report:
        for text in ("a node goes", "a node goes", "step 3 given up"):
            report.add_event(Notice(text=text))
    assert paper.getvalue() == "a node goes\nstep 3 given up\n"
    assert [line["text"] for line in read_records(tmp_path / METRICS)] == ["a node goes", "step 3 given up"]


def test_a_live_display_shows_sparkline_memory_limit_and_skipped_micro_batches(
    tmp_path: Path, clock: Clock, terminal: Terminal
) -> None:
    console = open_console(terminal)
    with RunReport(tmp_path, console=console, clock=clock) as report:
        report.add_event(attempt(max_steps=100, vram_limit_gb=10.0))
        report.add_event(step_done(1, train_loss=6.0, skipped_micro_batches=2))
        report.add_event(step_done(2, train_loss=5.0, share_of_peak=0.543))
        console.print("drawn")  # above the live part, which is drawn anew with it
    shown = terminal.getvalue()
    assert "loss 5.0000 █▁ · rate 2.00e-05 · gradient norm 0.91" in shown
    assert "54 % of peak · 3.2 of 10 GiB · 2 skipped" in shown


def test_a_full_disk_is_reported_once_per_file_and_the_record_is_complete_when_there_is_room_again(
    tmp_path: Path, paper: io.StringIO
) -> None:
    with RunReport(tmp_path, console=PlainConsole(paper)) as report:
        report.add_event(attempt())
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / METRICS).stat().st_size + 10, hard))
        try:
            for step in range(1, 5):
                report.add_event(step_done(step))
                report.add_event(checkpoint(step))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        report.add_event(step_done(5))
    warnings = [line for line in paper.getvalue().splitlines() if line.startswith("WARNING")]
    assert sum(f"{tmp_path / METRICS} cannot be written: " in warning for warning in warnings) == 1
    assert len(set(warnings)) == len(warnings)
    assert [line["step"] for line in read_records(tmp_path / METRICS) if line["event"] == "step"] == [1, 2, 3, 4, 5]
    assert "saved step_4" in paper.getvalue()


def test_a_log_that_cannot_be_written_is_reported_on_the_console(tmp_path: Path, paper: io.StringIO) -> None:
    (tmp_path / LOG).symlink_to("/dev/full")
    with RunReport(tmp_path, console=PlainConsole(paper)) as report:
        report.add_event(checkpoint(1))
        report.add_event(checkpoint(2))
    assert paper.getvalue().count(f"WARNING: {tmp_path / LOG} cannot be written: No space left on device") == 1
    assert "saved step_2" in paper.getvalue()


def test_a_run_without_stdout_or_with_a_closed_one_prints_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = io.StringIO()
    closed.close()
    for stdout in (None, closed):
        monkeypatch.setattr("sys.stdout", stdout)
        with RunReport(tmp_path) as report:
            report.notify("hello")
    assert log_of(tmp_path).count("hello") == 2
