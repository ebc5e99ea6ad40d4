"""The report shows the contents of the record in one file and escapes text."""

from __future__ import annotations

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from savant_ray.cli import main
from savant_ray.config import Config
from savant_ray.errors import SavantError, SettingsError
from savant_ray.events import AttemptEnded, DataPrepared, Event, Rewound, RunFailed, TextCounts, WorkersLost
from savant_ray.reporting.page import write_page
from savant_ray.reporting.page.charts import Curve, aligned, downsampled, smoothed
from savant_ray.reporting.page.history import Attempt, read_history
from savant_ray.reporting.page.page import timeline
from savant_ray.reporting.record import to_line
from tests.reporting.events import attempt, checkpoint, idle, prepared, sample, spike, step_done, validation, write

FAILED = RunFailed(error="TrainingError", text="it <diverged>", exit_code=1)
DATA = DataPrepared(
    sources=(TextCounts("train.jsonl", documents=1234, tokens=99_000, sequences=99, padding=1000, bad_lines=7),),
    validation=TextCounts("val.jsonl", documents=12, tokens=990, sequences=1, padding=10, bad_lines=0),
)
SETTINGS = Config.from_dict({"training": {"learning_rate": 1e-3}}).to_dict()
RUN: tuple[Event, ...] = (
    DATA,
    attempt(max_steps=20, settings=SETTINGS, versions={"torch": "2.13.0"}),
    *(step_done(step, train_loss=9.0 - step / 10) for step in range(1, 11)),
    validation(5),
    sample(5, text="</script><b>bold</b> \x1b[2J"),
    checkpoint(10),
)


def html_of(*runs: Path, output: Path) -> str:
    write_page(runs, output, idle)
    return output.read_text(encoding="utf-8")


