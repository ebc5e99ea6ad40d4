"""Where a run's files lie, as absolute paths.

Relative paths mean the folder the command is typed in. Inside a Ray job that folder is a copy which vanishes with the
job, so there what a run WRITES (run folders, token cache) goes below the home folder instead, and the user is told.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from savant_ray.config import Config
from savant_ray.errors import SettingsError

JOB_HOME = "savant_runs"


def in_ray_job(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the entry point of `ray job submit`."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in environment


def with_absolute_paths(config: Config, folder: Path, output_folder: Path) -> Config:
    """Inputs against `folder`, outputs against `output_folder`; URIs and absolute paths stay.

    Raises:
        SettingsError: an output path is a URI; only text may come from object storage.
    """
    for name, path in {"run.storage_path": config.run.storage_path, "data.cache_dir": config.data.cache_dir}.items():
        if "://" in path:
            raise SettingsError(f"{name}: {path} is a URI; give a folder that every node reaches, such as /mnt/shared")
    settings = config.to_dict()
    run, data = settings["run"], settings["data"]
    run["storage_path"] = _absolute(run["storage_path"], output_folder)
    data["cache_dir"] = _absolute(data["cache_dir"], output_folder)
    data["validation"] = _absolute(data["validation"], folder)
    for source in data["sources"]:
        source["path"] = _absolute(source["path"], folder)
    if run["init_from"] is not None:
        run["init_from"] = _absolute(run["init_from"], output_folder)
    if _names_a_file(data["tokenizer"], folder):
        data["tokenizer"] = _absolute(data["tokenizer"], folder)
    return Config.from_dict(settings)


def output_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """What relative output paths are relative to."""
    return Path.home() / JOB_HOME if in_ray_job(environment) else Path.cwd()


def run_folder(config: Config) -> Path:
    """`<run.storage_path>/<run.name>`."""
    return Path(config.run.storage_path) / config.run.name


def _absolute(path: str | list[str], folder: Path) -> str | list[str]:
    if isinstance(path, list):
        return [str(_absolute(p, folder)) for p in path]
    return path if "://" in path else str(folder / Path(path).expanduser())


def _names_a_file(tokenizer: str, folder: Path) -> bool:
    return (folder / Path(tokenizer).expanduser()).exists()
