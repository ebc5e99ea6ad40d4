"""What differs when the driver is the entry point of `ray job submit`.

A job runs in a copy of the submitted folder that Ray deletes with the job. Relative output paths are therefore relative
to a folder below the user's home, and the paths of text have to be accessible from every node.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from savant_ray.config import Config
from savant_ray.errors import DataError
from savant_ray.locations import runs_below_home, working_directory

STEP_FRACTION = 0.7  # of the time that `ray job stop` waits: for finishing and saving the step; the rest is for exiting
JOB_STOP_WAIT, JOB_STOP_WAIT_DEFAULT = "RAY_JOB_STOP_WAIT_TIME_S", 3.0


def in_ray_job(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process is the entry point of a Ray job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in environment


def output_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder that relative output paths (run folders, token cache) are relative to.

    Raises:
        SettingsError: the user of a Ray job has no home folder, or the working directory was deleted.
    """
    return runs_below_home() if in_ray_job(environment) else working_directory()


def grace_seconds(config: Config, environment: Mapping[str, str] = os.environ) -> float:
    """Return within how many seconds of a stop request the workers have to finish their step and save it.

    That is `run.grace_seconds`, or less in a Ray job, because `ray job stop` kills it after RAY_JOB_STOP_WAIT_TIME_S.
    """
    if not in_ray_job(environment):
        return config.run.grace_seconds
    wait = float(environment.get(JOB_STOP_WAIT, JOB_STOP_WAIT_DEFAULT))
    return min(config.run.grace_seconds, STEP_FRACTION * wait)


@contextmanager
def missing_text_explained(environment: Mapping[str, str] = os.environ) -> Iterator[None]:
    """In a Ray job, extend the message of a `DataError`: text is not uploaded with the job."""
    try:
        yield
    except DataError as error:
        if not in_ray_job(environment):
            raise
        raise DataError(
            f"{error}\nThis is a Ray job: code and configuration are uploaded with it, text is not. Use absolute paths or "
            "URIs that every node can access."
        ) from error
