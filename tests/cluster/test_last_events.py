"""What happens after the workers have saved their last step changes neither the exit code nor what the run reports."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from savant_ray.config import Config
from savant_ray.driver import ray_run
from savant_ray.driver.phases import SIGNALS, AttemptPhase, Phase, Trigger
from savant_ray.driver.ray_run import Outcome, _conclude, _follow
from savant_ray.errors import STOPPED_EARLY, DataError
from savant_ray.events import AttemptEnded, Event, RunFailed, WorkersLost, WorkersStarted
from savant_ray.reporting import RunReport
from savant_ray.reporting.console import PlainConsole
from tests.reporting.events import attempt, step_done

STARTED, LOST = WorkersStarted(), WorkersLost(text="worker 1: it died")
FINISHED = AttemptEnded(step=5, finished=True, saved_step=5)
STOPPED = AttemptEnded(step=5, finished=False, saved_step=5)
Moment = list[Event] | Callable[[], Any]  # events that the driver receives, or what happens while it waits for them


@pytest.fixture(autouse=True)
def _own_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def end_of(moments: list[Moment], folder: Path, error: Exception | None = None) -> tuple[int, list[str]]:
    """Return exit code and output of an attempt in which `fit()` returns, or raises `error`, after these moments."""
    paper, coming = io.StringIO(), iter(moments)
    phase, outcome = AttemptPhase(), Outcome(error=error)
    left = [len(moments)]
    outcome.fit = SimpleNamespace(is_alive=lambda: left[0] > 0)  # type: ignore[assignment]

    def next_events(*_: object) -> tuple[list[Event], list[Any]]:
        left[0] -= 1
        moment = next(coming, [])
        if not callable(moment):
            return moment, []
        moment()
        return [], []

    phase.handle_signals()
    phase.advance(Trigger.FIT_STARTED)
    bridge = SimpleNamespace(request_stop=SimpleNamespace(remote=lambda seconds: None))
    with pytest.MonkeyPatch.context() as patch, RunReport(folder, console=PlainConsole(paper)) as report:
        patch.setattr(ray_run, "next_events", next_events)
        patch.setattr(ray_run, "answer_of", lambda call: None)
        patch.setattr(ray_run, "owns_ray", lambda: True)
        storage = SimpleNamespace(folder=folder, location=str(folder), refuse_if_lost=lambda: None)
        run: Any = SimpleNamespace(
            config=Config(),
            phase=phase,
            report=report,
            storage=storage,
            uploader=SimpleNamespace(upload=lambda: None),
            newest_checkpoint=lambda: "step_5",
        )
        _follow(run, outcome, bridge, {})
        code = _conclude(run, outcome)
    return code, paper.getvalue().splitlines()


@pytest.mark.parametrize(
    ("end", "code", "last"), [(FINISHED, 0, "trained; next"), (STOPPED, STOPPED_EARLY, "stopped and")]
)
@pytest.mark.parametrize(
    "later", [[ctrl_c, ctrl_c], [ctrl_c], [[LOST]], [[LOST, STARTED, attempt(5)]], [[STARTED, attempt(5)]]]
)
def test_a_signal_or_a_lost_worker_after_the_last_save_changes_nothing(
    end: AttemptEnded, code: int, last: str, later: list[Moment], tmp_path: Path
) -> None:
    training: list[Moment] = [[STARTED, attempt(0)], [step_done(4), step_done(5)]]
    stop: list[Moment] = [] if end.finished else [ctrl_c]
    # `fit()` would return only after many more calls, which are not waited for.
    result, printed = end_of([*training, *stop, [end], *later, *([[]] * 9)], tmp_path)
    assert result == code and printed[-1].startswith(last), printed
    wrong = ("stopped without saving", "steps since the last checkpoint")
    assert not any(text in line for line in printed for text in wrong), printed
    assert printed[-2].startswith("step 5/"), "the last step is printed before the result"


def test_an_error_of_ray_train_after_the_last_save_does_not_change_the_exit_code(tmp_path: Path) -> None:
    moments: list[Moment] = [[STARTED, attempt(0)], [step_done(5), FINISHED]]
    assert end_of(moments, tmp_path, RuntimeError("while it ended"))[0] == 0
    assert "while it ended" in (tmp_path / "training_log.txt").read_text()


def test_an_error_that_a_worker_reported_ends_the_run_also_if_ray_train_cannot_start_the_workers_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_run, "FIT_RETURN_SECONDS", 0.0)

    def waits_too_long() -> None:
        raise AssertionError

    failed = RunFailed(error="DataError", text="train.jsonl is gone", exit_code=3)
    with pytest.raises(DataError, match="is gone"):
        end_of([[STARTED, attempt(0)], [failed], [], waits_too_long], tmp_path)


def test_workers_that_are_lost_before_they_have_saved_end_a_stop_without_saving(tmp_path: Path) -> None:
    moments: list[Moment] = [[STARTED, attempt(0)], ctrl_c, [LOST], []]
    with pytest.raises(KeyboardInterrupt):
        end_of(moments, tmp_path)


def test_after_the_last_save_a_second_signal_ends_only_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    phase = AttemptPhase()
    phase.advance(Trigger.FIT_STARTED)
    phase.handle_signals()
    for event in (STARTED, attempt(0), FINISHED):
        phase.observe(event)
    assert phase.current is Phase.SAVED
    for number in (signal.SIGHUP, signal.SIGUSR1):
        os.kill(os.getpid(), number)
        assert phase.current is Phase.SAVED
    ctrl_c()
    assert phase.current is Phase.EXITING
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    ctrl_c()
    assert codes == [STOPPED_EARLY]
