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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from savant_ray.config import Config
from savant_ray.errors import DataError, SettingsError
from savant_ray.locations import absolute_path, is_uri, local_path, printable, split_query, working_directory

JOB_HOME = "savant_runs"
REPLACEMENT = "savant-home-"  # of a home folder that is missing; no run is kept there


def python_to_type(python: Path = Path(sys.executable)) -> str:
    """How this Python is called from here; `python` may be none or another one for who typed make."""
    found = shutil.which("python")
    if found is not None and Path(found).parent == python.parent:
        return "python"
    try:
        return str(python.relative_to(Path.cwd()))
    except (ValueError, OSError):  # it lies elsewhere, or the working directory was deleted
        return str(python)


def generate_command(run: str) -> str:
    """The command to type next when `run` (a folder or URI) is trained; a shell takes it as it is."""
    return f'{shlex.quote(python_to_type())} jobs/generate.py --checkpoint {shlex.quote(run)} --prompt "…"'


def in_ray_job(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the entry point of `ray job submit`."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in environment


@contextmanager
def missing_text_explained(environment: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Add to a `DataError` inside a Ray job that text does not travel with a job."""
    try:
        yield
    except DataError as error:
        if not in_ray_job(environment):
            raise
        raise DataError(
            f"{error}\nThis is a Ray job: code and configuration travel with it, text does not. Give absolute paths or "
            "URIs that every node reaches."
        ) from error


def with_absolute_paths(config: Config, folder: Path, output_folder: Path) -> Config:
    """Inputs against `folder`, outputs against `output_folder`; `file:` URIs become paths, other URIs stay.

    Raises:
        SettingsError: a setting cannot be a path (`~` of an unknown user, NUL, not UTF-8), or `data.cache_dir` is a URI;
            its files are memory-mapped.
    """
    if is_uri(config.data.cache_dir):
        raise SettingsError(
            f"data.cache_dir: {printable(config.data.cache_dir)} is a URI; give a folder that every node reaches, "
            "such as /mnt/shared"
        )
    settings = config.to_dict()
    run, data = settings["run"], settings["data"]
    run["storage_path"] = _absolute(run["storage_path"], output_folder, "run.storage_path")
    data["cache_dir"] = _absolute(data["cache_dir"], output_folder, "data.cache_dir")
    data["validation"] = _absolute(data["validation"], folder, "data.validation")
    for number, source in enumerate(data["sources"]):
        source["path"] = _absolute(source["path"], folder, f"data.sources[{number}].path")
    if run["init_from"] is not None:
        run["init_from"] = _absolute(run["init_from"], output_folder, "run.init_from")
    if not config.data.learns_tokenizer and _names_a_file(data["tokenizer"], folder):
        data["tokenizer"] = _absolute(data["tokenizer"], folder, "data.tokenizer")
    return Config.from_dict(settings)


def output_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """What relative output paths are relative to.

    Raises:
        SettingsError: a Ray job's user has no home folder.
    """
    return home_folder() / JOB_HOME if in_ray_job(environment) else working_directory()


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


def _absolute(path: str | list[str], folder: Path, setting: str) -> str | list[str]:
    if isinstance(path, list):
        return [absolute_path(each, folder, f"{setting}[{number}]") for number, each in enumerate(path)]
    return absolute_path(path, folder, setting)


def _names_a_file(tokenizer: str, folder: Path) -> bool:
    if is_uri(tokenizer):
        return False
    path = local_path(tokenizer, "data.tokenizer")
    return path.is_absolute() or os.path.exists(folder / path)  # noqa: PTH110 - Path.exists raises for a name too long
