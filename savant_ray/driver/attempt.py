"""The part of an attempt that needs no Ray: the run's storage and report, and what the run starts from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from savant_ray.cluster.ray_job import in_ray_job, missing_text_explained
from savant_ray.cluster.session import ExitWithoutShutdown
from savant_ray.config import Config, dump_yaml
from savant_ray.data.atomic_files import write_atomically
from savant_ray.data.tokenizer import Tokenizer, with_tokenizer_settings
from savant_ray.driver.checks import (
    check_before_start,
    finished_message,
    refuse_inputs_in_the_run,
    refuse_own_checkpoint_as_start,
)
from savant_ray.driver.data_files import DataFiles, find_data_files, refuse_unencodable
from savant_ray.driver.phases import AttemptPhase, Trigger
from savant_ray.driver.record_upload import RecordUploader
from savant_ray.driver.starting_point import (
    TEXT_FILES,
    checkpoint_to_continue_from,
    compare_settings,
    copy_start,
    find_start,
    records_of,
)
from savant_ray.driver.tokenizer_choice import WeightsCheckpoint, choose_tokenizer, find_weights_checkpoint
from savant_ray.errors import STOPPED_EARLY, SavantError, explain, unexpected_errors_explained
from savant_ray.reporting import RunReport, open_trackers
from savant_ray.reporting.console import PlainConsole
from savant_ray.storage.protocol import RunStorage, newest_checkpoint_name
from savant_ray.storage.run_storage import run_storage, storage_errors_explained
from savant_ray.training.checkpoint import CONFIG


@dataclass(frozen=True)
class Attempt:
    """The settings and options of an attempt, and what is open while it lasts."""

    config: Config  # as the user wrote it, with absolute paths
    allow_changes: bool
    verbose: bool
    storage: RunStorage
    report: RunReport
    uploader: RecordUploader
    phase: AttemptPhase

    def newest_checkpoint(self) -> str:
        """Return the name of the run's newest checkpoint, for messages."""
        try:
            with storage_errors_explained(self.storage):
                return newest_checkpoint_name(self.storage) or "the beginning (no checkpoint yet)"
        except (OSError, SavantError):  # storage that cannot be reached
            return "its newest checkpoint"


@dataclass(frozen=True)
class Inputs:
    """The checkpoint, the tokenizer and the files that an attempt starts from, and the settings that result."""

    config: Config  # with the settings that the tokenizer determines
    resume_checkpoint: Path | None  # checkpoint of this run to resume from, None for a new run
    weights_checkpoint: WeightsCheckpoint | None  # `resume_checkpoint`, or that of `run.init_from`
    tokenizer: Tokenizer | None  # None: to be trained on the training text
    files: DataFiles


@contextmanager
def open_attempt(
    config: Config, fresh: bool, allow_changes: bool, verbose: bool, phase: AttemptPhase
) -> Iterator[Attempt]:
    """Lock the run, open its report, and upload its records when the attempt ends.

    Raises:
        SavantError: the run is in use, its storage cannot be used, or the package of a tracker is not installed; or, with
            `fresh`, the new run could not start.
        ExitWithoutShutdown: the block raised it, or was interrupted.
    """
    storage = run_storage(config)
    followers = open_trackers(config.reporting, config.run.name)
    with ExitStack() as stack:
        with storage_errors_explained(storage):
            if fresh:
                _check_before_moving_aside(config, storage, allow_changes)
            moved = storage.move_aside() if fresh else None
            stack.enter_context(storage.in_use())
            storage.fetch_records()
        uploader = stack.enter_context(RecordUploader(storage))
        report = stack.enter_context(RunReport(storage.folder, config.training.max_steps, followers=followers))
        stack.enter_context(unexpected_errors_explained(storage.folder, lambda: report.activity))
        if moved is not None:
            report.notify(f"starting a new run; the previous one was moved to {moved}")
        if in_ray_job():
            report.notify(f"this is a Ray job: the run is kept in {storage.location}")
        attempt = Attempt(config, allow_changes, verbose, storage, report, uploader, phase)
        try:
            yield attempt
        except KeyboardInterrupt:
            storage.expect_late_writes()
            report.conclude(
                f"stopped without saving; run the same command again to resume from {attempt.newest_checkpoint()}"
            )
            raise ExitWithoutShutdown(STOPPED_EARLY) from None
        except ExitWithoutShutdown as end:
            phase.advance(Trigger.EXIT)
            if end.error is not None:
                storage.expect_late_writes()
                end.error = explain(end.error, storage.folder, report.activity)
                report.log(f"error: {end.error}")
            raise


def _check_before_moving_aside(config: Config, storage: RunStorage, allow_changes: bool) -> None:
    """Check the inputs of a new run before `--fresh` moves an older one aside for it.

    Raises:
        SavantError: text, tokenizer, or the checkpoint that the run starts from is missing or would be moved as well, or the
            disk is too small.
    """
    refuse_inputs_in_the_run(config, storage)
    check_before_start(config, storage, fresh=True)
    if config.run.continue_from is None:
        checkpoint = find_weights_checkpoint(None, config, allow_changes)
    else:
        with checkpoint_to_continue_from(config.run.continue_from, config, allow_changes, TEXT_FILES) as folder:
            checkpoint = find_weights_checkpoint(folder, config, allow_changes)
    choose_tokenizer(config, checkpoint, allow_changes)
    with (
        missing_text_explained(),
        RunReport(None, console=PlainConsole(None)) as silent_report,  # `find_inputs` prints the same messages
    ):
        find_data_files(config, silent_report)


def find_inputs(attempt: Attempt) -> Inputs | None:
    """Find and check what the attempt starts from; return None if the run is finished already.

    This may also rename damaged checkpoints, copy that of `run.continue_from`, convert a file of the original script, write
    the quickstart's text, and update the run's record and its file of settings.

    Raises:
        SavantError: a setting, a checkpoint, the tokenizer or the text cannot be used.
    """
    config, storage, report = attempt.config, attempt.storage, attempt.report
    if storage.filesystem is not None:
        report.begin_stage(f"looking for checkpoints in {storage.location}")
    with storage_errors_explained(storage):
        resume_checkpoint = find_start(storage, config, report.notify, report.add_event, attempt.allow_changes)
        if resume_checkpoint is not None:
            refuse_own_checkpoint_as_start(config, storage, resume_checkpoint)
        elif config.run.continue_from is not None:
            check_before_start(config, storage)
            resume_checkpoint = copy_start(
                storage, config, config.run.continue_from, report.add_event, attempt.allow_changes
            )
    report.backfill(records_of(storage.folder))
    if resume_checkpoint is not None:
        if message := finished_message(config, storage, resume_checkpoint):
            report.notify(message)
            report.complete_trackers()
            return None
        compare_settings(resume_checkpoint, config, attempt.allow_changes, report.notify)
    check_before_start(config, storage, resumes=resume_checkpoint is not None)
    weights_checkpoint = find_weights_checkpoint(resume_checkpoint, config, attempt.allow_changes)
    tokenizer = choose_tokenizer(config, weights_checkpoint, attempt.allow_changes)
    config = with_tokenizer_settings(config, tokenizer)
    write_atomically(storage.folder / CONFIG, dump_yaml(config))
    with missing_text_explained():
        files = find_data_files(config, report)
    refuse_unencodable(config, files, tokenizer)
    return Inputs(config, resume_checkpoint, weights_checkpoint, tokenizer, files)
