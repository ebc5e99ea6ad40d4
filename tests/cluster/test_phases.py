"""What a signal does in each phase of an attempt."""

from __future__ import annotations

import os
import signal

import pytest

from savant_ray.driver import phases
from savant_ray.driver.phases import SIGNALS, TRANSITIONS, AttemptPhase, Phase, Trigger
from savant_ray.events import AttemptStarted, CheckpointSaved, Event, WorkersLost, WorkersStarted

STARTED, LOST = WorkersStarted(), WorkersLost(text="worker 1: it died")
TRAINING = AttemptStarted(
    step=0,
    workers=1,
    device="cpu",
    parameters=1,
    max_steps=1,
    effective_batch=1,
    validates_first=False,
    notes=(),
    precision="fp32",
    threads=1,
    vram_limit_gb=None,
    versions={},
    settings={},
)


@pytest.fixture
def phase() -> AttemptPhase:
    """The phase of an attempt that has called `fit()`."""
    phase = AttemptPhase()
    phase.advance(Trigger.FIT_STARTED)
    return phase


@pytest.fixture(autouse=True)
def _own_handlers() -> object:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def observe(phase: AttemptPhase, *events: Event) -> Phase:
    for event in events:
        phase.observe(event)
    return phase.current


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    "events", [(), (STARTED,), (STARTED, LOST), (STARTED, TRAINING, LOST), (STARTED, TRAINING, LOST, STARTED)]
)
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_interrupts_an_attempt_whose_workers_have_nothing_to_save(
    phase: AttemptPhase, events: tuple[Event, ...], number: int
) -> None:
    phase.handle_signals()
    observe(phase, *events)
    with pytest.raises(KeyboardInterrupt):
        send(number)
    assert phase.current is Phase.EXITING


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_during_training_requests_a_stop_and_a_second_one_interrupts(
    phase: AttemptPhase, number: int
) -> None:
    phase.handle_signals()
    assert observe(phase, STARTED, TRAINING) is Phase.TRAINING
    send(number)
    assert phase.current is Phase.STOP_REQUESTED
    assert phase.advance(Trigger.REQUEST_SENT) is Phase.STOPPING
    for notice in (signal.SIGHUP, signal.SIGUSR1):
        send(notice)
        assert phase.current is Phase.STOPPING, "a closing terminal sends SIGHUP twice"
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)
    assert phase.current is Phase.EXITING


def test_two_sigterms_in_a_row_are_one_request_as_timeout_sends_them(
    phase: AttemptPhase, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(phases.time, "monotonic", lambda: now[0])
    phase.handle_signals()
    observe(phase, STARTED, TRAINING)
    for seconds in (0.0, 0.001, 0.9):
        now[0] += seconds
        send(signal.SIGTERM)
        assert phase.current is Phase.STOP_REQUESTED
    now[0] += 1.1
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGTERM)
    send(signal.SIGTERM)  # would end the process


@pytest.mark.parametrize("trigger", [None, Trigger.REQUEST_SENT])
def test_a_stop_ends_early_if_no_workers_are_left_to_save(phase: AttemptPhase, trigger: Trigger | None) -> None:
    observe(phase, STARTED, TRAINING)
    phase.advance(Trigger.SIGNAL)
    if trigger is not None:
        phase.advance(trigger)
    assert observe(phase, LOST) is Phase.EXITING


def test_replaced_workers_return_the_attempt_to_training(phase: AttemptPhase) -> None:
    assert observe(phase, STARTED, TRAINING, STARTED, TRAINING) is Phase.TRAINING, "another number of workers"
    assert observe(phase, LOST) is Phase.WAITING_FOR_WORKERS
    assert observe(phase, STARTED) is Phase.LOADING
    assert observe(phase, TRAINING) is Phase.TRAINING


def test_a_signal_that_arrives_while_the_phase_changes_is_not_lost(
    phase: AttemptPhase, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(dict):
        """Delivers a signal after the next phase was looked up, before it is stored."""

        def get(self, key: object, default: object = None) -> object:
            after = super().get(key, default)
            if key == (Phase.TRAINING, Trigger.WORKERS_LOST):
                phase.current = Phase.STOP_REQUESTED
            return after

    observe(phase, STARTED, TRAINING)
    monkeypatch.setattr("savant_ray.driver.phases.TRANSITIONS", Interrupted(TRANSITIONS))
    assert observe(phase, LOST) is Phase.EXITING


def test_no_trigger_ends_the_exiting_phase() -> None:
    assert {TRANSITIONS.get((Phase.EXITING, trigger), Phase.EXITING) for trigger in Trigger} == {Phase.EXITING}


def test_other_events_change_nothing(phase: AttemptPhase) -> None:
    observe(phase, STARTED, TRAINING)
    assert observe(phase, CheckpointSaved(step=1, path="step_1", reason="periodic", seconds=1.0)) is Phase.TRAINING
