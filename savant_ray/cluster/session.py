"""Connects to a running Ray cluster (RAY_ADDRESS, `ray job submit`, `ray start`), or starts Ray on this machine."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import psutil

from savant_ray.cluster.ray_address import ClusterAddress, check_cluster_answers, cluster_address, unreachable_reason
from savant_ray.cluster.temp_folder import choose_temp_folder, ray_temp_folder
from savant_ray.errors import SavantError, TrainingError
from savant_ray.locations import replace_missing_home
from savant_ray.ray_internals import detected_cores, draining_nodes, processes_in_own_groups, started_head

# Ray reads these when it is imported or started, so they are set earlier. Variables that the user has set are kept.
ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # also the shortest time between two report() calls; 2 s by default
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",  # how long an elastic run waits for a lost node; 60 by default
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",  # how soon workers detect a drained node; 5 by default
    # How long a worker may not answer Ray Train; 600 by default. `scaling.hang_seconds` is shorter and gives a reason.
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "1800",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # otherwise each print of a worker appears twice
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # attempts and workers at the dashboard's /api/train/v2/runs/v1
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # workers keep the working directory of the driver
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # processes without GPUs in Ray keep CUDA_VISIBLE_DEVICES; Ray 2.60's default
    "RAY_task_events_max_num_tasks_in_gcs": "10000",  # the default of 100,000 takes 0.3 GB on a head that runs for days
    # By default Ray ends idle workers as soon as there are more processes than cores, as in any run on 2 cores. Each read of
    # Ray Data then starts a Python process (about 1 s of processor time) and leaves an open socket in Ray's gcs_server.
    "RAY_num_workers_soft_limit": str(max(16, os.cpu_count() or 1)),
    "RAY_DEDUP_LOGS": "0",  # print lines of all workers, even if they are the same
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",  # of the package tokenizers, not of Ray: one core per process
}
REQUIRED_PROCESSES = ("raylet", "gcs_server")  # Ray continues if other processes die, such as the dashboard
REQUIRED_ACTORS = ("Bridge", "TrainController")
STOPPED_SECONDS = 20.0  # Ray ends the driver without a message if the head does not answer for a minute


def prepare_environment() -> ClusterAddress | None:
    """Set the environment variables that Ray reads; to be called before `import ray`.

    Returns:
        the cluster to connect to, None if Ray is to be started on this machine. An `optional` cluster may not answer; Ray is
        started on this machine then, too.

    Raises:
        SavantError: RAY_ADDRESS is not an address to connect to.
    """
    replace_missing_home()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"  # other programs may have to disable it; this one does not run without it
    cluster = cluster_address()
    if cluster is None or (cluster.optional and unreachable_reason(cluster.host_port)):
        # Under `uv run` Ray would pack the working directory, up to 512 MiB, and start each worker by `uv run` in a copy of
        # it. On this machine the workers run in the environment of this process.
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        # A Ray that this process starts accepts connections from this machine only, so it needs no token.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    return cluster


@contextmanager
def ray_session(verbose: bool = False, notify: Callable[[str], None] = print) -> Iterator[str]:
    """Connect to Ray for a `with` block, and yield the URL of the dashboard, "" without one.

    With `verbose`, the output of Ray and of its workers is printed. `notify` prints notices about how Ray is started.

    Raises:
        SavantError: the cluster does not respond, a node has another version of this package, or Ray cannot be started.
    """
    cluster = prepare_environment()
    import ray

    from savant_ray.cluster.same_code import job_config, refuse_other_code

    level = logging.INFO if verbose else logging.ERROR
    logging.getLogger("ray").setLevel(level)
    if cluster is not None:
        try:
            check_cluster_answers(cluster)
        except SavantError as error:
            if not cluster.optional:
                raise
            notify(f"starting Ray on this machine: {str(error).splitlines()[0]} (`ray stop` removes that file)")
            cluster = None
    if cluster is None:
        choose_temp_folder(notify)
    address = "local" if cluster is None else cluster.host_port
    with start_errors_explained(cluster), block_notices(), processes_in_own_groups():
        context = ray.init(
            address,
            num_cpus=usable_cores() if cluster is None else None,
            job_config=job_config(),
            log_to_driver=verbose,
            logging_level=level,
            configure_logging=True,
        )
    try:
        with sigterm_raises_interrupt():
            if owns_ray():
                # The only node is never drained, and Ray's preemption watcher takes 3 s to start.
                os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
                suspend_ray_with_this_process()
            for name in ("ray", "ray.data", "ray.train"):
                logging.getLogger(name).setLevel(level)
            if cluster is not None:
                refuse_other_code()
            yield f"http://{context.dashboard_url}" if context.dashboard_url else ""
    except (KeyboardInterrupt, ExitWithoutShutdown):  # the process ends; `fit()` may still run
        raise
    except BaseException:
        ray.shutdown()
        raise
    ray.shutdown()


@contextmanager
def start_errors_explained(cluster: ClusterAddress | None) -> Iterator[None]:
    """Turn an error of `ray.init()`, which may be of any type, into a `SavantError` with advice."""
    try:
        with sigterm_raises_interrupt():
            yield
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        if cluster is not None:
            advice = f"The address comes from {cluster.origin}; RAY_ADDRESS=local starts Ray on this machine instead."
        elif "authentication token" in text or "RAY_AUTH_TOKEN" in text:
            advice = "Ray on this machine alone needs no token: unset RAY_AUTH_MODE."
        else:
            advice = (
                "If this machine is very busy or short of memory, run the same command again when it is not. Ray's own "
                f"logs are in {Path(ray_temp_folder(), 'ray/session_latest/logs')}."
            )
        action = "started on this machine" if cluster is None else f"reached at {cluster.host_port}"
        raise SavantError(f"Ray could not be {action}: {text}\n{advice}") from error


@contextmanager
def block_notices() -> Iterator[None]:
    """Block SIGHUP and SIGUSR1 in the processes that are started in the `with` block.

    A closed terminal sends SIGHUP, and Slurm sends SIGUSR1, to all processes of a job. Child processes inherit the signal
    mask of the thread that starts them; Ray uses the same method for SIGINT. Only the calling thread blocks the signals, so
    this process still handles them, in another of its threads.
    """
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)


def suspend_ray_with_this_process() -> None:
    """Let Ctrl+Z suspend the Ray that this process started, too, whose processes are not in the terminal's process group."""

    def suspend(_signal: int, _frame: FrameType | None) -> None:
        processes = _own_processes()
        for process in processes:
            with suppress(psutil.Error):
                process.suspend()
        os.kill(os.getpid(), signal.SIGSTOP)  # until `fg` or `bg`
        for process in processes:
            with suppress(psutil.Error):
                process.resume()

    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTSTP) == signal.SIG_DFL:
        signal.signal(signal.SIGTSTP, suspend)


