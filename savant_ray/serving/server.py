"""Starts and stops the server: two deployments on a Ray of this machine or on a cluster."""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from savant_ray.cluster.session import prepare_environment, ray_session, rays_sigterm_interrupts
from savant_ray.errors import CheckpointError, SavantError, SettingsError
from savant_ray.locations import absolute_path
from savant_ray.storage.run_storage import check_checkpoint_exists

APP = "savant"
KEY_VARIABLE = "SAVANT_API_KEY"
QUEUE_OF_API = 10_000  # connections; the queue of the model has the limit that users set


@dataclass(frozen=True)
class ServerSettings:
    """The options of `savant serve`."""

    checkpoint: str  # path or URI that all replicas can read
    name: str | None = None  # of the model in requests; None: that of the run folder
    original: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # settings of a file of the original
    loops: int | None = None  # None: those of the model
    max_length: int | None = None  # tokens of prompt and answer; None: `model.max_seq_len` of the run
    replicas: tuple[int, int] = (1, 1)  # smallest and largest number
    max_batch: int = 16  # answers that a replica decodes together
    max_queue: int = 64  # requests that wait
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None  # None: SAVANT_API_KEY of the environment


def run_server(settings: ServerSettings, verbose: bool = False, notify: Callable[[str], None] = print) -> None:
    """Serve a model until SIGINT or SIGTERM.

    Raises:
        SettingsError: other machines could send requests without an API key.
        CheckpointError: there is no checkpoint.
        SavantError: Ray Serve is not installed, or the server cannot be started.
    """
    checkpoint = absolute_path(settings.checkpoint, setting="checkpoint", error=CheckpointError)
    *parents, last = checkpoint.rstrip("/").split("/")
    name = settings.name or (parents[-1] if re.fullmatch(r"step_\d+", last) else last)
    key = settings.api_key or os.environ.get(KEY_VARIABLE) or None
    settings = replace(settings, checkpoint=checkpoint, name=name, api_key=key)
    if key is None and not _is_loopback(settings.host):
        raise SettingsError(
            f"--host {settings.host}: other machines can reach this address, so requests need a key: --api-key KEY, or "
            f"{KEY_VARIABLE} in the environment"
        )
    check_checkpoint_exists(checkpoint)
    prepare_environment()
    try:
        from ray import serve
    except ImportError as error:
        raise SavantError(
            "`savant serve` needs Ray Serve: pip install 'savant-ray[serve]' (in a checkout: make extras)"
        ) from error
    with ray_session(verbose, notify):
        logging.getLogger("ray.serve").setLevel(logging.INFO if verbose else logging.ERROR)
        http = {"host": settings.host, "port": settings.port}
        try:
            with rays_sigterm_interrupts():
                serve.start(proxy_location="HeadOnly", http_options=http, logging_config={"enable_access_log": False})
                serve.run(application(settings), name=APP)
                _print_address(settings, notify)
                threading.Event().wait()
        except KeyboardInterrupt:
            notify("stopping")
        except RuntimeError as error:  # a deployment failed
            raise SavantError(f"the server could not be started: {error}") from error
        finally:
            serve.delete(APP)


def application(settings: ServerSettings) -> Any:
    """Return the Serve application."""
    import ray
    from ray import serve

    from savant_ray.serving.api import Api
    from savant_ray.serving.model_server import ModelServer

    smallest, largest = settings.replicas
    scaling: dict[str, Any] = {"num_replicas": largest}
    if smallest < largest:
        target = max(1, settings.max_batch // 2)
        limits = {"min_replicas": smallest, "max_replicas": largest, "target_ongoing_requests": target}
        scaling = {"autoscaling_config": limits}
    model = serve.deployment(
        name="model",
        max_ongoing_requests=settings.max_batch,
        max_queued_requests=settings.max_queue,
        ray_actor_options={"num_cpus": 1, "num_gpus": min(1, ray.cluster_resources().get("GPU", 0))},
        health_check_period_s=5,
        graceful_shutdown_timeout_s=5,
        **scaling,
    )(ModelServer)
    api = serve.deployment(name="api", max_ongoing_requests=QUEUE_OF_API, ray_actor_options={"num_cpus": 0})(Api)
    replica = model.bind(settings.checkpoint, dict(settings.original), settings.loops, settings.max_length)
    return api.bind(replica, APP, settings.name, settings.api_key)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _print_address(settings: ServerSettings, notify: Callable[[str], None]) -> None:
    import ray

    host = "127.0.0.1" if settings.host == "0.0.0.0" else settings.host  # noqa: S104 - compared, not bound
    url = f"http://{f'[{host}]' if ':' in host else host}:{settings.port}"
    key = "" if settings.api_key is None else " -H 'Authorization: Bearer YOUR_KEY'"
    body = json.dumps({"model": settings.name, "messages": [{"role": "user", "content": "Hello"}]})
    metrics = [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in ray.nodes()]
    notify(f"Prometheus finds metrics at {', '.join(metrics)}")
    notify(f"{settings.name} is served at {url}/v1 (Ctrl+C stops it). For instance:")
    notify(f"curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'")
