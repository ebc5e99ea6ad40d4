"""Runs the trials of a sweep under Ray Tune, and shows their results."""

from __future__ import annotations

import logging
import math
import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler
from rich.table import Table

from savant_ray.cluster.session import node_resources, ray_session
from savant_ray.config import Config, dump_yaml
from savant_ray.data.atomic_files import write_atomically
from savant_ray.errors import STOPPED_EARLY, SettingsError, error_in_traceback
from savant_ray.locations import is_uri
from savant_ray.reporting.page import REPORT, write_page
from savant_ray.reporting.record import METRICS
from savant_ray.reporting.runs import RunSummary, summarize
from savant_ray.reporting.text_tables import table_console
from savant_ray.reporting.wording import escape_controls, relative_path
from savant_ray.storage.lock import is_in_use
from savant_ray.sweep.search_space import read_space
from savant_ray.sweep.trial import LOSS, STEP, Trial, run_name

TUNE_FOLDER = "tune"  # of Tune's own state
DESCRIPTION = "sweep.yaml"
OPTIONS = "# savant sweep "  # begins the first line of the description, followed by the options
TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # before its first validation, a run has no loss to report
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # each run has a record of its own
    "RAY_AIR_NEW_OUTPUT": "0",  # otherwise Tune prints a table of its own settings, also with `verbose=0`
}
STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
MAX_COMPARED = 8  # runs on the page
PIPE_WIDTH = 120  # columns of the table if standard output is not a terminal
TRIAL_MEMORY = 64 << 20  # bytes; a trial's actor requests memory only, so that its run gets the cores


def sweep(config: Config, space_file: Path, trials: int, concurrent: int, stops_early: bool, verbose: bool) -> int:
    """Run or resume the sweep `run.name` and print its results; all paths in `config` are absolute.

    Returns:
        the exit code: `STOPPED_EARLY` after Ctrl+C or SIGTERM, which save the runs; otherwise 1 if a trial has failed.

    Raises:
        SettingsError: the search space is not valid, the storage is not supported, or a sweep of this name has other
            settings or options, or a run has this name.
    """
    if is_uri(config.run.storage_path):
        raise SettingsError("run.storage_path: a sweep needs a folder, not a URI")
    space = read_space(space_file, config)
    folder = Path(config.run.storage_path, config.run.name)
    options = f"--trials {trials} --concurrent {concurrent}{'' if stops_early else ' --no-early-stopping'}"
    _write_or_compare_description(folder, options, f"{dump_yaml(config)}\n{space_file.read_text(encoding='utf-8')}")
    os.environ |= TUNE_ENVIRONMENT
    with ray_session(verbose):
        if not verbose:
            logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # `_Progress` prints why a trial fails
        settings = _with_shared_cores(config, concurrent).to_dict()
        settings["run"]["storage_path"] = str(folder)
        tuner = _tuner(folder, settings, space, trials, concurrent, stops_early)
        stop_trials_at_signals()
        grid = tuner.fit()
    results = [grid[index] for index in range(len(grid))]
    rows = [(result, _summary(folder, result)) for result in results]
    rows.sort(key=lambda row: _loss(row[1]))
    _print_table(rows, list(space))
    runs = [Path(summary.folder) for _, summary in rows if summary is not None]
    if runs:
        page = folder / REPORT
        write_page(runs[:MAX_COMPARED], page, is_in_use)
        print(f"{escape_controls(relative_path(page))} compares the best runs; open it in a browser")
    if not all(result.error or (result.metrics or {}).get("done") for result in results) or not results:
        print("stopped; the same command resumes")
        return STOPPED_EARLY
    return int(grid.num_errors > 0)


def stop_trials_at_signals() -> None:
    """Let SIGTERM, SIGHUP and SIGUSR1 stop the trials; Tune does that at SIGINT only, and a second one ends it.

    Only the first of them has an effect, because `timeout` and a closing terminal send theirs twice. Under `nohup` SIGHUP
    remains ignored.
    """
    numbers = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]

    def stop(_signal: int, _frame: FrameType | None) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        signal.raise_signal(signal.SIGINT)

    for number in numbers:
        signal.signal(number, stop)