def drawn(html: str) -> list[dict]:
    """Return the charts that the page's script draws."""
    found = re.search(r'<script type="application/json" id="charts-data">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def seen(html: str) -> str:
    """Return the visible text, without tags, scripts and styles."""
    without = re.sub(r"<(script|style).*?</\1>", "", html, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", without)).split())


# --- the page


def test_the_page_lists_spikes_with_what_followed_and_their_documents(tmp_path: Path) -> None:
    spikes = (spike(7), spike(8, update_skipped=True, documents=("<b>.jsonl:1",)), Rewound(step=5, spike=spike(9)))
    html = html_of(write(tmp_path / "run", *RUN, *spikes), output=tmp_path / "report.html")
    text = seen(html)
    for expected in (
        "7 9.5000 6.7500 0.9 2.5 trained on train.jsonl:1, train.jsonl:2, train.jsonl:3 and 2 more",
        "8 9.5000 6.7500 0.9 2.5 update skipped <b>.jsonl:1",
        "9 9.5000 6.7500 0.9 2.5 back to step 5, sequences left out train.jsonl:1",
        "spikes 3",
    ):
        assert expected in text, expected
    quiet = html_of(write(tmp_path / "quiet", *RUN), output=tmp_path / "quiet.html")
    assert 'id="spikes"' not in quiet and "spikes 0" in seen(quiet)


def test_a_spike_that_is_found_again_after_a_restart_counts_once(tmp_path: Path) -> None:
    rewound = Rewound(step=5, spike=spike(9))
    again = Rewound(
        step=5, spike=spike(9, train_loss=11.0)
    )  # in the same step, with the sequences after the first ones
    html = html_of(write(tmp_path / "run", *RUN, rewound, attempt(5), rewound, again), output=tmp_path / "report.html")
    assert "spikes 2" in seen(html)


def test_the_page_shows_the_contents_of_the_record(tmp_path: Path) -> None:
    html = html_of(write(tmp_path / "run", *RUN), output=tmp_path / "report.html")
    text = seen(html)
    for expected in (
        "step 10 of 20", "training loss 8.0000", "validation loss 5.1234", "tokens trained on 1,900,000",
        "train.jsonl 1,234 99,000 – 99 – 1.0 % – 0 0 7", "val.jsonl (validation) 12 990", "torch 2.13.0",
        "training.learning_rate 0.001 2e-05", "1 of", "run interrupted", "Question: X?",
    ):  # fmt: skip
        assert expected in text, expected
    loss, validated = drawn(html)[:2]
    raw, smooth, points = (series["values"] for series in loss["series"])
    assert loss["steps"] == list(range(1, 11))
    assert raw == pytest.approx([9.0 - step / 10 for step in range(1, 11)]) and smooth == raw, "a span of one step"
    assert points == [None] * 4 + [5.1234] + [None] * 5
    assert validated["steps"] == [5] and validated["series"][0]["values"] == [2.1]


def test_markup_and_control_characters_in_answers_are_escaped(tmp_path: Path) -> None:
    html = html_of(write(tmp_path / "</script><i>", *RUN, FAILED), output=tmp_path / "report.html")
    assert "<b>bold" not in html and "<i>&" not in html and "</script><i>" not in html
    assert r"</script><b>bold</b> \x1b[2J" in seen(html) and "it <diverged>" in seen(html)


def test_the_page_loads_no_other_file(tmp_path: Path) -> None:
    html = html_of(write(tmp_path / "run", *RUN), output=tmp_path / "report.html")
    assert re.findall(r"""(?:src|href)=["'](?!data:)""", html) == [] and "@import" not in html and "url(" not in html


def test_several_runs_are_compared_and_runs_of_the_same_name_are_shown_by_folder(tmp_path: Path) -> None:
    other = Config.from_dict({"training": {"learning_rate": 1e-4}}).to_dict()
    one, two = write(tmp_path / "a/run", *RUN), write(tmp_path / "b/run", attempt(settings=other), step_done(1))
    three = write(tmp_path / "three", *RUN[:2])
    html = html_of(one, two, three, output=tmp_path / "report.html")
    text = seen(html)
    assert f"{one} · {two} · three" in text, "names that are the same are distinguished by their folders"
    assert "training.learning_rate 0.001 0.0001 0.001 2e-05" in text
    assert {series["run"] for series in drawn(html)[0]["series"]} == {0, 1}
    assert f"{two} training" in {series["label"] for series in drawn(html)[0]["series"]}


def test_an_output_that_is_a_link_or_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    run, page, link, pipe = write(tmp_path / "run", *RUN), tmp_path / "page", tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(page)
    os.mkfifo(pipe)
    write_page([run], link, idle)
    with ThreadPoolExecutor() as pool:
        read = pool.submit(pipe.read_text)
        write_page([run], pipe, idle)
    assert link.is_symlink() and pipe.is_fifo() and all("</html>" in text for text in (page.read_text(), read.result()))
    with pytest.raises(SavantError, match="Is a directory"):
        write_page([run], Path(), idle)


def test_a_run_of_an_older_version_with_fewer_settings_has_a_page(tmp_path: Path) -> None:
    older = {section: dict(values) for section, values in SETTINGS.items()}
    del older["data"]["end_of_document"], older["scaling"]
    run = write(tmp_path / "run", attempt(settings=older), step_done(1))
    text = seen(html_of(run, output=tmp_path / "page.html"))
    assert "training.learning_rate 0.001" in text and "scaling.num_workers 1 1" in text


@pytest.mark.parametrize(
    "events", [(), RUN[:1], RUN[:2], (*RUN[:2], step_done(1, share_of_peak=None, grad_norm=float("nan")))]
)
def test_a_run_with_few_events_has_a_page(events: tuple[Event, ...], tmp_path: Path) -> None:
    run = write(tmp_path / "run", *events)
    assert "Savant report" in seen(html_of(run, output=tmp_path / "report.html"))


def test_the_command_writes_to_the_run_folder_or_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "one", *RUN), write(tmp_path / "two", *RUN)
    assert main(["report", "one"]) == 0 and (tmp_path / "one/report.html").exists()
    assert main(["report", "one", "two"]) == 0 and (tmp_path / "report.html").exists()
    assert main(["report", "one", "--output", "mine.html"]) == 0 and (tmp_path / "mine.html").exists()
    assert "mine.html is written" in capsys.readouterr().out
    assert main(["report", "none"]) == SettingsError.exit_code and "no run" in capsys.readouterr().err
    assert main(["report", "one", "--output", "missing/mine.html"]) == 1 and "missing" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.glob("*.tmp")) == []


# --- scores


def scored(run: Path, step: int, score: float, final: bool, **templates: float) -> Path:
    """Add the line of a logic score at that step to the record."""
    scores = {name: {"score": score, "n": 50} for name, score in templates.items()}
    line = {
        "event": "score",
        "time": "2026-01-31T17:05:00+00:00",
        "step": step,
        "score": score,
        "n": 100,
        "final": final,
    }
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**line, "low": score - 0.1, "high": score + 0.1, "templates": scores}) + "\n")
    return run


