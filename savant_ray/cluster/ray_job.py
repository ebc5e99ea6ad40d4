"""What differs when the driver is the entry point of `ray job submit`.

A job runs in a copy of the submitted folder that Ray deletes with the job. Relative output paths are therefore relative
to a folder below the user's home, and the paths of text have to be accessible from every node.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from savant_ray.errors import DataError
from savant_ray.locations import runs_below_home, working_directory


def in_ray_job(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process is the entry point of a Ray job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in environment


def output_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder that relative output paths (run folders, token cache) are relative to.

    Raises:
        SettingsError: the user of a Ray job has no home folder, or the working directory was deleted.
    """
    return runs_below_home() if in_ray_job(environment) else working_directory()


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
