"""Connects to Ray: a cluster that is there (RAY_ADDRESS, `ray job submit`), else a local one."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from savant_ray.cluster.ray_address import ClusterAddress, cluster_address, refuse_silent, why_silent
from savant_ray.cluster.ray_job import in_ray_job
from savant_ray.cluster.temp_folder import choose_temp_folder, ray_temp_folder
from savant_ray.config import Config
from savant_ray.errors import SavantError, TrainingError
from savant_ray.locations import replace_missing_home
from savant_ray.ray_internals import draining_nodes, started_head

# Read by Ray when it is imported or started, so they are set before that; what the user has set stays.
ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # also the least time between two report() calls, 2 s by default
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",  # how long an elastic run waits for a node that is gone; 60 by default
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",  # how soon workers hear of a drained node; 5 by default
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else each worker's print appears twice
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # attempts and workers at the dashboard's /api/train/v2/runs/v1
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # workers stay in the folder of the driver
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_task_events_max_num_tasks_in_gcs": "10000",  # its 100,000 by default take 0.3 GB of a head that runs for days
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
SHARE_OF_WAIT = 0.7  # for the step; the rest is for saving it and for leaving
VITAL = ("raylet", "gcs_server")  # of Ray's processes; it lives without a dashboard
JOB_STOP_WAIT, JOB_STOP_WAIT_DEFAULT = "RAY_JOB_STOP_WAIT_TIME_S", 3.0


def prepare_environment() -> ClusterAddress | None:
    """Set what Ray reads from the environment; call before `import ray`.

    Returns:
        The cluster to connect to, None if Ray is to be started on this machine.

    Raises:
        SavantError: RAY_ADDRESS is not an address to connect to.
    """
    replace_missing_home()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    cluster = cluster_address()
    if cluster is None or (cluster.optional and why_silent(cluster.text)):
        # A Ray of our own is bound to this machine: there is no token to hand out.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    return cluster


@contextmanager
def ray_session(verbose: bool = False, say: Callable[[str], None] = print) -> Iterator[str]:
    """Ray for the time of a `with` block, which gets the dashboard's address, "" if there is none.

    `verbose`: with what Ray and the workers' processes say. `say` is given what the user should know about how Ray was
    started.

    Raises:
        SavantError: the cluster does not answer or runs other code, or Ray cannot be started on this machine.
    """
    cluster = prepare_environment()
    import ray

    from savant_ray.cluster.same_code import job_config, refuse_other_code

    level = logging.INFO if verbose else logging.ERROR
    logging.getLogger("ray").setLevel(level)
    if cluster is not None:
        try:
            refuse_silent(cluster)
        except SavantError as error:
            if not cluster.optional:
                raise
            say(f"starting Ray on this machine: {str(error).splitlines()[0]} (`ray stop` removes that file)")
            cluster = None
    if cluster is None:
        choose_temp_folder(say)
    address = "local" if cluster is None else cluster.text
    with start_errors_explained(cluster), hangups_blocked():
        context = ray.init(
            address, job_config=job_config(), log_to_driver=verbose, logging_level=level, configure_logging=True
        )
    if is_our_own():  # nobody drains it: its watcher would be one more process that imports for 3 s
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    for name in ("ray", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(level)
    try:
        if cluster is not None:
            refuse_other_code()
        yield f"http://{context.dashboard_url}" if context.dashboard_url else ""
    except (KeyboardInterrupt, Leave):  # see leave_at_once
        raise
    except BaseException:
        ray.shutdown()
        raise
    ray.shutdown()


@contextmanager
def start_errors_explained(cluster: ClusterAddress | None) -> Iterator[None]:
    """Turn what `ray.init()` raises, which is of any type, into a `SavantError` that says what to do."""
    try:
        yield
    except SystemExit as end:  # by Ray's own handler of SIGTERM, until the caller installs its handler again
        raise KeyboardInterrupt from end
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        if cluster is not None:
            what_to_do = f"The address comes from {cluster.origin}."
        elif "authentication token" in text or "RAY_AUTH_TOKEN" in text:
            what_to_do = "A Ray of this machine alone needs no token: unset RAY_AUTH_MODE."
        else:
            what_to_do = (
                "If this machine is very busy or short of memory, run the same command again when it is not. Ray's own "
                f"logs are in {Path(ray_temp_folder(), 'ray/session_latest/logs')}."
            )
        done = "started on this machine" if cluster is None else f"reached at {cluster.text}"
        raise SavantError(f"Ray could not be {done}: {text}\n{what_to_do}") from error


@contextmanager
def hangups_blocked() -> Iterator[None]:
    """Start processes that a closing terminal does not end: they inherit the mask, as Ray does it with SIGINT.

    The calling process misses nothing, since its other threads still take SIGHUP for its handler.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def is_our_own() -> bool:
    """Whether this process started the cluster that it is connected to."""
    return started_head() is not None


def refuse_dead_ray() -> None:
    """Ray ends the driver of a cluster whose head has died some seconds later, without a word; this is the word.

    Raises:
        TrainingError: the scheduler or the head of the Ray that this process started for itself is gone.
    """
    head = started_head()
    if head is None:
        return
    dead = [name for name, _ in head.dead_processes() if name in VITAL]
    if dead:
        raise TrainingError(
            f"Ray failed: its {' and '.join(dead)} on this machine was killed, or ran out of memory.\n"
            "Run the same command again to go on from the last checkpoint."
        )


def _own_processes() -> list[psutil.Process]:
    """Those of the Ray that this process started for itself: what it started and what that started (workers, agents)."""
    head = started_head()
    started = [] if head is None else [info.process.pid for infos in head.all_processes.values() for info in infos]
    processes: list[psutil.Process] = []
    for pid in started:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            processes += [*process.children(recursive=True), process]
    return processes


class Leave(BaseException):
    """`fit()` has not returned, and nobody waits for it: the process reports `error` and ends, by `leave_at_once`."""

    def __init__(self, code: int = 0, error: Exception | None = None) -> None:
        super().__init__(code, error)
        self.code, self.error = code, error


def leave_at_once(code: int) -> int:
    """End this process with `code` if it is connected to Ray, else return it.

    A thread may be inside `fit()`, and Ray crashes when it is shut down under it (seen: exit by SIGSEGV). A cluster ends
    the workers of a driver that is gone; the processes of one that this process started for itself are killed here,
    and no others.
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


def grace_seconds(config: Config, environment: Mapping[str, str] = os.environ) -> float:
    """How long a stop may take: `run.grace_seconds`, but `ray job stop` kills a job after a time of its own."""
    if not in_ray_job(environment):
        return config.run.grace_seconds
    wait = float(environment.get(JOB_STOP_WAIT, JOB_STOP_WAIT_DEFAULT))
    return min(config.run.grace_seconds, SHARE_OF_WAIT * wait)


def node_resources() -> list[dict[str, float]]:
    """What each node has, those left out that are gone or about to be taken away; Ray must be running."""
    import ray

    leaving = draining_nodes()
    return [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
