"""A run that started Ray itself: if one of Ray's processes is killed, none is left behind and the same command resumes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from savant_ray.storage.lock import locked
from savant_ray.training.checkpoint import newest_checkpoint
from tests.cluster.conftest import ROOT, environment, losses, options, records, started, wait_for

pytestmark = pytest.mark.slow


def start(workplace: Path, **changes: Any) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "jobs/train.py"), *options(checkpoint__every_steps=10, **changes)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    job = subprocess.Popen(command, cwd=workplace, env=environment(), text=True, **pipes)
    started.append(job)
    return job


def killed(workplace: Path, victim: str) -> tuple[int, str, list[psutil.Process]]:
    """Return exit code and output of a run whose `victim` was killed after its first checkpoint, and all its processes.

    All have exited except for Ray's agents, which try for a minute to reach their head.
    """
    run = workplace / "tiny"
    before = newest_checkpoint(run)
    job = start(workplace, training__max_steps=100_000, validation__every_steps=100_000)
    wait_for(lambda: newest_checkpoint(run) != before or job.poll() is not None, 240)
    assert job.poll() is None, job.communicate()[0]
    driver = psutil.Process(job.pid)
    processes = {process: name_of(process) for process in [driver, *driver.children(recursive=True)]}
    (driver if victim == "driver" else next(p for p, name in processes.items() if victim in name)).kill()
    printed, _ = job.communicate(timeout=600)
    wait_for(lambda: not any(process.is_running() for process, name in processes.items() if "Agent" not in name), 30)
    with locked(run):
        return job.returncode, printed, list(processes)


def name_of(process: psutil.Process) -> str:
    try:
        return " ".join([process.name(), *process.cmdline()[:1]])
    except psutil.NoSuchProcess:  # it has exited since it was listed, or is a zombie
        return ""


LEAVING = """
import subprocess, sys
import ray
from savant_ray.cluster.session import exit_without_shutdown
other = subprocess.Popen(["sleep", "100"], stdout=subprocess.DEVNULL)
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
worker = ray.get(ray.remote(lambda: __import__("os").getpid()).remote())
print(other.pid, worker, ray._private.worker._global_node.all_processes["raylet"][0].process.pid, flush=True)
exit_without_shutdown(7)
"""


def test_exit_without_shutdown_kills_the_processes_of_its_own_ray_and_no_others(workplace: Path) -> None:
    path = {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, "-c", LEAVING], cwd=workplace, env=environment(**path), stdout=subprocess.PIPE, text=True
    )
    other, worker, raylet = (int(pid) for pid in done.stdout.split())
    assert done.returncode == 7
    wait_for(lambda: not psutil.pid_exists(worker) and not psutil.pid_exists(raylet), 20)
    psutil.Process(other).kill()


@pytest.mark.rare
@pytest.mark.parametrize(
    ("victims", "resumes"),
    [(("raylet",), False), (("Bridge", "driver"), True)],
    ids=["raylet", "Bridge then driver"],
)
def test_a_killed_process_of_its_own_ray_is_reported_and_the_same_command_resumes(
    victims: tuple[str, ...], resumes: bool, workplace: Path
) -> None:
    processes: list[psutil.Process] = []
    for victim in victims:
        code, printed, of_this = killed(workplace, victim)
        processes += of_this
        if victim == "driver":
            assert code == -9
            continue
        assert code == 1 and printed.count("error: ") == 1 and "Traceback" not in printed, printed
        message = printed[printed.index("error: ") :]
        assert "Ray failed: " in message and "killed" in message and "Run the same command again" in message, printed

    newest = newest_checkpoint(workplace / "tiny")
    assert newest is not None
    if not resumes:
        return
    job = start(workplace, training__max_steps=int(newest.name.removeprefix("step_")) + 3)
    printed, _ = job.communicate(timeout=600)
    assert job.returncode == 0 and f"resuming from {newest}" in printed, printed
    assert len(records(workplace / "tiny", "attempt")) == len(victims) + 1
    assert len(losses(workplace / "tiny")) == int(newest.name[5:]) + 3
    wait_for(lambda: not any(process.is_running() for process in processes), 90)
