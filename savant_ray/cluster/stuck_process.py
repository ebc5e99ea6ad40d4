"""Finds out what a process that makes no progress is doing, and kills it, on any node."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

STACK_SECONDS = 10.0  # to read the stack of a process
END_SECONDS = 10.0  # until a killed process has ended
TASK_SECONDS = 30.0 + STACK_SECONDS + END_SECONDS  # of the task on another node, where a Python process starts first
_PR_SET_PTRACER, _PR_SET_PTRACER_ANY = 0x59616D61, ctypes.c_ulong(-1)  # of prctl(2)


@dataclass(frozen=True)
class KilledProcess:
    """State and Python stack of a process before it was killed, or before killing it failed."""

    state: str  # as `ps` calls it: "stopped", "sleeping", "running", "disk-sleep"
    stack: str  # of all threads, as py-spy prints it; "" if it could not be read
    note: str  # why there is no stack
    not_killed: str = ""  # why the process could not be killed


def allow_stack_dumps() -> None:
    """Allow other processes of this user to read this process's stack: Yama (Ubuntu's default) permits only parents."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)  # without Yama it has no effect


def kill_process(pid: int, started: float, node_id: str) -> KilledProcess | None:
    """Read the stack of a process and kill it; `started` is when it was started, in seconds since the epoch.

    Returns None if its node does not answer.

    Raises:
        ProcessLookupError: it does not exist any more.
    """
    if node_id == ray.get_runtime_context().get_node_id():  # also works if this node's raylet is stuck
        return kill_local_process(pid, started)
    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    task: Any = ray.remote(num_cpus=0, max_retries=0)(kill_local_process)
    call = task.options(scheduling_strategy=strategy).remote(pid, started)
    ready, _ = ray.wait([call], timeout=TASK_SECONDS)
    try:
        return ray.get(call) if ready else None
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError:  # the node is gone
        return None


def kill_local_process(pid: int, started: float) -> KilledProcess:
    """Do what `kill_process` does for a process on this machine.

    Raises:
        ProcessLookupError: it does not exist any more.
    """
    state, stack, note = "not accessible", "", "not permitted"
    try:
        process = psutil.Process(pid)
        if abs(process.create_time() - started) > 60:  # a change of the system's clock moves it by seconds
            raise ProcessLookupError(f"process {pid} is another one now")
        state, (stack, note) = str(process.status()), _stack(pid)
        process.kill()
    except psutil.NoSuchProcess as error:
        raise ProcessLookupError(str(error)) from error
    except psutil.AccessDenied:
        return KilledProcess(state, stack, note, "not permitted")
    with suppress(psutil.Error):
        process.wait(END_SECONDS)
    return KilledProcess(state, stack, note)


def _stack(pid: int) -> tuple[str, str]:
    """Return the Python stack of a process, or "" and the reason. It may be stopped, or hold the interpreter lock."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    py_spy = shutil.which("py-spy", path=path)  # ray[default] installs it
    if py_spy is None:
        return "", "py-spy is not installed"
    # Otherwise py-spy would stop the process while it reads, which fails for one that is stopped already.
    command = [py_spy, "dump", "--nonblocking", "--pid", str(pid)]
    note, deadline = "", time.monotonic() + STACK_SECONDS
    for _ in range(3):  # a running thread may change its stack while it is read
        left = deadline - time.monotonic()
        if left <= 0:
            break
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=left, check=False)
        except (OSError, subprocess.SubprocessError) as error:
            return "", f"py-spy: {error}"
        if done.returncode == 0 and "Thread " in done.stdout:
            return done.stdout.strip(), ""
        note = next((line.strip() for line in done.stderr.splitlines() if line.strip()), "no output")
        time.sleep(0.1)
    return "", f"py-spy: {note}"


def training_thread(stack: str) -> list[str]:
    """Return the frames of the training thread in a stack of `KilledProcess`, the innermost first."""
    lines = stack.splitlines()
    start = next(
        (i for i, line in enumerate(lines) if line.startswith("Thread ") and "TrainingThread" in line), len(lines)
    )
    return [line.strip() for line in takewhile(lambda line: line.startswith("    "), lines[start + 1 :])]
