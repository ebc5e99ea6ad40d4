"""A tracker receives each number of the record once over all attempts, and its errors do not affect the run."""

from __future__ import annotations

import io
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from savant_ray.cli import main
from savant_ray.config import Config, ReportingConfig
from savant_ray.errors import SettingsError
from savant_ray.events import AttemptEnded
from savant_ray.reporting import trackers
from savant_ray.reporting.console import PlainConsole
from savant_ray.reporting.record import Record, read_records
from savant_ray.reporting.run_report import RunReport
from savant_ray.reporting.trackers import TrackerFollower, open_trackers, tracking
from savant_ray.reporting.trackers.wandb import Wandb
from tests.reporting.events import attempt, checkpoint, sample, score, step_done, validation

SETTINGS = Config.from_dict({"training": {"learning_rate": 1e-3}}).to_dict()


class Fake:
    """A tracker that keeps lines and fails on request."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.fails_at, self.failed, self.gate = "", threading.Event(), threading.Event()
        self.gate.set()
        self.ends: list[bool] = []

    def open(self, identity: str, settings: dict[str, Any]) -> dict[str, int]:
        assert identity.isalnum() and settings["training.learning_rate"] == 1e-3
        self.gate.wait()
        self._fail("open")
        last_steps: dict[str, int] = {}
        for line in self.lines:
            last_steps[line["event"]] = max(line["step"], last_steps.get(line["event"], -1))
        return last_steps

    def send(self, lines: list[dict[str, Any]]) -> None:
        self._fail("send")
        self.lines += lines

    def close(self, finished: bool) -> None:
        self._fail("close")
        self.ends.append(finished)

    def _fail(self, where: str) -> None:
        if self.fails_at == where:
            self.failed.set()
            raise ConnectionError("no server\nand much more")

    def steps(self, event: str) -> list[int]:
        return [line["step"] for line in self.lines if line["event"] == event]


def launch(folder: Path, first: int, last: int, tracker: Fake | TrackerFollower, finished: bool = False) -> Record:
    """Record an attempt from after `first` to `last`."""
    record = Record(folder, [TrackerFollower("Fake", tracker) if isinstance(tracker, Fake) else tracker])
    record.append(attempt(first, settings=SETTINGS))
    record.rewind(first, repeats_validation=False)
    for step in range(first + 1, last + 1):
        record.append(step_done(step, train_loss=10.0 / step))
        if step % 5 == 0:
            for event in (validation(step), score(step), sample(step), checkpoint(step)):
                record.append(event)
    record.append(AttemptEnded(step=last, finished=finished, saved_step=last))
    return record


def test_a_tracker_gets_each_line_once_over_resumed_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "MAX_LINES", 3)
    fake = Fake()
    for first, last in ((0, 12), (5, 20), (20, 23)):
        record = launch(tmp_path, first, last, fake, finished=last == 23)
        record.close()
        assert record.warnings() == []
    assert fake.steps("step") == list(range(1, 24))
    assert fake.steps("validation") == fake.steps("sample") == fake.steps("checkpoint") == [5, 10, 15, 20]
    assert fake.ends == [False, False, True]


def test_a_tracker_starts_when_the_settings_of_the_attempt_are_recorded(tmp_path: Path) -> None:
    class Reader:
        def begin(self, record: Path) -> None:
            (line,) = read_records(record)
            self.settings = line["settings"]

        def warning(self) -> str:
            return ""

        def close(self) -> None:
            pass

    reader = Reader()
    with RunReport(tmp_path, console=PlainConsole(None), followers=[reader]) as report:
        report.add_event(attempt(settings=SETTINGS))
    assert reader.settings == SETTINGS


def test_restarted_workers_send_no_line_twice(tmp_path: Path) -> None:
    fake = Fake()
    record = launch(tmp_path, 0, 12, fake)
    record.rewind(10, repeats_validation=False)
    for step in (11, 12, 13):
        record.append(step_done(step))
    record.close()
    assert fake.steps("step") == list(range(1, 14))


@pytest.mark.parametrize("where", ["open", "send", "close"])
def test_a_failing_server_is_reported_once_and_gets_missing_lines_in_the_next_attempt(
    where: str, tmp_path: Path
) -> None:
    fake = Fake()
    fake.fails_at = where
    record = launch(tmp_path, 0, 6, fake)
    record.close()
    (warning,) = record.warnings()
    assert "nothing is sent to Fake now: no server. The record" in warning and record.warnings() == []
    fake.fails_at = ""
    launch(tmp_path, 6, 8, fake).close()
    assert fake.steps("step") == list(range(1, 9)) and fake.steps("sample") == [5]


@pytest.mark.parametrize("where", ["open", "send"])
def test_a_server_that_was_gone_for_a_while_gets_every_line_in_the_same_attempt(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.01)
    fake = Fake()
    fake.fails_at = where
    record = launch(tmp_path, 0, 6, fake)
    assert fake.failed.wait(10)
    fake.fails_at = ""
    record.close()
    assert fake.steps("step") == list(range(1, 7)) and fake.ends == [False]


def test_a_finished_run_sends_what_a_tracker_lacks(tmp_path: Path) -> None:
    fake = Fake()
    fake.fails_at = "open"
    launch(tmp_path, 0, 6, fake, finished=True).close()
    fake.fails_at = ""
    for _ in range(2):
        record = Record(tmp_path, [TrackerFollower("Fake", fake)])
        record.start_followers()
        record.close()
    assert fake.steps("step") == list(range(1, 7)) and fake.ends == [True, True]


def test_an_attempt_that_fails_after_a_finished_one_does_not_close_the_run_as_finished(tmp_path: Path) -> None:
    fake = Fake()
    launch(tmp_path, 0, 6, fake, finished=True).close()
    record = Record(tmp_path, [TrackerFollower("Fake", fake)])
    record.append(attempt(6, settings=SETTINGS))  # with a larger training.max_steps
    record.rewind(6, repeats_validation=False)
    record.append(step_done(7))
    record.close()
    assert fake.steps("step") == list(range(1, 8)) and fake.ends == [True, False]


def test_a_server_that_never_answers_does_not_delay_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "CLOSE_TIMEOUT", 0.01)
    fake = Fake()
    fake.gate.clear()
    record = launch(tmp_path, 0, 6, fake)
    record.close()
    assert fake.lines == []
    fake.gate.set()


def test_a_tracker_that_is_not_installed_is_a_settings_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    assert open_trackers(ReportingConfig(), "run") == []
    assert main(["train", "--reporting.wandb", "mine"]) == SettingsError.exit_code
    assert "reporting.wandb: the package wandb is not installed" in capsys.readouterr().err


def test_a_folder_named_like_a_tracker_is_not_mistaken_for_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb/run-1").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(SettingsError, match=f"wandb is not installed .the folder {tmp_path}/wandb is not the package"):
        open_trackers(ReportingConfig(wandb="mine"), "run")


def test_mlflow_has_the_numbers_of_the_record_over_all_attempts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)  # where MLflow keeps artifacts
    monkeypatch.setattr(tracking, "CLOSE_TIMEOUT", 60.0)  # it makes its tables first
    address = f"sqlite:///{tmp_path / 'mlflow.db'}"
    (tmp_path / "run").mkdir()
    for first, last in ((0, 12), (10, 20)):
        (tracker,) = open_trackers(ReportingConfig(mlflow=address), "tiny")
        record = launch(tmp_path / "run", first, last, tracker, finished=last == 20)
        record.close()
        assert record.warnings() == []
    client = MlflowClient(tracking_uri=address)
    (run,) = client.search_runs([client.get_experiment_by_name("savant_ray").experiment_id])
    assert run.info.run_name == "tiny" and run.info.status == "FINISHED"
    assert run.data.params["training.learning_rate"] == "0.001"
    sent = [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, "step/train_loss")]
    assert sent == [(step, 10.0 / step) for step in range(1, 21)]
    validated = client.get_metric_history(run.info.run_id, "validation/validation_loss")
    assert [(each.step, each.value) for each in validated] == [(step, 5.1234) for step in (5, 10, 15, 20)]
    scored = client.get_metric_history(run.info.run_id, "score/score")
    assert [(each.step, each.value) for each in scored] == [(step, 0.375) for step in (5, 10, 15, 20)]
    assert len(client.list_artifacts(run.info.run_id, "samples")) == 4


def test_weights_and_biases_never_asks_in_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def init(**_: Any) -> None:
        assert not sys.stdin.isatty()  # else W&B asks for an API key there and waits
        raise RuntimeError("No API key configured. Use `wandb login` to log in.")

    fake = SimpleNamespace(init=init, Settings=lambda **_: None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(sys, "stdin", Terminal())
    record = launch(tmp_path, 0, 6, TrackerFollower("Weights & Biases", Wandb("mine", "run")))
    record.close()
    (warning,) = record.warnings()
    assert "Weights & Biases now: No API key configured. Use `wandb login` to log in. The" in warning
    assert sys.stdin.isatty()


def test_weights_and_biases_stores_a_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(tracking, "CLOSE_TIMEOUT", 60.0)
    (tmp_path / "run").mkdir()
    (tracker,) = open_trackers(ReportingConfig(wandb="savant"), "tiny")
    record = launch(tmp_path / "run", 0, 12, tracker, finished=True)
    record.close()
    assert record.warnings() == []
    (kept,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert kept.stat().st_size > 1000