def test_logic_scores_are_a_curve_and_final_scores_are_a_table_with_a_column_per_run(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one", *RUN), write(tmp_path / "two", *RUN)
    three = write(tmp_path / "three", *RUN)
    scored(one, 5, 0.2, False, add=0.9), scored(one, 7, 0.3, True, add=0.1)
    scored(one, 10, 0.42, True, **{"add": 0.5, "compare, <new>": 0.34}), scored(two, 5, 0.6, True, add=0.75)
    scored(three, 5, 0.7, False, add=0.98)
    html = html_of(one, two, three, output=tmp_path / "report.html")
    (chart,) = (chart for chart in drawn(html) if chart["title"] == "Logic score")
    assert chart["steps"] == [5, 7, 10]
    assert [series["values"] for series in chart["series"]] == [[20, 30, 42], [60, None, None], [70, None, None]]
    text = seen(html)
    assert "add 50 % of 50 75 % of 50 – compare, <new> 34 % of 50 – – " in text, "newest final one, a row per template"
    assert "all 42 % of 100 60 % of 100 – 95 % interval of all 32 % – 52 % 50 % – 70 % – at step 10 5 – " in text


def test_without_scores_there_is_no_table_and_without_final_scores_only_the_curve(tmp_path: Path) -> None:
    run = write(tmp_path / "run", *RUN)
    assert "Logic score" not in html_of(run, output=tmp_path / "report.html")
    html = html_of(scored(run, 5, 0.2, False, add=0.9), output=tmp_path / "report.html")
    assert "Logic score" in html and "Logic score" not in seen(html)


# --- long runs


def long_run(folder: Path, steps: int) -> Path:
    """Write the record of a run of `steps` noisy steps with a validation and a sample every 500."""
    write(folder, attempt(max_steps=steps, settings=SETTINGS))
    noise, line = np.random.default_rng(0).normal(size=(steps, 3)), to_line(step_done(1, share_of_peak=0.3))
    with (folder / "metrics.jsonl").open("a") as file:
        for step, (loss, speed, norm) in enumerate(noise.tolist(), 1):
            noisy = {"train_loss": 3 + loss, "tokens_per_second": 9e3 + speed, "grad_norm": 1 + abs(norm)}
            file.write(json.dumps(line | noisy | {"step": step}) + "\n")
            if step % 500 == 0:
                for event in (validation(step), sample(step, text="word " * 300), checkpoint(step)):
                    file.write(json.dumps(to_line(event)) + "\n")
    return folder


def test_the_page_of_80000_steps_is_not_much_larger_than_that_of_8000(tmp_path: Path) -> None:
    short, long = (html_of(long_run(tmp_path / f"{n}", n), output=tmp_path / "report.html") for n in (8000, 80_000))
    assert len(long) < min(1.5e6, 1.5 * len(short))


# --- attempts


def test_an_attempt_has_the_ending_that_the_record_shows(tmp_path: Path) -> None:
    run = write(
        tmp_path / "run",
        *(attempt(), step_done(1), checkpoint(1), AttemptEnded(step=1, finished=False, saved_step=1)),
        *(attempt(1), step_done(2), WorkersLost(text="a node is gone"), WorkersLost(text="died in its start")),
        *(attempt(1), step_done(2), FAILED),
        *(attempt(1), step_done(2)),
        *(attempt(2), step_done(3), AttemptEnded(step=3, finished=True, saved_step=2)),
        *(attempt(2), step_done(3), AttemptEnded(step=3, finished=True, saved_step=3)),
    )
    attempts = read_history(run, idle).attempts
    endings = [attempt_.ending for attempt_ in attempts]
    assert endings == ["stopped", "workers lost", "failed", "killed", "not saved", "finished"]
    assert [(attempt_.first_step, attempt_.last_step) for attempt_ in attempts] == [
        (0, 1),
        (1, 2),
        (1, 2),
        (1, 2),
        (2, 3),
        (2, 3),
    ]
    assert attempts[1].reason == "a node is gone"
    assert attempts[4].reason == "step 3 could not be saved; the same command resumes after step 2"
    assert [step for _, step in attempts[0].checkpoints] == [1]
    assert read_history(run, lambda _: True).attempts[-1].ending == "finished", (
        "the next one has not built the model yet"
    )
    write(run, attempt(3))
    assert read_history(run, lambda _: True).attempts[-1].ending == "running"


times = st.floats(0, 1e6)


@given(st.lists(st.tuples(times, times), min_size=1, max_size=8))
def test_the_timeline_shows_all_attempts_in_order_without_overlap(pairs: list[tuple[float, float]]) -> None:
    moments = sorted(time for pair in pairs for time in pair)
    attempts = [
        Attempt(start, end, 0, 1, checkpoints=[((start + end) / 2, 1)])
        for start, end in zip(moments[::2], moments[1::2], strict=True)
    ]
    bars = timeline(attempts)
    ends = [bar.left + bar.width for bar in bars]
    assert bars[0].left == 0 and ends[-1] == pytest.approx(100)
    assert all(end <= after.left + 1e-9 for end, after in zip(ends, bars[1:], strict=False))
    for bar, end in zip(bars, ends, strict=True):
        assert bar.left - 1e-9 <= bar.checkpoints[0][0] <= end + 1e-9


# --- curves


@given(st.integers(1, 5000), st.integers(0, 2**32 - 1))
def test_downsampling_keeps_minimum_and_maximum_with_few_points(n: int, seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=n)
    kept = downsampled(values, points=200)
    assert len(kept) <= max(200, 1) + 2 and (np.diff(kept) > 0).all() and kept[-1] == n - 1
    assert {values.argmin(), values.argmax()} <= set(kept.tolist())


def test_downsampling_keeps_the_first_steps_for_a_logarithmic_axis() -> None:
    assert set(range(20)) <= set(downsampled(np.arange(80_000.0)).tolist())


def test_the_smooth_curve_is_an_average_of_the_finite_values() -> None:
    values = np.full(500, 3.0)
    values[5::7], values[3] = np.nan, np.inf
    assert smoothed(values) == pytest.approx(3.0)
    noisy = np.random.default_rng(0).normal(size=5000)
    assert np.std(smoothed(noisy)) < 0.2 * np.std(noisy)


def test_curves_of_different_lengths_share_an_axis() -> None:
    one = Curve("one", 0, "raw", np.array([1, 2, 3]), np.array([1.0, np.nan, 3.0]))
    two = Curve("two", 1, "points", np.array([2, 10]), np.array([0.123456789, 5.0]))
    assert aligned([one, two]) == {
        "steps": [1, 2, 3, 10],
        "series": [
            {"label": "one", "run": 0, "style": "raw", "values": [1.0, None, 3.0, None]},
            {"label": "two", "run": 1, "style": "points", "values": [None, 0.12346, None, 5.0]},
        ],
    }


def test_the_page_shows_of_the_text_what_savant_data_shows(tmp_path: Path) -> None:
    write(tmp_path / "run", prepared(), attempt())
    html = html_of(tmp_path / "run", output=tmp_path / "report.html")
    text = seen(html)
    for expected in (
        "train.jsonl 1,234 99,000 33 % 99 80 % of all less than 1 1.0 % 1.0 % 7 3 left out 5 7",
        "train.jsonl: lengths, invalid records, examples 9 to 4,321 tokens in a document",
        "8 to 15 3 16 to 31 1,231",
        "train.jsonl line 17: not JSON: <b> … and 6 more",
    ):
        assert expected in text
    pieces = re.findall(r"<span( class=\"masked\")?>([^<]*)</span>", html)
    assert [(bool(masked), unescape(piece)) for masked, piece in pieces if "text" not in piece and piece.strip()][
        -2:
    ] == [
        (True, "Question: 1 + 1?\nAnswer:"),
        (False, " <2>"),
    ]


@pytest.mark.parametrize(
    "damage",
    [
        {"sources": "x"},
        {"validation": None},
        {"sources": [{"path": "a", "documents": 1}]},
        *({"tokens": value} for value in (None, "x")),
        *({"examples": value} for value in (None, ["x"], [[["a"]]])),
        {"lengths": {"8 to 15": "x"}},
    ],
)
def test_a_damaged_line_about_the_text_is_left_out_of_the_page(tmp_path: Path, damage: dict[str, Any]) -> None:
    write(tmp_path / "run", attempt())
    line = {**to_line(prepared()), "time": "2026-01-01T00:00:00+00:00"}
    source = {**line["sources"][0], **damage}
    damaged = {**line, **damage} if set(damage) <= set(line) else {**line, "sources": [source]}
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write(json.dumps(damaged) + "\n")
    assert "The record does not contain sizes of the text." in html_of(
        tmp_path / "run", output=tmp_path / "report.html"
    )
