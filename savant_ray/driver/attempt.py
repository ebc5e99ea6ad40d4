"""One launch of a run: check, prepare, start Ray Train, watch, and end with an exit code.

`TorchTrainer.fit()` runs in a side thread, because in the main thread it would take Ctrl+C as an order to abort.
The main thread owns signals and console: it moves events from the bridge to the run's report, and wishes down.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from savant_ray.cluster.session import (
    Leave,
    grace_seconds,
    is_our_own,
    prepare_environment,
    ray_session,
)
from savant_ray.config import Config, dump_yaml
from savant_ray.data.atomic_files import write_atomically
from savant_ray.driver.signals import StopSignals
from savant_ray.errors import (
    STOPPED_EARLY,
    CheckpointError,
    SavantError,
    TrainingError,
    explain,
    unexpected_errors_explained,
)
from savant_ray.events import AttemptEnded, AttemptStarted, CheckpointSaved, Event, RunFailed, WorkersLost
from savant_ray.locations import working_directory
from savant_ray.reporting import RunReport, open_trackers
from savant_ray.reporting.console import PlainConsole
from savant_ray.storage.paths import (
    generate_command,
    in_ray_job,
    missing_text_explained,
    output_folder,
    with_absolute_paths,
)

if TYPE_CHECKING:
    from savant_ray.cluster.bridge import BridgeHandle
    from savant_ray.driver.record_upload import Courier
    from savant_ray.driver.waiting import WorkerWatch
    from savant_ray.storage.local import Disk

POLL_SECONDS = 0.5
# How long `fit()` may take to return when the workers are through. A terminal's Ctrl+C also kills parts of the dashboard,
# and Ray Train's cleaner then asks it in vain for 8 s (Ray 2.60); a Ray of our own ends with us anyhow.
PATIENCE = 2.0


@dataclass(frozen=True)
class Launch:
    """What a launch works with."""

    config: Config
    allow_changes: bool
    verbose: bool
    storage: Disk
    report: RunReport
    courier: Courier
    signals: StopSignals


def train(config: Config, fresh: bool = False, allow_changes: bool = False, verbose: bool = False) -> int:
    """Trains the run to its end or until it is stopped; returns the exit code.

    `fresh` moves an older run of that name aside first; `allow_changes` goes on with other settings or data than the
    run's checkpoint was trained with; `verbose` shows what Ray says.

    Raises:
        SavantError: with its own exit code; the message is for the user.
        Leave: the run has ended but Ray Train has not, so that the process has to end with `leave_at_once`.
    """
    prepare_environment()
    signals = StopSignals()
    signals.install()
    try:
        config = with_absolute_paths(config, working_directory(), output_folder())
        return _launch(config, fresh, allow_changes, verbose, signals)
    except KeyboardInterrupt:
        print("stopped at once, before anything had begun")
        return STOPPED_EARLY


def _launch(config: Config, fresh: bool, allow_changes: bool, verbose: bool, signals: StopSignals) -> int:
    from savant_ray.driver.record_upload import Courier
    from savant_ray.storage.run_storage import run_storage, storage_errors_explained

    storage = run_storage(config)
    with ExitStack() as held:
        with storage_errors_explained(storage):
            if fresh:
                _refuse_before_moving(config, storage, allow_changes)
            moved = storage.move_aside() if fresh else None
            held.enter_context(storage.in_use())
            storage.fetch_records()
        courier = held.enter_context(Courier(storage))
        followers = open_trackers(config.reporting, config.run.name)
        report = held.enter_context(RunReport(storage.folder, config.training.max_steps, followers=followers))
        held.enter_context(unexpected_errors_explained(storage.folder, lambda: report.activity))
        if moved is not None:
            report.say(f"starting anew; the run that was here is now {moved}")
        if in_ray_job():
            report.say(f"this is a Ray job: the run is kept in {storage.location}")
        try:
            return _train(Launch(config, allow_changes, verbose, storage, report, courier, signals))
        except KeyboardInterrupt:
            storage.expect_late_writes()
            report.say(f"stopped at once; the run goes on from {_newest(storage)} when it is started again")
            raise Leave(STOPPED_EARLY) from None
        except Leave as leave:
            signals.leaving = True
            if leave.error is not None:
                storage.expect_late_writes()
                leave.error = explain(leave.error, storage.folder, report.activity)
                report.log(f"error: {leave.error}")
            raise


def _refuse_before_moving(config: Config, storage: Disk, allow_changes: bool) -> None:
    """Refuse wrong paths now: `--fresh` moves an older run aside only for one that can begin.

    Raises:
        SavantError: text, tokenizer or `run.init_from` is missing or would be moved as well, or the disk is too small.
    """
    from savant_ray.driver.checks import check_before_start, refuse_inputs_in_the_run
    from savant_ray.driver.data_preparation import find_text
    from savant_ray.driver.tokenizer_choice import choose_tokenizer, find_origin

    refuse_inputs_in_the_run(config, storage)
    check_before_start(config, storage, fresh=True)
    choose_tokenizer(config, find_origin(None, config, allow_changes), allow_changes)
    with (
        missing_text_explained(),
        RunReport(None, console=PlainConsole(None)) as silent,  # what it says is said again by the launch itself
    ):
        find_text(config, silent)


def _train(launch: Launch) -> int:
    from savant_ray.data.tokenizer import with_tokenizer_settings
    from savant_ray.driver.checks import check_before_start, is_finished
    from savant_ray.driver.data_preparation import find_text, prepare_data, refuse_unencodable
    from savant_ray.driver.starting_point import find_start, records_of, refuse_other_data
    from savant_ray.driver.tokenizer_choice import (
        choose_tokenizer,
        find_origin,
        tokenizer_change,
    )
    from savant_ray.original.conversion import convert_newest
    from savant_ray.storage.run_storage import storage_errors_explained
    from savant_ray.training.checkpoint import CONFIG

    config, storage, report = launch.config, launch.storage, launch.report
    if storage.filesystem is not None:
        report.stage(f"looking for checkpoints in {storage.location}")
    with storage_errors_explained(storage):
        start = find_start(
            storage,
            report.say,
            lambda newest: convert_newest(storage, config, newest, report.say, report.handle, launch.allow_changes),
        )
    report.fill(records_of(storage.folder))
    if start is not None and (finished := is_finished(config, storage, start)):
        report.say(finished)
        return 0
    if start is not None:
        _compare(start, launch)
    check_before_start(config, storage)
    origin = find_origin(start, config, launch.allow_changes)
    tokenizer = choose_tokenizer(config, origin, launch.allow_changes)
    config = with_tokenizer_settings(config, tokenizer)
    launch = replace(launch, config=config)
    write_atomically(storage.folder / CONFIG, dump_yaml(config))
    with missing_text_explained():
        text = find_text(config, report)
    refuse_unencodable(config, text, tokenizer)
    report.stage("starting Ray")
    from savant_ray.cluster.bridge import start_bridge
    from savant_ray.driver.failures import ray_errors_explained

    outcome = Outcome()
    with ray_session(launch.verbose, report.say) as dashboard, _left_while_fit_runs(outcome), ray_errors_explained():
        launch.signals.install()
        if dashboard:
            report.say(f"Ray's dashboard: {dashboard}")
        bridge = start_bridge()  # its process comes up while this one looks at the text and imports Ray Train
        from savant_ray.driver.trainer import scaling

        scaling(config)  # refuses what the cluster cannot run, before hours of tokenising
        data = prepare_data(config, text, report, tokenizer)
        if start is not None and not launch.allow_changes:
            refuse_other_data(start, config, data.fingerprint)
        if origin is not None and (change := tokenizer_change(origin, data.tokenizer)):
            report.say(change)
        report.stage("starting workers")
        _fit(launch, data, bridge, outcome)
        if outcome.fit_runs:
            raise Leave(_conclude(launch, outcome))
    return _conclude(launch, outcome)


def _compare(start: Path, launch: Launch) -> None:
    """Refuses settings that would train garbage and tells of others; where files lie may change in silence."""
    from savant_ray.driver.starting_point import changes_since, refuse_other_settings

    if not launch.allow_changes:
        refuse_other_settings(start, launch.config)
    changes = changes_since(start, launch.config)
    told = [text for name, text in changes.items() if not name.startswith(("run.", "data.", "reporting."))]
    if told:
        launch.report.say(f"changed since {start.name}: {'; '.join(told)}")
    if "training.max_steps" in changes:
        launch.report.say("the learning rate follows the schedule of the new length from here on")


@dataclass
class Outcome:
    """How `fit()` ended."""

    error: BaseException | None = None
    failure: RunFailed | None = None  # what a worker said before it gave up
    end: AttemptEnded | None = None  # what they said when they were through
    fit: threading.Thread | None = None

    @property
    def fit_runs(self) -> bool:
        """Whether it was begun and has not returned."""
        return self.fit is not None and self.fit.is_alive()


@contextmanager
def _left_while_fit_runs(outcome: Outcome) -> Iterator[None]:
    """What ends a launch while `fit()` runs must not shut Ray down under it: the process says it and leaves."""
    try:
        yield
    except Exception as error:
        if outcome.fit_runs:
            raise Leave(error=error) from error
        raise


def _fit(launch: Launch, data: Any, bridge: BridgeHandle, outcome: Outcome) -> None:
    from savant_ray.driver.trainer import make_trainer, needs
    from savant_ray.driver.waiting import WorkerWatch

    config = launch.config
    trainer = make_trainer(config, launch.storage, data, bridge, launch.allow_changes, launch.verbose)
    resources = needs(trainer.scaling_config)  # type: ignore[arg-type]  # Ray names its first version's class
    watch = WorkerWatch(config.scaling.worker_limits[0], resources, launch.report.say)
    outcome.fit = threading.Thread(target=_run_fit, args=(trainer, outcome), name="fit", daemon=True)
    outcome.fit.start()
    _follow(launch, outcome, bridge, watch)


def _follow(launch: Launch, outcome: Outcome, bridge: BridgeHandle, watch: WorkerWatch) -> None:
    """Until `fit()` has returned, or is no longer waited for."""
    import ray

    from savant_ray.cluster.bridge import next_events

    config, report, signals = launch.config, launch.report, launch.signals
    told, through = False, math.inf  # when the workers were through, and all was saved
    while True:
        finished = not outcome.fit_runs  # asked before the events, so that the last ones are not missed
        for event in next_events(bridge, 0 if finished else POLL_SECONDS):
            _note(event, outcome, signals)
            watch.note(event)
            _report(event, launch)
        if outcome.end is not None and outcome.end.saved_step >= outcome.end.step:
            through = min(through, time.monotonic())
        if finished or (time.monotonic() > through + PATIENCE and is_our_own()):
            return
        launch.storage.refuse_if_lost()
        watch.remark()
        if signals.received and not signals.patient:  # the workers were lost meanwhile, so that nobody is left to save
            signals.interrupt()
        if signals.received and not told:
            told = True
            ray.get(bridge.request_stop.remote(grace_seconds(config)))
            report.say("stopping: this step is finished and saved first (once more to leave at once)")


def _report(event: Event, launch: Launch) -> None:
    from savant_ray.driver.starting_point import records_of

    if isinstance(event, AttemptStarted):
        launch.report.fill(records_of(launch.storage.folder))
    launch.report.handle(event)
    if isinstance(event, AttemptStarted | CheckpointSaved):
        launch.courier.send()


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


def _conclude(launch: Launch, outcome: Outcome) -> int:
    newest = _newest(launch.storage)
    if outcome.failure is not None or outcome.error is not None:
        raise _failure(launch, outcome, newest) from outcome.error
    if outcome.end is None:
        raise TrainingError("training ended without a word from its workers; run the same command again to go on")
    if outcome.end.saved_step < outcome.end.step:
        raise CheckpointError(
            f"step {outcome.end.step:,} could not be saved (see above); the run goes on from {newest} "
            "when it is started again"
        )
    if not outcome.end.finished:
        saved = f"stopped and saved as {newest}" if outcome.end.step else "stopped before the first step"
        launch.report.say(f"{saved}; to go on, run the same command again")
        return STOPPED_EARLY
    launch.report.say(f"trained; next: {generate_command(launch.storage.location)}")
    return 0


def _failure(launch: Launch, outcome: Outcome, newest: str) -> SavantError:
    from savant_ray.driver.failures import explain_failure

    if outcome.failure is None:
        launch.report.log(str(outcome.error))
    return explain_failure(outcome.error, outcome.failure, newest, launch.config.scaling.max_failures)


def _newest(storage: Disk) -> str:
    try:
        return next(reversed(storage.complete_steps()), "the beginning (no checkpoint yet)")
    except OSError:  # object storage that is not reached
        return "its newest checkpoint"
