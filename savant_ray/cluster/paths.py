"""Where a run's files lie, as absolute paths.

Relative paths mean the folder the command is typed in. Inside a Ray job that folder is a copy which vanishes with the
job, so there what a run WRITES (run folders, token cache) goes below the home folder instead, and the user is told.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from savant_ray.config import Config
from savant_ray.data.sources import is_uri, split_query
from savant_ray.errors import SettingsError

JOB_HOME = "savant_runs"
REPLACEMENT = "savant-home-"  # of a home folder that is missing; no run is kept there


def python_to_type(python: Path = Path(sys.executable)) -> str:
    """How this Python is called from here; `python` may be none or another one for who typed make."""
    found = shutil.which("python")
    if found is not None and Path(found).parent == python.parent:
        return "python"
    return str(python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python)


def generate_command(run: str) -> str:
    """The command to type next when `run` (a folder or URI) is trained; a shell takes it as it is."""
    return f'{shlex.quote(python_to_type())} jobs/generate.py --checkpoint {shlex.quote(run)} --prompt "…"'


def in_ray_job(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the entry point of `ray job submit`."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in environment


def with_absolute_paths(config: Config, folder: Path, output_folder: Path) -> Config:
    """Inputs against `folder`, outputs against `output_folder`; URIs and absolute paths stay.

    Raises:
        SettingsError: `data.cache_dir` is a URI; its files are memory-mapped.
    """
    if is_uri(config.data.cache_dir):
        raise SettingsError(
            f"data.cache_dir: {config.data.cache_dir} is a URI; give a folder that every node reaches, such as /mnt/shared"
        )
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
    """What relative output paths are relative to.

    Raises:
        SettingsError: a Ray job's user has no home folder.
    """
    return home_folder() / JOB_HOME if in_ray_job(environment) else Path.cwd()


def home_folder() -> Path:
    """The user's.

    Raises:
        SettingsError: there is none, as for a container's user without an entry in /etc/passwd.
    """
    try:
        home = Path.home()
    except RuntimeError:
        home = None
    if home is None or home.name.startswith(REPLACEMENT):
        raise SettingsError(
            f"user {os.getuid()} has no home folder, which is needed here: set HOME to a folder that can be written"
        )
    return home


def replace_missing_home() -> None:
    """Set HOME to an empty temporary folder if the user has no home: Ray Train cannot be imported without one."""
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = tempfile.mkdtemp(prefix=REPLACEMENT)


def run_folder(config: Config) -> Path:
    """`<run.storage_path>/<run.name>`; for a URI its mirror on this machine, `~/savant_runs/s3/<bucket>/…/<run.name>`."""
    if not is_uri(config.run.storage_path):
        return Path(config.run.storage_path) / config.run.name
    scheme, _, rest = split_query(config.run.storage_path)[0].partition("://")
    return home_folder() / JOB_HOME / scheme / rest.strip("/") / config.run.name


def joined(uri: str, name: str) -> str:
    """The URI of `name` below it; what follows a `?` are options, and stays at the end."""
    base, query = split_query(uri)
    return f"{base.rstrip('/')}/{name}{query}"


def parent_and_name(uri: str) -> tuple[str, str]:
    """The inverse of `joined`."""
    base, query = split_query(uri)
    parent, _, name = base.rstrip("/").rpartition("/")
    return parent + query, name


def _absolute(path: str | list[str], folder: Path) -> str | list[str]:
    if isinstance(path, list):
        return [str(_absolute(p, folder)) for p in path]
    return path if is_uri(path) else str(folder / Path(path).expanduser())


def _names_a_file(tokenizer: str, folder: Path) -> bool:
    return (folder / Path(tokenizer).expanduser()).exists()
