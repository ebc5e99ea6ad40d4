"""`savant runs` and `savant status` show the contents of the record."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from savant_ray.cli import main
from savant_ray.errors import SettingsError
from savant_ray.events import AttemptEnded, Event, RunFailed
from savant_ray.reporting.runs import find_runs, status, summarize
from savant_ray.storage.lock import is_in_use, locked
from tests.reporting.events import attempt, checkpoint, idle, sample, step_done, validation, write

TRAINED = (attempt(max_steps=20), *(step_done(step, train_loss=9.0 - step) for step in range(1, 6)), validation(5))
DONE = AttemptEnded(step=20, finished=True, saved_step=20)
NOT_SAVED = AttemptEnded(step=20, finished=True, saved_step=5)
STOPPED = AttemptEnded(step=5, finished=False, saved_step=5)
FAILED = RunFailed(error="TrainingError", text="it diverged", exit_code=1)


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ((), "not started"),
        ((attempt(),), "interrupted"),
        ((*TRAINED, STOPPED), "stopped"),
        ((*TRAINED, STOPPED, attempt(5)), "interrupted"),
        ((*TRAINED, DONE), "finished"),
        ((*TRAINED, NOT_SAVED), "not saved"),
        ((*TRAINED, NOT_SAVED, attempt(5), DONE), "finished"),
        ((*TRAINED, FAILED), "failed"),
        ((*TRAINED, FAILED, attempt(5), DONE), "finished"),
    ],
)
def test_the_state_of_a_run_is_that_of_its_newest_attempt(
    events: tuple[Event, ...], state: str, tmp_path: Path
) -> None:
    run = write(tmp_path / "run", *events)
    assert summarize(run, idle).state == state
    with locked(run):
        assert summarize(run, is_in_use).state == "running"
    assert summarize(run, is_in_use).state == state


def test_status_shows_five_lines_about_a_run(tmp_path: Path) -> None:
    run = write(tmp_path / "run", *TRAINED, checkpoint(5), sample(5, text=" fif\nteen\x1b[2J"))
    first, steps, validated, saved, answered = status(summarize(run, lambda _: True)).splitlines()
    assert first.startswith("run: running, last event ")
    assert all(fact in steps for fact in ("step 5 of 20", "4.0000", "12,346 tokens/s"))
    assert "30 s left" in steps, "15 steps at 2 s"
    assert validated == "validation loss 5.1234 · best 5.1234 at step 5"
    assert saved.startswith("saved step_5, ") and saved.endswith(" ago")
    assert answered == r"answered at step 5: fif teen\x1b[2J"


def test_status_shows_five_lines_about_a_run_without_steps(tmp_path: Path) -> None:
    lines = status(summarize(write(tmp_path / "run", attempt()), idle)).splitlines()
    assert lines[1:] == ["step 0 of 1,000", "no validation yet", "no checkpoint yet", "no sample yet"]


def test_status_and_report_show_a_validation_whose_figures_are_not_finite(tmp_path: Path) -> None:
    nan = {"validation_loss": float("nan"), "bits_per_byte": float("nan")}
    run = write(tmp_path / "run", *TRAINED, validation(10, **nan))
    assert status(summarize(run, idle)).splitlines()[2] == "validation loss not finite · best 5.1234 at step 5"
    first = write(tmp_path / "first", attempt(), validation(10, **nan))
    assert status(summarize(first, idle)).splitlines()[2] == "validation loss not finite"
    without_bytes = write(tmp_path / "without bytes", attempt(), validation(10, bits_per_byte=float("nan")))
    assert main(["report", *map(str, (run, first, without_bytes)), "--output", str(tmp_path / "report.html")]) == 0
    assert (tmp_path / "report.html").read_text().count("<dd>not finite</dd>") == 5


def test_runs_are_found_in_the_working_directory_and_in_the_folder_for_ray_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["runs"]) == 0 and "no runs found" in capsys.readouterr().out
    wanted = [
        write(tmp_path / "here/one", *TRAINED, DONE),
        write(tmp_path / "home/savant_runs/two", *TRAINED),
        write(tmp_path / "home/savant_runs/s3/bucket/three", attempt()),
    ]
    assert find_runs([Path(), Path.home()]) == [wanted[0], wanted[2], wanted[1]]
    assert main(["runs"]) == 0
    printed = capsys.readouterr().out
    assert all(word in " ".join(printed.split()) for word in ("one", "finished", "5 of 20", "interrupted"))
    assert main(["runs", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(run["name"], run["state"], run["step"]) for run in listed] == [
        ("one", "finished", 20), ("three", "interrupted", 0), ("two", "interrupted", 5)
    ]  # fmt: skip


def test_the_json_of_runs_is_valid_if_the_terminal_has_no_unicode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "é", *TRAINED, sample(5, text="😀"))
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stdout)
    assert main(["runs", str(tmp_path), "--json"]) == 0
    (run,) = json.loads(stdout.buffer.getvalue())
    assert (run["name"], run["sample"]) == ("é", "😀")


def test_names_of_runs_are_printed_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "run[a]:cat:", *TRAINED)
    assert main(["runs", "."]) == 0
    assert " run[a]:cat: " in capsys.readouterr().out


def test_a_run_that_cannot_be_read_is_named_and_the_others_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "mine", *TRAINED, DONE)
    (tmp_path / "theirs/metrics.jsonl").mkdir(parents=True)
    assert main(["runs", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "mine" in printed.out and printed.err.startswith("left out: ") and "theirs" in printed.err


def test_a_run_whose_last_step_could_not_be_saved_is_not_called_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write(tmp_path / "run", *TRAINED, checkpoint(5), NOT_SAVED)
    assert main(["runs", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert main(["status", str(run)]) == 0
    for printed in (table, capsys.readouterr().out):
        assert "step 20 could not be saved; the same command resumes after step 5" in printed
        assert "not saved" in printed and "finished" not in printed


def test_a_run_that_resumes_before_the_end_of_its_last_attempt_is_at_the_step_that_it_repeats(tmp_path: Path) -> None:
    run = write(
        tmp_path / "run", attempt(max_steps=20), checkpoint(5), NOT_SAVED, attempt(5, max_steps=20), step_done(6)
    )
    running = summarize(run, lambda _: True)
    assert (running.step, running.seconds_left) == (6, 28.0)


def test_a_folder_without_a_run_is_an_error_that_names_savant_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SettingsError, match="no run"):
        summarize(tmp_path, idle)
    assert main(["status", str(tmp_path)]) == 2
    assert "savant runs" in capsys.readouterr().err