@contextmanager
def sigterm_raises_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt for a SIGTERM that Ray's own handler receives, as `AttemptPhase` does.

    `ray.init()` installs a handler that raises SystemExit, and the driver installs its own again only after it.
    """
    try:
        yield
    except SystemExit as end:
        if end.code == signal.SIGTERM:
            raise KeyboardInterrupt from None
        raise


def usable_cores() -> int:
    """Return the number of cores for a Ray that is started on this machine, at least 1.

    Ray counts the cores of the machine or container, 0 if the container has less than one. A scheduler such as Slurm, or
    `taskset`, may leave this process fewer, and threads for the others would slow down its workers.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else sys.maxsize
    return max(1, min(allowed, detected_cores()))


def owns_ray() -> bool:
    """Return whether this process started the cluster that it is connected to."""
    return started_head() is not None


def check_ray_processes() -> None:
    """Check the processes of a Ray that this process started.

    Seconds after one of them has died, Ray ends the driver without a message.

    Raises:
        TrainingError: the raylet or the head is gone, or is stopped (SIGSTOP) and does not continue.
    """
    head = started_head()
    if head is None:
        return
    dead = [name for name, _ in head.dead_processes() if name in REQUIRED_PROCESSES]
    if dead:
        raise TrainingError(
            f"Ray failed: its {' and '.join(dead)} on this machine was killed, or ran out of memory.\n"
            "Run the same command again to resume from the last checkpoint."
        )
    infos = ((name, head.all_processes.get(name, ())) for name in REQUIRED_PROCESSES)
    _raise_if_stopped({info.process.pid: name for name, started in infos for info in started})


