"""One launch of a run: check, prepare, start Ray Train, watch, and end with an exit code.

`TorchTrainer.fit()` runs in a side thread, because in the main thread it would take Ctrl+C as an order to abort.
The main thread owns signals and console: it moves events from the bridge to the run's report, and wishes down.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from savant_ray.cluster.lock import locked
from savant_ray.cluster.paths import in_ray_job, output_folder, run_folder, with_absolute_paths
from savant_ray.cluster.session import prepare_environment, ray_session
from savant_ray.cluster.signals import StopSignals
from savant_ray.config import Config
from savant_ray.errors import STOPPED_EARLY, SavantError, TrainingError
from savant_ray.events import RunFailed
from savant_ray.reporting import RunReport

POLL_SECONDS = 0.5


def train(config: Config) -> int:
    """Trains the run to its end or until it is stopped; returns the exit code.

    Raises:
        SavantError: with its own exit code; the message is for the user.
    """
    prepare_environment()
    signals = StopSignals()
    signals.install()
    config = with_absolute_paths(config, Path.cwd(), output_folder())
    with locked(run_folder(config)), RunReport(run_folder(config), config.training.max_steps) as report:
        if in_ray_job():
            report.say(f"this is a Ray job: the run is kept in {run_folder(config)}")
        try:
            return _train(config, report, signals)
        except KeyboardInterrupt:
            report.say(f"stopped at once; the run goes on from {_last_checkpoint(config)} when it is started again")
            return STOPPED_EARLY


def _train(config: Config, report: RunReport, signals: StopSignals) -> int:
    from savant_ray.cluster.checks import check_before_start
    from savant_ray.cluster.preparation import find_text, prepare_data

    finished = check_before_start(config)
    if finished is not None:
        report.say(finished)
        return 0
    text = find_text(config, report)
    report.stage("starting Ray")
    with ray_session():
        signals.install()
        data = prepare_data(config, text, report)
        report.stage("starting workers")
        outcome = _fit(config, data, report, signals)
    return _conclude(config, outcome, report)


@dataclass
class Outcome:
    """How `fit()` ended."""

    error: BaseException | None = None
    failure: RunFailed | None = None  # what a worker said before it gave up
    done: threading.Event = field(default_factory=threading.Event)


def _fit(config: Config, data: Any, report: RunReport, signals: StopSignals) -> Outcome:
    import ray

    from savant_ray.cluster.bridge import Bridge
    from savant_ray.cluster.trainer import make_trainer

    bridge = Bridge.remote()
    trainer = make_trainer(config, data, bridge)
    outcome = Outcome()
    signals.patient = True
    threading.Thread(target=_run_fit, args=(trainer, outcome), name="fit", daemon=True).start()
    told = False
    while True:
        finished = outcome.done.is_set()  # asked before the events, so that the last ones are not missed
        for event in ray.get(bridge.take_events.remote(0 if finished else POLL_SECONDS)):
            outcome.failure = event if isinstance(event, RunFailed) else outcome.failure
            report.handle(event)
        if finished:
            return outcome
        if signals.received and not told:
            told = True
            ray.get(bridge.request_stop.remote())
            report.say("stopping: this step is finished and saved first (once more to leave at once)")


def _run_fit(trainer: Any, outcome: Outcome) -> None:
    try:
        trainer.fit()
    except BaseException as error:  # handed to the main thread
        outcome.error = error
    finally:
        outcome.done.set()


def _conclude(config: Config, outcome: Outcome, report: RunReport) -> int:
    if outcome.error is not None:
        raise _as_savant_error(outcome) from outcome.error
    if report.last_step < config.training.max_steps:
        report.say(f"stopped and saved as {_last_checkpoint(config)}; to go on, run the same command again")
        return STOPPED_EARLY
    report.say(f'trained; next: python jobs/generate.py --checkpoint {run_folder(config)} --prompt "…"')
    return 0


def _as_savant_error(outcome: Outcome) -> SavantError:
    if outcome.failure is not None:
        kinds = {kind.__name__: kind for kind in SavantError.__subclasses__()}
        return kinds.get(outcome.failure.error, TrainingError)(outcome.failure.text)
    return TrainingError(f"training ended: {outcome.error}")


def _last_checkpoint(config: Config) -> str:
    from savant_ray.training.checkpoint import newest_checkpoint

    newest = newest_checkpoint(run_folder(config))
    return newest.name if newest is not None else "the beginning (no checkpoint yet)"
