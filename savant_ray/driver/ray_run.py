"""The part of an attempt that needs Ray: prepare the data, run Ray Train, follow it until it ends.

`TorchTrainer.fit()` runs in a thread of its own, because in the main thread it would treat Ctrl+C as an abort. The main
thread handles signals, moves events from the bridge to the run's report, and sends the stop request to the bridge.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from ray.train.v2.torch.torch_trainer import TorchTrainer

from savant_ray.cluster.bridge import BridgeHandle, answer_of, last_events, next_events, start_bridge
from savant_ray.cluster.ray_job import grace_seconds
from savant_ray.cluster.session import ExitWithoutShutdown, check_ray_processes, owns_ray, ray_session
from savant_ray.config import AUTO
from savant_ray.driver.attempt import Attempt, Inputs
from savant_ray.driver.data_preparation import prepare_data
from savant_ray.driver.failures import explain_failure, ray_errors_explained
from savant_ray.driver.hang_watch import HangWatch
from savant_ray.driver.phases import Phase, Trigger
from savant_ray.driver.starting_point import records_of, refuse_other_data
from savant_ray.driver.tokenizer_choice import tokenizer_change
from savant_ray.driver.trainer import make_trainer, scaling, unusable_gpus, worker_resources
from savant_ray.driver.worker_watch import WorkerWatch
from savant_ray.errors import STOPPED_EARLY, CheckpointError, TrainingError
from savant_ray.events import (
    AttemptEnded,
    AttemptStarted,
    CheckpointSaved,
    Event,
    RunFailed,
    WorkersLost,
    WorkersStarted,
)
from savant_ray.reporting.wording import generate_command

POLL_SECONDS = 0.5
# How long `fit()` may take to return after the workers have finished or reported an error, if this process started Ray. If
# parts of Ray's dashboard have died, Ray Train waits 8 s for an answer from it (Ray 2.60). The driver need not wait, because
# it kills Ray's processes when it exits.
FIT_RETURN_SECONDS = 2.0
CLUSTER_FIT_RETURN_SECONDS = 60.0  # on a cluster, where Ray ends the workers as soon as the driver exits


@dataclass
class Outcome:
    """How `fit()` ended."""

    error: BaseException | None = None
    failure: RunFailed | None = None  # the error that a worker reported
    end: AttemptEnded | None = None  # reported when the workers have finished
    hang: str = ""  # why workers were killed that have not started again; "" if there are none
    fit: threading.Thread | None = None

    @property
    def fit_is_running(self) -> bool:
        """Whether `fit()` was called and has not returned."""
        return self.fit is not None and self.fit.is_alive()

    @property
    def is_saved(self) -> bool:
        """Whether the workers have finished and their last step is saved."""
        return self.end is not None and self.end.is_saved

    def observe(self, event: Event) -> None:
        """Keep the events that determine the exit code."""
        match event:
            case AttemptEnded():
                self.end = event
            case RunFailed():
                self.failure = event


def run_under_ray(attempt: Attempt, inputs: Inputs) -> int:
    """Start Ray, train until the run is finished or stopped, and return the exit code.

    Raises:
        SavantError: Ray cannot be started, the data cannot be prepared, or training failed.
        ExitWithoutShutdown: as `savant_ray.driver.train`.
    """
    config, resume_checkpoint, report = inputs.config, inputs.resume_checkpoint, attempt.report
    outcome = Outcome()
    with (
        ray_session(attempt.verbose, report.notify) as dashboard,
        _exit_without_shutdown_during_fit(outcome),
        ray_errors_explained(),
    ):
        attempt.phase.handle_signals()
        if dashboard:
            report.notify(f"Ray's dashboard: {dashboard}")
        bridge = start_bridge()  # its process starts while the data is prepared
        scaling(config)  # too few resources are an error now, not after hours of tokenizing
        if config.scaling.use_gpu == AUTO and (problem := unusable_gpus()) is not None:
            report.notify(f"training uses the CPU: {problem}")
        data = prepare_data(config, inputs.files, report, inputs.tokenizer)
        if resume_checkpoint is not None and not attempt.allow_changes:
            refuse_other_data(resume_checkpoint, config, data.fingerprint)
        if inputs.weights_checkpoint is not None and (
            change := tokenizer_change(inputs.weights_checkpoint, data.tokenizer)
        ):
            report.notify(change)
        report.begin_stage("starting workers")
        trainer = make_trainer(config, attempt.storage, data, bridge, attempt.allow_changes, attempt.verbose)
        resources = worker_resources(trainer.scaling_config)  # type: ignore[arg-type]  # annotated with the class of Ray Train v1
        outcome.fit = threading.Thread(target=_call_fit, args=(trainer, outcome), name="fit", daemon=True)
        outcome.fit.start()
        attempt.phase.advance(Trigger.FIT_STARTED)
        _follow(attempt, outcome, bridge, resources)
        if outcome.fit_is_running:  # Ray must not be shut down, as the end of this block would
            raise ExitWithoutShutdown(_conclude(attempt, outcome))
    return _conclude(attempt, outcome)


@contextmanager
def _exit_without_shutdown_during_fit(outcome: Outcome) -> Iterator[None]:
    """Turn an error during `fit()` into `ExitWithoutShutdown`: Ray crashes if it is shut down while `fit()` runs."""
    try:
        yield
    except Exception as error:
        if outcome.fit_is_running:
            raise ExitWithoutShutdown(error=error) from error
        raise


def _call_fit(trainer: TorchTrainer, outcome: Outcome) -> None:
    try:
        trainer.fit()
    except BaseException as error:  # for the main thread
        outcome.error = error


def _follow(attempt: Attempt, outcome: Outcome, bridge: BridgeHandle, resources: Mapping[str, float]) -> None:
    """Report events and pass on a stop request until `fit()` has returned, or until it need not be waited for any longer.

    After the last save that is the case if `fit()` is overdue, if workers are lost, or if a signal requests it; after an
    error that a worker reported, if `fit()` is overdue, because Ray Train may wait for resources to start the workers once
    more. `resources` are those that one worker occupies. If Ray fails, workers may have trained and saved further steps;
    these are recorded, too.

    Raises:
        TrainingError: Ray itself has failed, or workers hang and are not started again.
        KeyboardInterrupt: the workers were lost during a stop, so nothing can be saved.
    """
    phase, report, settings = attempt.phase, attempt.report, attempt.config.scaling
    watch = WorkerWatch(settings.worker_limits[0], resources, report.notify)
    hang_watch = HangWatch(settings.hang_seconds, report.add_event)
    fit_return_seconds = FIT_RETURN_SECONDS if owns_ray() else CLUSTER_FIT_RETURN_SECONDS
    end_time = math.inf  # when the last step was saved or an error was reported, by time.monotonic()
    try:
        while True:
            finished = not outcome.fit_is_running  # read before the events, so that the last ones are not missed
            events, heartbeats = next_events(bridge, 0 if finished else POLL_SECONDS)
            for event in events:
                if outcome.is_saved and isinstance(event, WorkersLost | WorkersStarted):
                    return  # nothing is lost with them, and others that Ray Train starts have nothing to do
                outcome.observe(event)
                phase.observe(event)
                _report(hang_watch.observe(event), attempt)
            outcome.hang = hang_watch.reason
            if outcome.is_saved or outcome.failure is not None:
                end_time = min(end_time, time.monotonic())
            is_interrupted = phase.current is Phase.EXITING
            if finished or time.monotonic() > end_time + fit_return_seconds or (outcome.is_saved and is_interrupted):
                return
            check_ray_processes()
            attempt.storage.refuse_if_lost()
            watch.check(phase.current)
            hang_watch.check(phase.current, heartbeats)
            if is_interrupted:
                raise KeyboardInterrupt
            if phase.current is Phase.STOP_REQUESTED:
                answer_of(bridge.request_stop.remote(grace_seconds(attempt.config)))
                phase.advance(Trigger.REQUEST_SENT)
                report.notify(
                    "stopping: this step is finished and saved first (press Ctrl+C again to exit without saving)"
                )
    except TrainingError:
        for event in last_events(bridge):
            _report(event, attempt)
        raise


def _report(event: Event, attempt: Attempt) -> None:
    if isinstance(event, AttemptStarted):
        attempt.report.backfill(records_of(attempt.storage.folder))
    attempt.report.add_event(event)
    if isinstance(event, AttemptStarted | CheckpointSaved):
        attempt.uploader.upload()


def _conclude(attempt: Attempt, outcome: Outcome) -> int:
    """Report how training ended, and return the exit code.

    Raises:
        SavantError: training failed, or its last step could not be saved.
    """
    newest, end = attempt.newest_checkpoint(), outcome.end
    if outcome.failure is None and outcome.error is not None:
        attempt.report.log(str(outcome.error))
    if outcome.failure is not None or (outcome.error is not None and not outcome.is_saved):
        max_failures = attempt.config.scaling.max_failures
        raise explain_failure(outcome.error, outcome.failure, newest, max_failures, outcome.hang) from outcome.error
    if end is None:
        raise TrainingError("training ended, but its workers reported no result; run the same command again to resume")
    if not outcome.is_saved:
        raise CheckpointError(
            f"step {end.step:,} could not be saved (see above); run the same command again to resume from {newest}"
        )
    if not end.finished:
        saved = f"stopped and saved as {newest}" if end.step else "stopped before the first step"
        attempt.report.conclude(f"{saved}; run the same command again to resume")
        return STOPPED_EARLY
    attempt.report.conclude(f"trained; next: {generate_command(attempt.storage.location)}")
    return 0
