"""`savant doctor`: checks the machine for what training requires, and prints how to install what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from savant_ray import __version__
from savant_ray.errors import SavantError, describe

if TYPE_CHECKING:
    from packaging.requirements import Requirement

DISTRIBUTION = "savant-ray"
DASHBOARD_PORT = 8265
MIN_FREE_GB, LOW_FREE_GB = 0.5, 5.0  # of the disk
MIN_MEMORY_GB, LOW_MEMORY_GB = 1.5, 3.0  # Ray's processes take about 1 GB, and the quickstart's worker 0.7 GB
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - Ray keeps its object store there
LOW_SHARED_MEMORY_GB = 0.25
LOW_OPEN_FILES = 1024
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
NOT_FOR_USERS = ("test", "check", "docs", "release")  # extras for work on the program itself

Status = Literal["ok", "note", "error"]


@dataclass(frozen=True)
class Finding:
    """What a check found. With the status `error` training cannot run; `remedy` says what to do."""

    topic: str
    status: Status
    text: str
    remedy: str = ""


def diagnose() -> Iterator[Finding]:
    """Yield the findings of all checks; an exception in a check is a finding of status `error`."""
    for topic, check in CHECKS.items():
        try:
            findings = list(check(topic))
        except SavantError as error:
            findings = [Finding(topic, "error", str(error))]
        except Exception as error:
            findings = [Finding(topic, "error", describe(error), f"if a package is missing: {_install()}")]
        yield from findings


def print_findings(findings: Iterator[Finding]) -> int:
    """Print each finding as soon as it is there, then the conclusion; return the number of errors."""
    n_errors = 0
    for finding in findings:
        n_errors += finding.status == "error"
        text = finding.text.replace("\n", f"\n{'':21}")
        print(f"{finding.status:<8}{finding.topic:<13}{text}", flush=True)
        if finding.remedy:
            print(f"{'':21}→ {finding.remedy}", flush=True)
    count = "1 error" if n_errors == 1 else f"{n_errors} errors"
    print(f"\n{count}: training cannot run here" if n_errors else "\ntraining can run here")
    return n_errors


def _install(options: str = "") -> str:
    """Return the command that installs this program and what it requires, from its checkout or from the package index.

    With `--force-reinstall` alone, pip would also install all requirements again, PyTorch in the build of the index.
    """
    root = Path(__file__).parents[1]
    target = f"-e {shlex.quote(str(root))}" if (root / "pyproject.toml").is_file() else DISTRIBUTION
    return f"{sys.executable} -m pip install {options}{target}"


def _python(topic: str) -> Iterator[Finding]:
    from savant_ray.settings.files import shipped_files

    package = Path(__file__).parent
    yield Finding(topic, "ok", f"{platform.python_version()}, {sys.executable}, {platform.machine()}")
    if sys.platform != "linux":
        yield Finding("system", "note", f"{platform.system()}: savant_ray is tested on Linux only")
    if shipped_files():
        yield Finding("savant_ray", "ok", f"{__version__}, {package}")
    else:
        again = _install("--force-reinstall --no-deps ")
        yield Finding("savant_ray", "error", f"{package}: the shipped settings files are missing", again)


def _packages(topic: str) -> Iterator[Finding]:
    """Compare the installed packages with the requirements in the metadata of the installed distribution."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding(topic, "note", f"not checked: {DISTRIBUTION} is used without being installed")
        return
    by_extra: dict[str, list[Requirement]] = {"": []}
    for requirement in map(Requirement, lines):
        by_extra.setdefault(_extra_of(requirement), []).append(requirement)
    needed = by_extra.pop("")
    problems = [problem for requirement in needed if (problem := _problem(requirement))]
    for problem in problems:
        yield Finding(topic, "error", problem, _install())
    if not problems:
        yield Finding(topic, "ok", f"{len(needed)} requirements are installed")
    for extra, requirements in by_extra.items():
        if extra not in NOT_FOR_USERS:
            missing = "; ".join(problem for requirement in requirements if (problem := _problem(requirement)))
            remedy = f"{sys.executable} -m pip install '{DISTRIBUTION}[{extra}]'" if missing else ""
            yield Finding(f"extra {extra}", "note" if missing else "ok", missing or "installed", remedy)


