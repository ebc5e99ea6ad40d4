"""How a worker ends if its device is too small for the model; everything else is a fake."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from savant_ray.config import Config
from savant_ray.errors import DataError, MemoryCapError, UnexpectedError
from savant_ray.events import Event, RunFailed
from savant_ray.worker import training_function as worker
from tests.training.tiny import CPU, tiny_config


class FakeConnection:
    rank = 0

    def __init__(self, events: list[Event]) -> None:
        self._events = events

    def emit(self, event: Event, wait: bool = False) -> None:
        self._events.append(event)


def no_room(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def run_worker(
    monkeypatch: pytest.MonkeyPatch,
    expected: type[Exception],
    task: dict[str, Any] | None = None,
    **fakes_of_test: Any,
) -> list[Event]:
    """Return the events of a worker that ends with the `expected` error; `task` replaces fields of the driver's."""
    events: list[Event] = []
    train = SimpleNamespace(get_dataset_shard=lambda name: SimpleNamespace(plan=None))
    fakes = {
        "ray": SimpleNamespace(get=lambda reference: False, train=train),
        "Tokenizer": SimpleNamespace(load=lambda *_: None),
        "run_storage": lambda *_: None,
        "DriverConnection": lambda *_: FakeConnection(events),
        "get_device": lambda: CPU,
    }
    for name, fake in (fakes | fakes_of_test).items():
        monkeypatch.setattr(worker, name, fake)
    bridge = SimpleNamespace(has_failed=SimpleNamespace(remote=lambda: None))
    with pytest.raises(expected):
        worker.train_worker(
            {
                "config": tiny_config().to_dict(),
                "tokenizer": "",
                "validation": "",
                "data_fingerprint": "",
                "allow_changes": False,
                "bridge": bridge,
                **(task or {}),
            }
        )
    return events


def test_a_model_that_does_not_fit_ends_the_run_with_exit_code_5_and_advice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events = run_worker(monkeypatch, MemoryCapError, new_state=no_room)
    (failed,) = (event for event in events if isinstance(event, RunFailed))
    assert failed.exit_code == 5 and "training.vram_limit_gb = 10" in failed.text and "lower model.dim" in failed.text


def test_running_out_of_memory_elsewhere_is_not_reported_as_a_model_that_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events = run_worker(monkeypatch, UnexpectedError, load_newest=no_room)
    assert not any(isinstance(event, RunFailed) for event in events), "Ray Train restarts the worker"


@pytest.mark.parametrize("name", ["Tokenizer", "run_storage"])
def test_an_error_for_the_user_in_the_start_of_a_worker_is_sent_to_the_driver(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any) -> None:
        raise DataError("tokenizer.json does not exist on this node")

    fake = SimpleNamespace(load=missing) if name == "Tokenizer" else missing
    (failed,) = run_worker(monkeypatch, DataError, **{name: fake})
    assert isinstance(failed, RunFailed) and failed.exit_code == DataError.exit_code
    assert failed.text == "tokenizer.json does not exist on this node"


def test_workers_do_not_validate_again_the_settings_that_the_driver_has_validated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = tiny_config().to_dict()
    settings["training"]["max_steps"] = 0  # refused by a validation
    events = run_worker(monkeypatch, MemoryCapError, task={"config": settings}, new_state=no_room)
    assert any(isinstance(event, RunFailed) for event in events), "the worker got as far as building the model"


@pytest.mark.parametrize(
    ("world_size", "note"),
    [
        (1, None),
        (3, None),
        (5, "2 of 5 workers have nothing to compute: a step has 3 micro-batches of 4 sequences, which are not divided"),
    ],
)
def test_workers_without_a_micro_batch_are_counted_in_a_notice(world_size: int, note: str | None) -> None:
    config = Config.from_dict({"training": {"batch_size": 5, "accumulation": 2}})
    found = worker.idle_workers(config, 4, world_size)
    assert found is None if note is None else (found or "").startswith(note)
