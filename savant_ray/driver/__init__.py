"""One attempt at a run in the driver process: checks, data, Ray Train, signals, exit code.

`train`, `prepare` and `verify` are the entry points. torch and Ray take seconds to import, and Ray reads environment
variables when it is imported. All of them therefore set the environment before they import the modules that do the work.
`train` installs the signal handlers first, and imports the modules that connect to Ray only after the checks have passed.
"""

from __future__ import annotations

from savant_ray.cluster.ray_job import output_folder
from savant_ray.cluster.session import prepare_environment
from savant_ray.config import Config
from savant_ray.driver.phases import AttemptPhase
from savant_ray.errors import STOPPED_EARLY
from savant_ray.locations import working_directory
from savant_ray.storage.paths import with_absolute_paths


def resolve_paths(config: Config) -> Config:
    """Return the settings with absolute paths: relative inputs are in the working directory, outputs in `output_folder`.

    Raises:
        SettingsError: a setting cannot be a path.
    """
    return with_absolute_paths(config, working_directory(), output_folder())


def train(config: Config, fresh: bool = False, allow_changes: bool = False, verbose: bool = False) -> int:
    """Train a run until it is finished or stopped, and return the exit code.

    `config` comes from `resolve_paths`. `fresh` moves an older run of the same name aside first;
    `allow_changes` resumes with other settings or data than those of the checkpoint; `verbose` prints the output of Ray.

    Raises:
        SavantError: with its own exit code; the message is for the user.
        ExitWithoutShutdown: after Ctrl+C, or because `TorchTrainer.fit()` still runs; the process has to end with
            `exit_without_shutdown`.
    """
    phase = AttemptPhase()
    phase.handle_signals()
    try:
        prepare_environment()  # may wait 10 s for a cluster
        from savant_ray.driver.attempt import find_inputs, open_attempt

        with open_attempt(config, fresh, allow_changes, verbose, phase) as attempt:
            inputs = find_inputs(attempt)
            if inputs is None:
                return 0
            attempt.report.begin_stage("starting Ray")
            from savant_ray.driver.ray_run import run_under_ray

            return run_under_ray(attempt, inputs)
    except KeyboardInterrupt:
        print("stopped before the run was opened")
        return STOPPED_EARLY


def prepare(config: Config, verbose: bool = False) -> None:
    """Prepare the data of a run without training it.

    `config` comes from `resolve_paths`; `verbose` prints the output of Ray.

    Raises:
        DataError: text is missing or unreadable or contains no document, or a line is invalid and `data.on_bad_line` is
            `error`.
        CheckpointError: as `find_weights_checkpoint`.
        SettingsError: as `find_data_files`, `choose_tokenizer`, `refuse_unencodable` and `prepare_data`.
    """
    prepare_environment()
    from savant_ray.driver.data_preparation import prepare_only

    prepare_only(config, verbose)


def verify(run: str, first: int | None = None, last: int | None = None, verbose: bool = False) -> str:
    """Repeat steps of a run in this process, compare them with its record and checkpoints, and return what is equal.

    The steps `first` to `last` are among the repeated ones. If `first` is None, training is repeated from the initial
    weights if the record begins with them, otherwise from the oldest kept checkpoint. If `last` is None, it is repeated up
    to the newest checkpoint, or to the last recorded step if `first` is after that checkpoint. `verbose` prints the output
    of Ray, which is started only if a part of the token cache is missing.

    Raises:
        VerificationError: a step, or the state after it, is not that of the run.
        SavantError: the steps cannot be repeated, or the run cannot be read.
    """
    prepare_environment()
    from savant_ray.driver.verification import verify_run

    return verify_run(run, first, last, verbose)
