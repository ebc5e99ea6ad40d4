"""Serves a model: replicas on a local Ray or on a cluster, and an HTTP server in this process."""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray
import uvicorn
from ray import serve
from ray.serve.exceptions import RayServeException

from savant_ray.cluster.session import (
    ExitWithoutShutdown,
    check_ray_processes,
    node_resources,
    owns_ray,
    processes_that_fit,
    ray_session,
    sigterm_raises_interrupt,
)
from savant_ray.command_line import API_KEY_VARIABLE
from savant_ray.errors import CheckpointError, SavantError, SettingsError, error_in_traceback
from savant_ray.evaluation.from_checkpoint import TEXT_FILES, load_model, load_tokenizer
from savant_ray.inference.decoder import Decoder
from savant_ray.inference.engine import Engine
from savant_ray.inference.sampling import Sampling
from savant_ray.locations import absolute_path, parent_and_name
from savant_ray.serving.openai_api import Api, ServerSettings
from savant_ray.storage.object_store import step_name
from savant_ray.storage.run_storage import local_checkpoint

# Of idle connections. Clients and proxies keep them up to 90 s, and would lose a request if this were shorter.
KEEP_ALIVE_SECONDS = 120
CHECK_SECONDS = 0.5  # between checks of Ray's processes
LOOPBACK = re.compile(r"localhost|127(\.\d+){3}|::1")  # hosts that other machines cannot reach


class ModelServer(Engine):
    """A replica. It handles tokens only; `Api` encodes and decodes text in the process of the HTTP server."""

    def __init__(
        self, checkpoint: str, settings: Mapping[str, Mapping[str, Any]], n_loops: int | None, raw_weights: bool
    ) -> None:
        with local_checkpoint(checkpoint, settings=settings) as path:
            model, tokenizer, _ = load_model(path, raw_weights)
        super().__init__(Decoder(model, Sampling.for_tokenizer(tokenizer, 1, 0), n_loops))

    def check_health(self) -> None:
        """Raise an error if decoding has failed, so that Serve replaces the replica."""
        if self.error is not None:
            raise self.error


