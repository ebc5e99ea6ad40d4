"""A trial of a sweep: a run of its own in a child process, whose validation losses are reported to Ray Tune."""

from __future__ import annotations

import threading
from copy import deepcopy
from pathlib import Path
from typing import Any

from ray import tune

import savant_ray
from savant_ray.errors import TrainingError
from savant_ray.events import ValidationDone
from savant_ray.reporting.record import METRICS, read_records

STEP, LOSS = "step", "validation_loss"  # keys of a result
REPORT_SECONDS = 3.0  # between results; a stop request is handled between two results


class Trial(tune.Trainable):
    """Trains the run `trial_N` in the folder of the sweep, or resumes it.

    A result is the newest validation loss and its step. When Tune stops the trial, the run saves its current step.
    """

    def setup(self, config: dict[str, Any], settings: dict[str, Any] | None = None) -> None:
        """Start the run; values in `config` override those in `settings`."""
        settings = with_settings(settings or {}, config | {"run.name": run_name(self.trial_id)})
        self._folder = Path(settings["run"]["storage_path"], settings["run"]["name"])
        self._max_steps = settings["training"]["max_steps"]
        self._stop, self._ended = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self._result: savant_ray.Result | None = None
        self._thread = threading.Thread(target=self._train, args=(settings,), name="training")
        self._thread.start()

    def _train(self, settings: dict[str, Any]) -> None:
        try:
            self._result = savant_ray.train(settings, stop_requested=self._stop.is_set)
        except BaseException as error:  # raised in `step`
            self._error = error
        self._ended.set()

    def step(self) -> dict[str, Any]:
        """Wait for `REPORT_SECONDS` or the end of the run, and return its newest validation.

        The validation of the last step is returned after the end of the run only: ASHA stops a trial that has reached the
        last step, but the run then still answers the logic suite.

        Raises:
            SavantError: training has failed, or something other than Tune has stopped it.
        """
        has_ended = self._ended.wait(REPORT_SECONDS)
        if self._error is not None:
            raise self._error
        if has_ended and self._result is not None and not self._result.finished:
            raise TrainingError(f"the run was stopped at step {self._result.step}")
        newest = newest_validation(self._folder)
        return {**(newest if has_ended or newest.get(STEP) != self._max_steps else {}), "done": has_ended}

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Return an empty dict: the run in its folder is the checkpoint, and `setup` resumes it."""
        return {}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Do nothing; see `save_checkpoint`."""

    def cleanup(self) -> None:
        """Save and stop the run."""
        self._stop.set()
        self._thread.join()


def run_name(trial_id: str) -> str:
    """Return the name of the run of a trial; Tune numbers the trials at the end of their ids."""
    return f"trial_{trial_id.rpartition('_')[2]}"


def with_settings(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of nested settings with the values of `changes`, which has dotted names."""
    changed = deepcopy(settings)
    for name, value in changes.items():
        section, _, field = name.partition(".")
        changed.setdefault(section, {})[field] = value
    return changed


def newest_validation(run_folder: Path) -> dict[str, Any]:
    """Return the step and the loss of the newest validation; empty before the first."""
    newest: dict[str, Any] = {}
    record = run_folder / METRICS
    for line in read_records(record) if record.exists() else ():
        if line["event"] == ValidationDone.kind and line.get(LOSS) is not None:
            newest = {STEP: line[STEP], LOSS: line[LOSS]}
    return newest
