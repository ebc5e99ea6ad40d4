"""Makes Ray's processes import the driver's copy of this package, and refuses nodes that have another version.

Otherwise a worker imports the version that is installed in its environment, or one in the working directory of the command:
with two checkouts on a machine, driver and workers could run different code without any message.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RuntimeEnvSetupError
from ray.job_config import JobConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from savant_ray.errors import SavantError
from savant_ray.ray_internals import set_driver_import_path

PACKAGE = __name__.partition(".")[0]
NODE_SECONDS = 60.0  # a node that cannot start a process in this time is checked when it starts a worker


class _PackageFolder(list[str]):
    """The list of folders that a worker puts before `sys.path`: only the one that contains this package.

    It is empty until Ray calls `extend` to append the folder of the driver's script and the working directory. `extend`
    ignores these two, because any `numpy.py` in them would take precedence over the installed package, and appends the
    package's folder. For a job that was submitted with a working directory Ray does not call it: workers then import the
    package from the job's copy of that directory.
    """

    def extend(self, _ray_folders: Iterable[str]) -> None:
        super().extend([str(package_folder().parent)])


def job_config() -> JobConfig:
    """Return the configuration of a job whose workers import this package from the same folder as the driver."""
    config = JobConfig()
    set_driver_import_path(config, _PackageFolder())
    return config


def package_folder() -> Path:
    """Return the folder that this process imported the package from."""
    return Path(__file__).resolve().parents[1]


def code_digest(folder: Path) -> str:
    """Return a hash over names and content of all Python files of the package in `folder`.

    Broken links are left out: Emacs creates `.#loop.py` while `loop.py` has unsaved changes.
    """
    digest = hashlib.sha256()
    for file in sorted(filter(Path.is_file, folder.rglob("*.py"))):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(folder).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


@functools.cache
def own_digest() -> str:
    """Return the digest of this process's package."""
    return code_digest(package_folder())


def refuse_other_code() -> None:
    """Compare the package of each node of the cluster with the driver's; Ray must be running.

    Raises:
        SavantError: a node imports another version of it, or none, or the job's environment cannot be set up.
    """
    module = sys.modules[__name__]
    ray.cloudpickle.register_pickle_by_value(module)  # so that nodes run the driver's version of `_folder_and_digest`
    try:
        task = ray.remote(_folder_and_digest)
        nodes = {task.options(**_run_on(node)).remote(PACKAGE): node for node in ray.nodes() if node["Alive"]}
    finally:
        ray.cloudpickle.unregister_pickle_by_value(module)
    finished, _ = ray.wait(list(nodes), num_returns=len(nodes), timeout=NODE_SECONDS)
    for reference in finished:
        try:
            folder, digest = ray.get(reference)
        except RuntimeEnvSetupError as error:
            raise SavantError(f"the job's runtime environment cannot be set up: {str(error).strip()}") from error
        except RayError:  # the node has died, or its files cannot be read; checked when it starts a worker
            continue
        if digest != own_digest():
            raise other_code_error(str(package_folder()), f"node {nodes[reference]['NodeManagerAddress']}", folder)


def _run_on(node: dict[str, Any]) -> dict[str, Any]:
    """Return the options with which a task runs on this node."""
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)}


def _folder_and_digest(package: str) -> tuple[str, str]:
    """Return where this process would import the package from and its digest, two empty strings if it cannot."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return "", ""
    folder = Path(spec.origin).resolve().parent
    return str(folder), code_digest(folder)


def other_code_error(driver_folder: str, process: str, folder: str) -> SavantError:
    """Return the error for a process that imports another version of the package from `folder`, or none (`folder` is "")."""
    if folder == driver_folder:
        return SavantError(
            f"{process} has another version of {PACKAGE} in {folder} than this command had when it started.\n"
            "If the files were changed since then, run the same command again; it resumes with the new ones. If that node "
            "has a copy of its own there, install the same version on it."
        )
    difference = f"has another version of it in {folder}" if folder else "cannot import it"
    return SavantError(
        f"this command runs {PACKAGE} from {driver_folder}, but {process} {difference}.\n"
        "Install the same version there, keep it in a folder that all nodes share, or submit a job, which uploads it "
        "(make submit)."
    )