def check_ray_actors(all_of_them: bool = False) -> None:
    """Check the actors without which training cannot go on, in a Ray that this process started; takes milliseconds.

    With `all_of_them`, check all processes of actors and tasks: starting workers depends on many of them.

    Raises:
        TrainingError: one of them is stopped (SIGSTOP) and does not continue.
    """
    actors: dict[int, str] = {}
    for process in _own_processes():
        with suppress(psutil.Error):
            title = " ".join(process.cmdline()[:1])  # ray::TrainController.run
            if title.startswith("ray::" if all_of_them else tuple(f"ray::{name}" for name in REQUIRED_ACTORS)):
                actors[process.pid] = title
    _raise_if_stopped(actors)


def _raise_if_stopped(processes: Mapping[int, str]) -> None:
    """Wait up to `STOPPED_SECONDS` until none of the processes, names by pid, is stopped.

    Raises:
        TrainingError: one of them does not continue.
    """
    waited = 0.0  # not by the clock, which runs on while Ctrl+Z suspends this process and Ray
    while stopped := {pid: name for pid, name in processes.items() if _is_stopped(pid)}:
        if waited > STOPPED_SECONDS:
            named = " and ".join(f"{name} (pid {pid})" for pid, name in stopped.items())
            raise TrainingError(
                f"Ray failed: {named} on this machine is stopped (by SIGSTOP, a debugger or job control).\n"
                "Run the same command again to resume from the last checkpoint."
            )
        time.sleep(0.1)
        waited += 0.1


def _is_stopped(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP))
    except psutil.NoSuchProcess:
        return False


def _own_processes() -> list[psutil.Process]:
    """Return the processes of a Ray that this process started, with their children (workers, agents)."""
    head = started_head()
    pids = [] if head is None else [info.process.pid for infos in head.all_processes.values() for info in infos]
    processes: list[psutil.Process] = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            processes += [*process.children(recursive=True), process]
    return processes


class ExitWithoutShutdown(BaseException):
    """Raised to end an attempt while `fit()` may still run; Ray must not be shut down then.

    The process that catches it prints `error` if there is one, and calls `exit_without_shutdown` with the exit code.
    """

    def __init__(self, code: int = 0, error: Exception | None = None) -> None:
        super().__init__(code, error)
        self.code, self.error = code, error


def exit_without_shutdown(code: int) -> int:
    """End this process with `code` if it is connected to Ray, else return it.

    A thread may still run `fit()`, and Ray crashes if it is shut down during it (observed: SIGSEGV). A cluster ends the
    workers of a driver that has exited. If this process started Ray, this function kills Ray's processes, and no others.
    """
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return code
    for process in _own_processes():
        with suppress(psutil.NoSuchProcess):
            process.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def node_resources() -> list[dict[str, float]]:
    """Return the resources of each node that is alive and not being drained. Ray must be running."""
    import ray

    draining = draining_nodes()
    return [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]


def processes_that_fit(nodes: Sequence[Mapping[str, float]], resources: Mapping[str, float]) -> int:
    """Return how many processes with these `resources` each fit on the nodes if nothing else runs there."""
    required = {name: units for name, amount in resources.items() if (units := _resource_units(amount)) > 0}
    if not required:
        return sys.maxsize
    return sum(min(_resource_units(node.get(name, 0)) // units for name, units in required.items()) for node in nodes)


def _resource_units(amount: float) -> int:
    """Return an amount of a resource in Ray's units of 0.0001: in floating point, 0.2 fits only 4 times into 1."""
    return round(amount * 10_000)


def resources_text(resources: Mapping[str, float]) -> str:
    """Return resources as they are written in settings: {CPU: 2, GPU: 1}."""
    return "{" + ", ".join(f"{name}: {amount:g}" for name, amount in resources.items()) + "}"