def run_server(settings: ServerSettings, verbose: bool = False, notify: Callable[[str], None] = print) -> None:
    """Serve a model until SIGINT or SIGTERM.

    Raises:
        SettingsError: `host` is not a loopback address, and there is no API key; or this machine has too few cores or GPUs.
        CheckpointError: there is no checkpoint, or it cannot be read.
        SavantError: the server cannot listen at the address, or a replica cannot be started.
        ExitWithoutShutdown: Ray has failed.
    """
    checkpoint = absolute_path(settings.checkpoint, setting="checkpoint", error=CheckpointError)
    name = settings.name or _run_name(checkpoint)
    # A key that was read from a file may end with a newline, which no request can send.
    api_key = (settings.api_key or os.environ.get(API_KEY_VARIABLE, "")).strip() or None
    settings = replace(settings, name=name, api_key=api_key)
    host, port = settings.host, settings.port
    if settings.api_key is None and not LOOPBACK.fullmatch(host):
        raise SettingsError(
            f"--host {host}: other machines can reach this address, so requests need a key: --api-key KEY, or "
            f"{API_KEY_VARIABLE} in the environment"
        )
    with local_checkpoint(checkpoint, TEXT_FILES, settings.original) as path:
        tokenizer, config = load_tokenizer(path)
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise SavantError(f"--host {host} --port {port}: {error.strerror}") from error
    with listener, ray_session(verbose, notify):
        logging.getLogger("ray.serve").setLevel(logging.INFO if verbose else logging.ERROR)
        smallest, largest = settings.replicas
        needed = {"CPU": 1.0, "GPU": float(min(1, ray.cluster_resources().get("GPU", 0)))}
        _check_room(smallest, needed, notify)
        scaling: dict[str, Any] = {"num_replicas": largest}
        # Only if the number can change: autoscaling costs up to half a core in Ray Serve's controller.
        if smallest < largest:
            target = max(1, settings.max_batch // 2)
            limits = {"min_replicas": smallest, "max_replicas": largest, "target_ongoing_requests": target}
            scaling = {"autoscaling_config": limits}
        deployment: Any = serve.deployment(
            name="model",
            max_ongoing_requests=settings.max_batch,
            ray_actor_options={"num_cpus": needed["CPU"], "num_gpus": needed["GPU"]},
            health_check_period_s=5,
            graceful_shutdown_timeout_s=5,
            **scaling,
        )
        model = deployment(ModelServer).bind(checkpoint, dict(settings.original), settings.loops, settings.raw_weights)
        # Several servers may use a cluster. One that was killed leaves its application there, and its successor replaces it.
        application = f"savant-{socket.gethostname()}-{port}"
        failure: SavantError | None = None
        try:
            with sigterm_raises_interrupt():
                serve.start(proxy_location="Disabled", logging_config={"enable_access_log": False})
                app = Api(_deployed(model, application), tokenizer, config, settings).asgi()
                _print_address(settings, notify)
                # uvicorn would log answers that Ctrl+C cuts off as errors.
                level = "info" if verbose else "critical"
                options = uvicorn.Config(
                    app,
                    log_level=level,
                    access_log=False,
                    timeout_keep_alive=KEEP_ALIVE_SECONDS,
                    timeout_graceful_shutdown=1,
                )
                failure = _run_until_ray_fails(uvicorn.Server(options), listener)
        except KeyboardInterrupt:
            notify("stopping")
        finally:
            if failure is None:
                with suppress(RayServeException):  # Serve has not started
                    serve.delete(application)
        if failure is not None:
            raise ExitWithoutShutdown(error=failure)


def _run_until_ray_fails(server: uvicorn.Server, listener: socket.socket) -> SavantError | None:
    """Run the HTTP server; return an error if a Ray that this process has started fails.

    Otherwise Ray would end this process, after up to a minute in which requests wait.
    """
    failures = list[SavantError]()

    def watch() -> None:
        while not server.should_exit:
            try:
                check_ray_processes()
            except SavantError as error:
                reason = str(error).splitlines()[0]
                failures.append(SavantError(f"{reason}\nRun the same command again to serve the model."))
                server.should_exit = True
            time.sleep(CHECK_SECONDS)

    threading.Thread(target=watch, name="watching Ray", daemon=True).start()
    server.run([listener])
    return failures[0] if failures else None


def _run_name(checkpoint: str) -> str:
    """Return the name of the run folder of a checkpoint, given its absolute path or URI."""
    parent, name = parent_and_name(checkpoint)
    while step_name(name.removesuffix(".pt")):  # a checkpoint, its file, or a file of the original script
        parent, name = parent_and_name(parent)
    return name


def _check_room(n_replicas: int, needed: Mapping[str, float], notify: Callable[[str], None]) -> None:
    """Check that replicas that need these resources fit on the nodes; Ray Serve would wait for them without a message.

    A cluster may grow, and other jobs may end, so there it is only a notice.

    Raises:
        SettingsError: they do not fit on this machine, on which this process has started Ray.
    """
    per_replica = "a core and a GPU" if needed["GPU"] else "a core"
    room = processes_that_fit(node_resources(), needed)
    if room < n_replicas:
        text = f"--replicas {n_replicas}: there is room for {room}, because each replica needs {per_replica}"
        if owns_ray():
            raise SettingsError(text)
        notify(f"{text}; waiting until the cluster has more")
    elif not owns_ray() and processes_that_fit([ray.available_resources()], needed) < n_replicas:
        notify(f"the cluster is busy; waiting until each replica has {per_replica}")


def _deployed(model: Any, application: str) -> Any:
    """Start the replicas and return the handle of the deployment.

    Raises:
        SavantError: a replica could not be started.
    """
    try:
        return serve.run(model, name=application, route_prefix=None)
    except RuntimeError as error:  # its message does not contain the reason
        status = serve.status().applications.get(application)
        messages = [] if status is None else [state.message for state in status.deployments.values() if state.message]
        reason = error_in_traceback(messages[0]) if messages else str(error)
        raise SavantError(f"the server could not be started: {reason}") from error


def _print_address(settings: ServerSettings, notify: Callable[[str], None]) -> None:
    nodes = [node for node in ray.nodes() if node["Alive"]]
    metrics = [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes]
    notify(f"Prometheus finds metrics at {', '.join(metrics)}")
    host = "127.0.0.1" if settings.host == "0.0.0.0" else settings.host  # noqa: S104 - compared, not bound
    url = f"http://{f'[{host}]' if ':' in host else host}:{settings.port}/v1"
    notify(f"{settings.name} is served at {url} (Ctrl+C stops it). For instance:")
    key = " -H 'Authorization: Bearer YOUR_KEY'" if settings.api_key else ""
    body = '{"messages": [{"role": "user", "content": "Hello"}]}'
    notify(f"curl {url}/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'")