def _extra_of(requirement: Requirement) -> str:
    """Return the extra that a requirement belongs to, "" for those that are always needed."""
    found = re.search(r"extra == ['\"]([\w-]+)['\"]", str(requirement.marker))
    return found[1] if found else ""


def _problem(requirement: Requirement) -> str:
    """Return what is wrong with the installed version of a package, "" if nothing is."""
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement.name} is not installed"
    if requirement.specifier.contains(version, prereleases=True):
        return ""
    return f"{requirement.name} is {version}, needed is {requirement.specifier}"


def _torch(topic: str) -> Iterator[Finding]:
    import torch

    weights = torch.ones(8, 8, requires_grad=True)
    (weights @ weights).sum().backward()
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    yield Finding(topic, "ok", f"{torch.__version__} ({build})")
    yield _gpu()


def _gpu() -> Finding:
    import torch

    from savant_ray.training.device import NO_KERNELS

    if torch.cuda.is_available():
        try:
            torch.ones(8, 8, device="cuda").matmul(torch.ones(8, 8, device="cuda")).sum().item()
        except RuntimeError as error:
            # Its memory is full, another process has it for itself, or this PyTorch has no kernels for it.
            remedy = "nvidia-smi lists the processes that use it"
            if NO_KERNELS in str(error):
                remedy = "install a torch for another version of CUDA: pytorch.org, Get Started"
            return Finding(
                "GPU", "error", describe(error), f"{remedy}; training uses the CPU if CUDA_VISIBLE_DEVICES is empty"
            )
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return Finding("GPU", "ok", ", ".join(f"{d.name} {d.total_memory / 2**30:.0f} GiB" for d in devices))
    if not _has_nvidia_gpu():
        return Finding("GPU", "ok", "none; training uses the CPU")
    if torch.version.cuda is None:
        remedy = "install the CUDA build of torch: the command is on pytorch.org under Get Started"
        return Finding(
            "GPU", "note", "this machine has one, but this torch is a CPU build; training uses the CPU", remedy
        )
    remedy = "update the driver, or install a torch for the CUDA version that nvidia-smi shows"
    return Finding("GPU", "note", "this machine has one, but torch cannot use it; training uses the CPU", remedy)


def _has_nvidia_gpu() -> bool:
    with suppress(OSError, subprocess.SubprocessError):
        listed = subprocess.run(["nvidia-smi", "-L"], check=False, capture_output=True, text=True, timeout=20)
        return listed.returncode == 0 and "GPU" in listed.stdout
    return False


def _processor(topic: str) -> Iterator[Finding]:
    import torch

    from savant_ray.training.device import missing_compiler, supported_precision

    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    _, note = supported_precision("bf16", torch.device("cpu"))
    yield Finding(topic, "ok", f"{n_cores} cores, {'without' if note else 'with'} bf16 instructions")
    if missing := missing_compiler():
        effect = "training runs uncompiled: slower, with the same results up to rounding"
        yield Finding("compiler", "note", f"{missing} not found; {effect}", "sudo apt install g++ python3-dev")
    else:
        yield Finding("compiler", "ok", shutil.which("g++") or shutil.which("clang++") or "")


