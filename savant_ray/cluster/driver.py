"""One launch of a run: check, prepare, start Ray Train, watch, and end with an exit code.

`TorchTrainer.fit()` runs in a side thread, because in the main thread it would take Ctrl+C as an order to abort.
The main thread owns signals and console: it moves events from the bridge to the run's report, and wishes down.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from savant_ray.cluster.lock import locked, move_run_aside
from savant_ray.cluster.paths import in_ray_job, output_folder, run_folder, with_absolute_paths
from savant_ray.cluster.session import grace_seconds, prepare_environment, ray_session
from savant_ray.cluster.signals import StopSignals
from savant_ray.config import Config
from savant_ray.errors import STOPPED_EARLY, CheckpointError, SavantError, TrainingError
from savant_ray.events import AttemptEnded, AttemptStarted, Event, RunFailed, WorkersLost
from savant_ray.reporting import RunReport

POLL_SECONDS = 0.5


def train(config: Config, fresh: bool = False, allow_changes: bool = False) -> int:
    """Trains the run to its end or until it is stopped; returns the exit code.

    `fresh` moves an older run of that name aside first; `allow_changes` goes on with other settings or data than the
    run's checkpoint was trained with.

    Raises:
        SavantError: with its own exit code; the message is for the user.
    """
    prepare_environment()
    signals = StopSignals()
    signals.install()
    config = with_absolute_paths(config, Path.cwd(), output_folder())
    moved = move_run_aside(run_folder(config)) if fresh else None
    with locked(run_folder(config)), RunReport(run_folder(config), config.training.max_steps) as report:
        if moved is not None:
            report.say(f"starting anew; the run that was here is now {moved}")
        if in_ray_job():
            report.say(f"this is a Ray job: the run is kept in {run_folder(config)}")
        try:
            return _train(config, allow_changes, report, signals)
        except KeyboardInterrupt:
            report.say(f"stopped at once; the run goes on from {_last_checkpoint(config)} when it is started again")
            return STOPPED_EARLY


def _train(config: Config, allow_changes: bool, report: RunReport, signals: StopSignals) -> int:
    from savant_ray.cluster.checks import check_before_start, is_finished
    from savant_ray.cluster.preparation import find_text, prepare_data
    from savant_ray.cluster.starting_point import (
        changes_since,
        find_start,
        records_of,
        refuse_other_data,
        refuse_other_settings,
    )

    start = find_start(run_folder(config), report.say)
    report.fill(records_of(run_folder(config)))
    if start is not None and (finished := is_finished(config, start)):
        report.say(finished)
        return 0
    if start is not None and not allow_changes:
        refuse_other_settings(start, config)
    if start is not None:
        _tell_changes(start.name, changes_since(start, config), report)
    check_before_start(config)
    text = find_text(config, report)
    report.stage("starting Ray")
    from savant_ray.cluster.failures import ray_errors_explained

    with ray_session(), ray_errors_explained():
        signals.install()
        data = prepare_data(config, text, report)
        if start is not None and not allow_changes:
            refuse_other_data(start, config, data.tokenizer, data.fingerprint)
        report.stage("starting workers")
        outcome = _fit(config, data, allow_changes, report, signals)
    return _conclude(config, outcome, report)


def _tell_changes(start: str, changes: dict[str, str], report: RunReport) -> None:
    """Where files lie may change; what is in them is compared elsewhere."""
    told = [text for name, text in changes.items() if not name.startswith(("run.", "data."))]
    if told:
        report.say(f"changed since {start}: {'; '.join(told)}")
    if "training.max_steps" in changes:
        report.say("the learning rate follows the schedule of the new length from here on")


@dataclass
class Outcome:
    """How `fit()` ended."""

    error: BaseException | None = None
    failure: RunFailed | None = None  # what a worker said before it gave up
    end: AttemptEnded | None = None  # what they said when they were through
    done: threading.Event = field(default_factory=threading.Event)


def _fit(config: Config, data: Any, allow_changes: bool, report: RunReport, signals: StopSignals) -> Outcome:
    import ray

    from savant_ray.cluster.bridge import start_bridge
    from savant_ray.cluster.starting_point import records_of
    from savant_ray.cluster.trainer import make_trainer, needs
    from savant_ray.cluster.waiting import WorkerWatch

    bridge = start_bridge()
    trainer = make_trainer(config, data, bridge, allow_changes)
    watch = WorkerWatch(config.scaling.worker_limits[0], needs(trainer.scaling_config), report.say)
    outcome = Outcome()
    threading.Thread(target=_run_fit, args=(trainer, outcome), name="fit", daemon=True).start()
    told = False
    while True:
        finished = outcome.done.is_set()  # asked before the events, so that the last ones are not missed
        for event in ray.get(bridge.take_events.remote(0 if finished else POLL_SECONDS)):
            _note(event, outcome, signals)
            watch.note(event)
            if isinstance(event, AttemptStarted):
                report.fill(records_of(run_folder(config)))
            report.handle(event)
        if finished:
            return outcome
        watch.remark()
        if signals.received and not signals.patient:  # the workers were lost meanwhile, so that nobody is left to save
            raise KeyboardInterrupt
        if signals.received and not told:
            told = True
            ray.get(bridge.request_stop.remote(grace_seconds(config)))
            report.say("stopping: this step is finished and saved first (once more to leave at once)")


def _note(event: Event, outcome: Outcome, signals: StopSignals) -> None:
    match event:
        case AttemptStarted():  # without workers there is nothing to save, so a signal ends the launch at once
            signals.patient = True
        case WorkersLost():
            signals.patient = False
        case AttemptEnded():
            outcome.end = event
        case RunFailed():
            outcome.failure = event


def _run_fit(trainer: Any, outcome: Outcome) -> None:
    try:
        trainer.fit()
    except BaseException as error:  # handed to the main thread
        outcome.error = error
    finally:
        outcome.done.set()


def _conclude(config: Config, outcome: Outcome, report: RunReport) -> int:
    if outcome.failure is not None or outcome.error is not None:
        raise _failure(config, outcome, report) from outcome.error
    if outcome.end is None:
        raise TrainingError("training ended without a word from its workers; run the same command again to go on")
    if outcome.end.saved_step < outcome.end.step:
        raise CheckpointError(
            f"step {outcome.end.step:,} could not be saved (see above); the run goes on from {_last_checkpoint(config)} "
            "when it is started again"
        )
    if not outcome.end.finished:
        saved = f"stopped and saved as {_last_checkpoint(config)}" if outcome.end.step else "stopped before the first step"
        report.say(f"{saved}; to go on, run the same command again")
        return STOPPED_EARLY
    report.say(f'trained; next: python jobs/generate.py --checkpoint {run_folder(config)} --prompt "…"')
    return 0


def _failure(config: Config, outcome: Outcome, report: RunReport) -> SavantError:
    from savant_ray.cluster.failures import explain_failure

    if outcome.failure is None:
        report.log(str(outcome.error))
    return explain_failure(outcome.error, outcome.failure, _last_checkpoint(config), config.scaling.max_failures)


def _last_checkpoint(config: Config) -> str:
    from savant_ray.training.checkpoint import newest_checkpoint

    newest = newest_checkpoint(run_folder(config))
    return newest.name if newest is not None else "the beginning (no checkpoint yet)"
