"""The training function of a worker, called in this process; fakes of Ray's functions stand for Ray Train and the driver."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.train
import ray.train.torch

from savant_ray.data.stream import StepStream
from savant_ray.events import Event
from savant_ray.worker.training_function import train_worker
from tests.training.tiny import CPU


class DriverActor:
    """Stands for the handle of the driver's actor: each method can be called, and events among the arguments are kept."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=self._keep_events)

    def _keep_events(self, *arguments: Any) -> None:
        self.events += [argument for argument in arguments if isinstance(argument, Event)]


@contextmanager
def fakes_of_ray(stream: StepStream | None, rank: int, world_size: int) -> Iterator[None]:
    """Replace what a worker calls of Ray, without a GPU; the driver answers only calls of this thread."""
    thread = threading.current_thread()

    def answer(_: Any) -> None:
        if threading.current_thread() is not thread:
            threading.Event().wait()  # the thread ends with this process

    train_context = SimpleNamespace(get_world_rank=lambda: rank, get_world_size=lambda: world_size)
    ids = SimpleNamespace(get_actor_id=lambda: "actor", get_node_id=lambda: "node")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "get", answer)
        patch.setattr(ray, "get_runtime_context", lambda: ids)
        patch.setattr(ray.train, "get_context", lambda: train_context)
        patch.setattr(ray.train, "get_dataset_shard", lambda name: stream)
        patch.setattr(ray.train.torch, "get_device", lambda: CPU)
        yield


def run_worker(
    settings: dict[str, Any],
    tokenizer: str,
    stream: StepStream | None = None,
    rank: int = 0,
    world_size: int = 1,
    **task: Any,
) -> tuple[list[Event], Exception | None]:
    """Return the events that a worker sends to the driver, and the error that it raises.

    A worker that has built the model and announced the attempt reports an error, because there is no validation text.
    """
    driver = DriverActor()
    driver_task = {
        "config": settings,
        "tokenizer": tokenizer,
        "validation": "/no/validation/text",
        "data_fingerprint": "",
        "allow_changes": False,
        "bridge": driver,
    }
    with fakes_of_ray(stream, rank, world_size):
        try:
            train_worker(driver_task | task)
        except Exception as error:
            return driver.events, error
    return driver.events, None