def _memory(topic: str) -> Iterator[Finding]:
    import psutil

    available = psutil.virtual_memory().available / 1e9
    with suppress(OSError, ValueError, KeyError):  # no such file, or "max"
        limit, current = (
            int(CGROUP_LIMIT.with_name(name).read_text()) for name in (CGROUP_LIMIT.name, "memory.current")
        )
        page_cache = 0  # the kernel frees it for programs
        with suppress(OSError, ValueError, KeyError):  # cannot be read, or names other values
            in_use = dict(line.split() for line in CGROUP_LIMIT.with_name("memory.stat").read_text().splitlines())
            page_cache = int(in_use["active_file"]) + int(in_use["inactive_file"])
        available = min(available, (limit - current + page_cache) / 1e9)
    status: Status = "error" if available < MIN_MEMORY_GB else "note" if available < LOW_MEMORY_GB else "ok"
    remedy = f"end other programs; {LOW_MEMORY_GB:g} GB are enough for Ray and a small model"
    yield Finding(topic, status, f"{available:.1f} GB available", "" if status == "ok" else remedy)
    shared = Path(SHARED_MEMORY)
    if shared.is_dir() and (free := shutil.disk_usage(shared).free / 1e9) < LOW_SHARED_MEMORY_GB:
        remedy = "in a container: --shm-size 2g; elsewhere, remount /dev/shm with a larger size"
        yield Finding(SHARED_MEMORY, "note", f"{free:.2f} GB free; Ray's object store is slower without it", remedy)


def _disk(topic: str) -> Iterator[Finding]:
    from savant_ray.locations import working_directory

    folder = working_directory()
    free = shutil.disk_usage(folder).free / 1e9
    if not os.access(folder, os.W_OK | os.X_OK):
        yield Finding(
            topic, "error", f"{folder} is not writable; runs, text and cache are written there", "cd elsewhere"
        )
    elif free < MIN_FREE_GB:
        yield Finding(topic, "error", f"{folder} has {free:.1f} GB free", "free some space, or cd elsewhere")
    elif free < LOW_FREE_GB:
        remedy = "the full model needs 4 GB for its checkpoints (checkpoint.keep)"
        yield Finding(topic, "note", f"{folder} has {free:.1f} GB free", remedy)
    else:
        yield Finding(topic, "ok", f"{folder} has {free:.0f} GB free")


def _ray(topic: str) -> Iterator[Finding]:
    import ray

    from savant_ray.cluster.ray_address import VARIABLE, cluster_address, unreachable_reason
    from savant_ray.cluster.temp_folder import choose_temp_folder

    yield Finding(topic, "ok", ray.__version__)
    cluster = cluster_address()
    reason = unreachable_reason(cluster.host_port) if cluster is not None else ""
    if cluster is not None and not reason:
        yield Finding("Ray cluster", "ok", f"{cluster.host_port} (from {cluster.origin}) is used")
        return
    if cluster is not None:
        remedy = "ray stop" if cluster.optional else f"start that cluster, or unset {VARIABLE}"
        status: Status = "note" if cluster.optional else "error"
        yield Finding("Ray cluster", status, f"{cluster.host_port} (from {cluster.origin}): {reason}", remedy)
        if not cluster.optional:
            return
    notices: list[str] = []
    variables = dict(os.environ)
    choose_temp_folder(notices.append, variables)
    yield Finding("Ray's files", "note" if notices else "ok", notices[0] if notices else variables["RAY_TMPDIR"])


def _ports(topic: str) -> Iterator[Finding]:
    with socket.socket() as server:  # Ray's processes reach each other by ports that the system chooses
        server.bind(("127.0.0.1", 0))
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("127.0.0.1", DASHBOARD_PORT))
        except OSError:
            yield Finding(topic, "note", f"{DASHBOARD_PORT} is in use; Ray's dashboard gets the next free port")
        else:
            yield Finding(topic, "ok", f"{DASHBOARD_PORT}, of Ray's dashboard, is free")


def _limits(topic: str) -> Iterator[Finding]:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft > LOW_OPEN_FILES:
        yield Finding(topic, "ok", f"{soft:,}" if soft > 0 else "unlimited")
    else:
        remedy = f"ulimit -n {min(65536, hard) if hard > 0 else 65536}"
        yield Finding(topic, "note", f"{soft:,}; a Ray cluster of many nodes needs more", remedy)


CHECKS: dict[str, Callable[[str], Iterator[Finding]]] = {
    "Python": _python,
    "packages": _packages,
    "torch": _torch,
    "processor": _processor,
    "memory": _memory,
    "disk": _disk,
    "Ray": _ray,
    "ports": _ports,
    "open files": _limits,
}
