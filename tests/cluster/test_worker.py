"""What a worker makes of a GPU that is too small for the model; everything around it is a fake."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from savant_ray.cluster import worker
from savant_ray.errors import MemoryCapError
from savant_ray.events import Event, RunFailed
from tests.training.tiny import CPU, tiny_config


class FakeHost:
    rank = 0

    def __init__(self, events: list[Event]) -> None:
        self._events = events

    def emit(self, event: Event, wait: bool = False) -> None:
        self._events.append(event)

    def finish_saving(self) -> None:
        """Nothing was begun."""


def test_a_model_that_does_not_fit_ends_the_run_with_exit_code_5_and_what_to_lower(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[Event] = []

    def no_room(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    fakes = {
        "ray": SimpleNamespace(get=lambda reference: False),
        "Tokenizer": SimpleNamespace(load=lambda path: None),
        "run_storage": lambda config, owner: None,
        "RayHost": lambda *_: FakeHost(events),
        "get_device": lambda: CPU,
        "new_state": no_room,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(worker, name, fake)
    bridge = SimpleNamespace(has_failed=SimpleNamespace(remote=lambda: None))
    with pytest.raises(MemoryCapError):
        worker.train_worker(
            {
                "config": tiny_config().to_dict(),
                "tokenizer": "",
                "validation": "",
                "data_fingerprint": "",
                "allow_changes": False,
                "bridge": bridge,
            }
        )
    (failed,) = (event for event in events if isinstance(event, RunFailed))
    assert failed.exit_code == 5 and "training.vram_limit_gb = 10" in failed.text and "lower model.dim" in failed.text