def _write_or_compare_description(folder: Path, options: str, settings: str) -> None:
    """Write the description of a new sweep, or compare it with that of the existing one.

    Tune resumes a sweep with the options that it has stored, so others would have no effect.

    Raises:
        SettingsError: they differ, or the folder is that of a run, whose report the sweep's would replace.
    """
    path = folder / DESCRIPTION
    if not path.exists():
        if (folder / METRICS).exists():
            raise SettingsError(f"{folder}: is the folder of a run; choose another run.name for the sweep")
        write_atomically(path, f"{OPTIONS}{options}\n{settings}")
        return
    description = path.read_text(encoding="utf-8")
    first_line, _, old_settings = description.partition("\n")
    if not first_line.startswith(OPTIONS):  # written by an older version
        first_line, old_settings = OPTIONS + options, description
    if old_settings != settings:
        raise SettingsError(f"{folder}: this sweep has other settings or another search space; choose another run.name")
    if (old_options := first_line.removeprefix(OPTIONS)) != options:
        raise SettingsError(
            f"{folder}: this sweep was started with {old_options}, now {options}; repeat its options to resume it, or "
            "choose another run.name"
        )


def _with_shared_cores(config: Config, concurrent: int) -> Config:
    """Return settings in which each worker gets a fraction of the cores, so that `concurrent` trials run at once."""
    if concurrent == 1 or config.scaling.resources_per_worker:
        return config
    cores = int(sum(node.get("CPU", 0) for node in node_resources()))
    resources = {"CPU": float(max(1, cores // (concurrent * config.scaling.worker_limits[1])))}
    return config.model_copy(update={"scaling": config.scaling.model_copy(update={"resources_per_worker": resources})})


def _tuner(
    folder: Path, settings: dict[str, Any], space: dict[str, Any], trials: int, concurrent: int, stops_early: bool
) -> tune.Tuner:
    trainable = tune.with_resources(
        tune.with_parameters(Trial, settings=settings), tune.PlacementGroupFactory([{"memory": TRIAL_MEMORY}])
    )
    state = folder / TUNE_FOLDER
    if tune.Tuner.can_restore(str(state)):
        return tune.Tuner.restore(str(state), trainable, resume_errored=True, param_space=space)
    max_steps, first = settings["training"]["max_steps"], settings["validation"]["every_steps"]
    scheduler = None
    if stops_early:
        # A run ends by itself at its last step, which may be later than `max_t` if `training.max_steps` is varied.
        limits = {"max_t": max_steps, "grace_period": min(first, max_steps), "stop_last_trials": False}
        scheduler = ASHAScheduler(STEP, **limits)
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            metric=LOSS, mode="min", scheduler=scheduler, num_samples=trials, max_concurrent_trials=concurrent
        ),
        run_config=tune.RunConfig(name=TUNE_FOLDER, storage_path=str(folder), verbose=0, callbacks=[_Progress()]),
    )


class _Progress(tune.Callback):
    """Prints when a trial starts and ends."""

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        values = ", ".join(f"{name} {_format_value(value)}" for name, value in trial.config.items())
        print(f"{run_name(trial.trial_id)} starts: {escape_controls(values)}", flush=True)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        result = trial.last_result
        loss = f"validation loss {result[LOSS]:.4f} at step {result[STEP]:,}" if LOSS in result else "no validation"
        print(f"{run_name(trial.trial_id)} ends: {loss}", flush=True)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        errors = Path(trial.error_file).read_text(encoding="utf-8") if trial.error_file else ""
        newest = errors.rpartition("Failure # ")[2]  # Tune adds the errors of each attempt
        print(f"{run_name(trial.trial_id)} fails: {escape_controls(error_in_traceback(newest))}", flush=True)


def _format_value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value!s:.20}"


def _summary(folder: Path, result: Any) -> RunSummary | None:
    """Return the state of the run of a trial, None if it has no record."""
    run = folder / run_name(result.metrics["trial_id"]) if result.metrics else None
    try:
        return summarize(run, is_in_use) if run else None
    except SettingsError:
        return None


def _loss(summary: RunSummary | None) -> float:
    loss = summary.best_validation_loss if summary is not None else None
    return float("inf") if loss is None else loss


def _print_table(rows: list[tuple[Any, RunSummary | None]], names: list[str]) -> None:
    """Print one row per trial, from its result in Tune and the state of its run; the best one first."""
    table = Table("run", *map(escape_controls, names), "state", "step", "best validation", box=None)
    for result, summary in rows:
        shown = [escape_controls(_format_value((result.config or {}).get(name))) for name in names]
        if summary is None:
            table.add_row("–", *shown, "failed" if result.error else "not started", "0", "–")
        else:
            loss = _loss(summary)
            best = f"{loss:.4f}" if math.isfinite(loss) else "–"
            table.add_row(summary.name, *shown, summary.state, f"{summary.step:,}", best)
    table_console(PIPE_WIDTH).print(table)
