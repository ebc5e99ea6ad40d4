"""`savant sweep`: the search space, trials as runs, an interruption, and the results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import savant_ray
from savant_ray.cli import main
from savant_ray.config import Config
from savant_ray.errors import STOPPED_EARLY
from savant_ray.reporting.record import METRICS
from savant_ray.settings.yaml_text import load_yaml
from savant_ray.sweep import search
from savant_ray.sweep.search_space import read_space
from savant_ray.sweep.trial import Trial
from savant_ray.training.checkpoint import newest_checkpoint
from tests.cluster.conftest import ROOT, environment, options, records, start_program, wait_for, with_text


@pytest.mark.parametrize(
    ("space", "error"),
    [
        ("", "has no settings; such as training.learning_rate"),
        (
            "training.learning_rat: {uniform: [0, 1]}",
            "learning_rat: no such setting; did you mean training.learning_rate?",
        ),
        ("training.learning_rate: 0.1", "needs one distribution, such as"),
        ("training.learning_rate: {logunifrom: [0.1, 1]}", "no such distribution; did you mean loguniform?"),
        ("training.learning_rate: {loguniform: [0, 1]}", "training.learning_rate: loguniform: "),
        ("training.learning_rate: {uniform: [1, 2, 3]}", "training.learning_rate: uniform: "),
        ("training.learning_rate: {quniform: [0, 1, 0]}", "training.learning_rate: quniform: "),
        ("training.learning_rate: {randn: [0, -1]}", "training.learning_rate: randn: "),
        ("training.batch_size: {randint: [3, 3]}", "training.batch_size: randint: "),
        ("run.name: {choice: [a, b]}", "run.name: the sweep names the runs"),
        ("training.optimizer: {choice: adamw}", "choice needs a list"),
        ("a: [", "--space space.yaml: line 1"),
        (
            "model.n_loops: {choice: [2]}\ntraining.optimizer: {choice: [adamw, muno]}",
            "--space space.yaml: line 2: training.optimizer: expected adamw or muon, found muno",
        ),
        (
            "training.learning_rate: {grid_search: [0.1, -1]}",
            "line 1: training.learning_rate: -1 has to be greater than 0",
        ),
        ("training.learning_rate: {uniform: [0, 1]}", "line 1: training.learning_rate: 0.0 has to be greater than 0"),
        ("training.learning_rate: {quniform: [0, 1, 0.5]}", "training.learning_rate: 0.0 has to be greater than 0"),
        ("training.learning_rate: {randn: [-1, 0.1]}", "training.learning_rate: -1.0 has to be greater than 0"),
        ("training.batch_size: {randint: [0, 9]}", "training.batch_size: 0 has to be at least 1"),
        ("training.batch_size: {choice: [8, 16.5, sixteen]}", "expected a whole number, found 16.5"),
        ("training.batch_size: {uniform: [8, 16]}", "training.batch_size: expected a whole number, found 8.0; write 8"),
        (
            "model.dim: {choice: [96, 100]}",
            "model.n_heads: 16 does not divide model.dim = 100 (--space space.yaml: line 1",
        ),
        (
            "model.dim: {choice: [96, 128]}\n\n# heads\nmodel.n_heads: {choice: [4, 3]}",
            "--space space.yaml: line 4: model.n_heads: 3 does not divide model.dim = 128",
        ),
        ("model.dim: {qrandint: [64, 128, 8]}", "model.n_heads: 16 does not divide model.dim = 72"),
        ("validation.temperature: {choice: [.nan]}", "validation.temperature: expected a finite number, found .nan"),
        ("data.sources: {choice: [[{path: a.jsonl}]]}", "line 1: data.sources[0].weight: is missing"),
    ],
)
def test_a_search_space_that_is_not_valid_is_refused_before_ray_is_started(
    space: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("space.yaml").write_text(space)
    assert main(["sweep", "--space", "space.yaml", "--run.name", "search"]) == 2
    assert error in capsys.readouterr().err
    assert not Path("search").exists()


@pytest.mark.parametrize(
    "space",
    [
        "training.learning_rate: {quniform: [0.5, 1, 0.5]}\ntraining.weight_decay: {uniform: [0, 1]}",
        "training.batch_size: {qlograndint: [1, 16, 4]}",
        "model.dim: {randint: [2_000_000, 9_000_000]}\nmodel.n_heads: {choice: [1]}",
        "model.n_heads: {grid_search: [12]}\nmodel.dim: {grid_search: [96]}",
        "training.learning_rate: {qrandn: [3, 0.1, 0.1]}\nmodel.positions: {choice: [none, rotary]}",
        '{\n\t"validation.prompt": {"choice": ["A", "B"]}\n}',
    ],
)
def test_a_search_space_may_have_all_values_that_are_allowed_together(space: str, tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(space)
    assert list(read_space(tmp_path / "space.yaml", Config())) == list(load_yaml(space))


def start_sweep(folder: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "savant_ray.cli", "sweep", "--space", "space.yaml", "--trials", "1", *flags]
    settings = options(run__name="search", training__max_steps=60, training__accumulation=16, checkpoint__keep=2)
    variables = environment(RAY_AUTH_MODE="disabled", PYTHONPATH=str(ROOT))
    return start_program([*command, *settings], folder, variables)


def test_a_trial_reports_its_last_validation_when_its_run_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_questions_answered = threading.Event()

    def train(settings: dict[str, Any], stop_requested: Any) -> savant_ray.Result:
        run = Path(settings["run"]["storage_path"], settings["run"]["name"])
        run.mkdir()
        event = {"event": "validation", "time": "2026-11-25T03:19:47.281+00:00"}
        lines = [event | {"step": step, "validation_loss": loss} for step, loss in ((5, 2.0), (10, 1.0))]
        (run / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
        all_questions_answered.wait(60)
        return savant_ray.Result(str(run), None, 10, True, {})

    monkeypatch.setattr(savant_ray, "train", train)
    trial = Trial({"run.storage_path": str(tmp_path), "training.max_steps": 10})
    assert trial.step() == {"done": False}, "ASHA would stop a trial that has reached the last step"
    all_questions_answered.set()
    assert trial.step() == {"step": 10, "validation_loss": 1.0, "done": True}


def test_a_sweep_is_resumed_only_with_the_options_that_it_was_started_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # no Ray is there, so each sweep ends before its first trial
    Path("space.yaml").write_text("training.learning_rate: {uniform: [0.001, 0.01]}")

    def sweep(*arguments: str) -> str:
        assert main(["sweep", "--space", "space.yaml", "--run.name", "search", *arguments]) != 0
        return capsys.readouterr().err

    refusal = "search: this sweep was started with --trials 8 --concurrent 1, now "
    assert refusal not in sweep()
    assert refusal not in sweep("--trials", "8")
    for changed in (("--trials", "9"), ("--concurrent", "2"), ("--no-early-stopping",)):
        message = sweep(*changed)
        assert refusal in message and " ".join(changed) in message.partition("now ")[2]
    assert "other settings" in sweep("--trials", "9", "--training.max_steps", "5")

    description = Path("search/sweep.yaml")  # as older versions wrote it: without the options
    description.write_text(description.read_text().partition("\n")[2])
    assert "this sweep" not in sweep("--trials", "9")
    assert "other settings" in sweep("--training.max_steps", "5")


def test_a_sweep_does_not_write_into_the_folder_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "space.yaml").write_text("training.learning_rate: {uniform: [0.001, 0.01]}")
    (tmp_path / "done").mkdir()
    (tmp_path / "done/metrics.jsonl").write_text("")
    options = ["--run.storage_path", str(tmp_path), "--run.name", "done"]
    assert main(["sweep", "--space", str(tmp_path / "space.yaml"), *options]) == 2
    assert "done: is the folder of a run; choose another run.name" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "done").iterdir()] == ["metrics.jsonl"]


def test_a_trial_that_was_stopped_before_its_run_began_or_was_validated_has_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def result(trial: str, error: Exception | None = None) -> Any:
        return SimpleNamespace(config={"training.learning_rate": 0.5}, metrics={"trial_id": trial}, error=error)

    class Stopped(list[Any]):
        num_errors = 1

    class Tuner:
        can_restore = staticmethod(lambda _: False)

        def __init__(self, *_: Any, **__: Any) -> None:
            return

        def fit(self) -> Stopped:
            run = tmp_path / "search/trial_00000"
            run.mkdir()
            event = {"event": "attempt", "time": "2026-11-25T03:19:47.281+00:00", "max_steps": 9}
            (run / METRICS).write_text(json.dumps(event) + "\n")
            return Stopped([result("x_00000"), result("x_00001"), result("x_00002", ValueError())])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(search, "ray_session", lambda *_: nullcontext())
    monkeypatch.setattr(search.tune, "Tuner", Tuner)
    monkeypatch.setattr(search.signal, "signal", lambda *_: None)
    Path("space.yaml").write_text("training.learning_rate: {uniform: [0.1, 0.9]}")
    assert main(["sweep", "--space", "space.yaml", "--run.name", "search"]) == STOPPED_EARLY
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if " 0.5 " in line]
    assert rows == [
        ["trial_00000", "0.5", "interrupted", "0", "–"],
        ["–", "0.5", "not", "started", "0", "–"],
        ["–", "0.5", "failed", "0", "–"],
    ]


@pytest.mark.parametrize("number", search.STOP_SIGNALS)
def test_a_signal_stops_a_sweep_once_and_sighup_under_nohup_does_not(number: int) -> None:
    before = {number: signal.getsignal(number) for number in search.STOP_SIGNALS}
    try:
        for default in search.STOP_SIGNALS:
            signal.signal(default, signal.SIG_DFL)
        search.stop_trials_at_signals()
        with pytest.raises(KeyboardInterrupt):  # raised by Python's handler, for which Tune has its own
            os.kill(os.getpid(), number)
        for again in search.STOP_SIGNALS:
            os.kill(os.getpid(), again)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        search.stop_trials_at_signals()
        os.kill(os.getpid(), signal.SIGHUP)
    finally:
        for changed, handler in before.items():
            signal.signal(changed, handler)


def test_a_trial_with_more_steps_than_the_settings_have_is_not_stopped_for_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedulers = list[Any]()

    class Tuner:
        can_restore = staticmethod(lambda _: False)

        def __init__(self, *_: Any, tune_config: Any, **__: Any) -> None:
            schedulers.append(tune_config.scheduler)

        def fit(self) -> list[Any]:
            return []

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(search, "ray_session", lambda *_: nullcontext())
    monkeypatch.setattr(search.tune, "Tuner", Tuner)
    monkeypatch.setattr(search.signal, "signal", lambda *_: None)
    Path("space.yaml").write_text("training.max_steps: {choice: [500, 4000]}")
    main(["sweep", "--space", "space.yaml", "--run.name", "search", "--training.max_steps", "1000"])
    (scheduler,), trial = schedulers, SimpleNamespace(trial_id="x_00000")
    scheduler.set_search_properties("validation_loss", "min")
    scheduler.on_trial_add(None, trial)
    results = [{"step": step, "validation_loss": 2.0} for step in (500, 1000, 1500, 4000)]
    assert {scheduler.on_trial_result(None, trial, result) for result in results} == {"CONTINUE"}


def test_the_whole_reason_of_a_failed_trial_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    errors = tmp_path / "error.txt"
    traceback = 'ray::Trial.train() (pid=5)\n  File "trial.py", line 1\nsavant_ray.errors.TrainingError: '
    errors.write_text(
        f"Failure # 1 (occurred at noon)\n{traceback}an older reason\n"
        f"Failure # 2 (occurred at one)\n{traceback}Ray failed: its raylet was killed.\nRun the same command again.\n"
    )
    search._Progress().on_trial_error(0, [], SimpleNamespace(trial_id="x_00003", error_file=str(errors)))
    printed = capsys.readouterr().out
    assert printed == "trial_00003 fails: Ray failed: its raylet was killed.\nRun the same command again.\n"


@pytest.mark.rare
@pytest.mark.slow
def test_an_interrupted_sweep_resumes_its_runs_and_compares_them(tmp_path: Path) -> None:
    with_text(tmp_path)
    (tmp_path / "space.yaml").write_text(
        "training.learning_rate: {grid_search: [0.03, 0.000001]}\nmodel.n_loops: {choice: [2]}\n"
    )
    first, second = tmp_path / "search/trial_00000", tmp_path / "search/trial_00001"
    job = start_sweep(tmp_path)
    wait_for(lambda: newest_checkpoint(first) is not None)
    os.kill(job.pid, signal.SIGINT)
    printed, _ = job.communicate(timeout=600)
    assert job.returncode == STOPPED_EARLY and "the same command resumes" in printed, printed
    assert "Configuration for experiment" not in printed, "Tune's own output"

    job = start_sweep(tmp_path)
    printed, _ = job.communicate(timeout=600)
    assert job.returncode == 0, printed
    assert len(records(first, "attempt")) == 2 and records(first, "end")[-1]["step"] == 60
    assert newest_checkpoint(second) is not None, "a trial that is stopped early keeps its checkpoint"
    rows = [
        line.split()[0] for line in printed.splitlines() if line.strip().startswith("trial_") and "loss" not in line
    ]
    assert rows[-2:] == ["trial_00000", "trial_00001"], "the best run is first"
    assert "\nsearch/report.html compares the best runs" in printed
    assert "trial_00001" in (tmp_path / "search/report.html").read_text()

    (tmp_path / "space.yaml").write_text("training.learning_rate: {grid_search: [0.03]}\n")
    job = start_sweep(tmp_path)
    printed, _ = job.communicate(timeout=600)
    assert job.returncode == 2 and "choose another run.name" in printed
