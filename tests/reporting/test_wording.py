"""Text of numbers and events."""

from __future__ import annotations

from pathlib import Path

import pytest

from savant_ray.commands import COMMANDS
from savant_ray.events import Event, MicroBatchSkipped, Notice, Rewound, RunFailed, RunResumed, WorkerHung
from savant_ray.reporting.run_report import RemainingTime
from savant_ray.reporting.wording import (
    describe,
    duration,
    escape_controls,
    next_commands,
    percent,
    progress_figures,
    skipped_update,
    step_figures,
)
from tests.reporting.events import attempt, checkpoint, sample, spike, step_done, validation


@pytest.mark.parametrize(
    ("event", "facts"),
    [
        (
            attempt(500, workers=2, notes=("no compiler: slower",)),
            "1,234,567 parameters|2 workers (cpu)|500 of 1,000 steps|192 sequences|\nnote: no compiler: slower",
        ),
        (RunResumed(step=5, path="/runs/x/step_5"), "resuming from /runs/x/step_5"),
        (RunResumed(step=0, path="/runs/x/step_5", note="weights only"), "/runs/x/step_5|weights only"),
        (validation(500), "step 500|loss 5.1234|2.100 bits per byte|97.1 %|3.2 s"),
        (sample(5), "step 5|1.5 s\n    Question: X?\n    Answer:\n  >  five\n  > plus ten"),
        (sample(5, text=""), "step 5|1.5 s\n    Question: X?\n    Answer:\n  > (nothing)"),
        (checkpoint(5), "step_5|0.4 s"),
        (checkpoint(5, "stop"), "step_5|stop|0.4 s"),
        (
            WorkerHung(
                rank=1,
                after_step=7,
                seconds=61.0,
                activity="computing",
                process="process 12 on host-1, stopped",
                stack="",
                text="worker 1 made no progress for 1 min 1 s",
            ),
            "WARNING|worker 1 made no progress for 1 min",
        ),
        (MicroBatchSkipped(step=7, rank=1, loss="nan", positions=(12, 13)), "step 7|worker 1|loss nan|12, 13"),
        (
            spike(7),
            "step 7|loss 9.5000 is above 6.7500|weights were updated|train.jsonl:1, train.jsonl:2, train.jsonl:3 and 2 more",
        ),
        (
            spike(7, update_skipped=True, grad_norm=3.25),
            "loss 9.5000 is above 6.7500 and gradient norm 3.25 is above 2.5|did not change the weights",
        ),
        (
            Rewound(step=5, spike=spike(7, train_loss=5.0, grad_norm=3.25)),
            "step 7 is a spike: gradient norm 3.25 is above 2.5|back to step 5|positions 1,152 to 1,343|left out|jsonl:1",
        ),
        (Notice(text="read this"), "read this"),
    ],
)
def test_the_text_of_an_event_has_its_important_facts(event: Event, facts: str) -> None:
    text = describe(event)
    assert [fact for fact in facts.split("|") if fact not in text] == []


def test_a_failure_has_no_text_because_the_command_prints_it() -> None:
    assert describe(RunFailed(error="DataError", text="already reported", exit_code=3)) == ""


def test_a_step_without_an_update_has_its_reason() -> None:
    failed = {"update_skipped": True, "grad_norm": float("nan")}
    assert "gradient norm was nan" in skipped_update(step_done(1, **failed))
    assert "all of its tokens are masked" in skipped_update(step_done(1, **failed, tokens=0))
    assert "gradient norm was nan" in skipped_update(step_done(1, **failed, tokens=0, skipped_micro_batches=3))


def test_waiting_and_skipped_micro_batches_are_shown_only_if_there_are_any() -> None:
    healthy = step_figures(step_done(1), 125)
    assert all(fact in healthy for fact in ("6.3915", "2.00e-05", "12,346 tokens/s", "3.2 GiB", "2 min 5 s left"))
    assert "waiting" not in healthy and "skipped" not in healthy
    trouble = step_done(1, data_wait_seconds=0.5, skipped_micro_batches=2, update_skipped=True, grad_norm=float("nan"))
    figures = step_figures(trouble, None)
    assert all(fact in figures for fact in ("25 % waiting for data", "2 micro-batches skipped"))
    assert "left" not in figures, "it is not known"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *[(0, "0.0 s"), (9.94, "9.9 s"), (10, "10 s"), (59.4, "59 s"), (59.6, "1 min"), (125, "2 min 5 s")],
        *[(3600, "1 h"), (12_000, "3 h 20 min"), (200_000, "2 d 7 h"), (float("inf"), "unknown time")],
    ],
)
def test_a_duration_has_at_most_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_percentages_and_progress_are_rounded() -> None:
    assert [percent(fraction) for fraction in (0, 0.012, 0.5, 0.971, 1)] == ["0 %", "1.2 %", "50 %", "97.1 %", "100 %"]
    assert progress_figures(3 << 20, 12 << 20, "bytes") == "25 %, 3.0 of 12.0 MiB"
    assert progress_figures(1000, 2000, "documents") == "50 %, 1,000 of 2,000 documents"
    assert progress_figures(0, 0, "files") == "0 of 0 files"


def test_control_characters_are_escaped_and_other_text_is_unchanged() -> None:
    assert escape_controls("\x1b[2J\r\x07\x9b\u202e\u2028\ud800") == r"\x1b[2J\r\x07\x9b\u202e\u2028\ud800"
    assert escape_controls("Zeile 1\n\tüber → 漢字 🙂 [bold]") == "Zeile 1\n\tüber → 漢字 🙂 [bold]"


@pytest.mark.parametrize("run", ["/elsewhere/my run", "s3://bucket/my run"])
def test_the_commands_to_try_next_name_the_run_and_its_folder(run: str, tmp_path: Path) -> None:
    shown = next_commands(run, tmp_path / "my run", COMMANDS)
    assert f"train --config chat --run.init_from '{run}'" in shown, (
        "the shipped file names the run checkpoints_quickstart"
    )
    assert f"chat '{run}' --conversation" in shown
    assert f"report '{tmp_path}/my run'" in shown, "a report needs the record, which is on this machine"


def test_one_slow_step_does_not_change_the_remaining_time() -> None:
    remaining, now = RemainingTime(), 0.0
    assert remaining.seconds(10) is None
    for seconds in [60.0, *[2.0] * 20, 30.0, *[2.0] * 19]:  # the first compiles, one in the middle stalls
        now += seconds
        remaining.observe(seconds, now)
    assert remaining.seconds(100) == pytest.approx(200)


def test_the_remaining_time_includes_the_average_time_between_steps() -> None:
    remaining, now = RemainingTime(), 0.0
    for step in range(101):
        now += 2.0 + (50.0 if step and step % 50 == 0 else 0.0)
        remaining.observe(2.0, now)
    assert remaining.seconds(100) == pytest.approx(300)
