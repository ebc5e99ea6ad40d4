"""What a worker reports to the driver before it trains, and with which errors it ends the run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from savant_ray.config import Config
from savant_ray.data.stream import StepStream
from savant_ray.data.tokenizer import Tokenizer
from savant_ray.errors import DataError, MemoryCapError, SavantError, SettingsError, UnexpectedError
from savant_ray.events import AttemptStarted, Event, RunFailed, RunResumed
from tests.data.conftest import byte_tokenizer  # noqa: F401 - a fixture
from tests.recorded_runs import tiny_plan, tiny_run_config, train_recorded
from tests.worker.without_ray import run_worker


@dataclass(frozen=True)
class Workplace:
    """A folder with a tokenizer and a tokenized text."""

    folder: Path
    tokenizer: Tokenizer

    @property
    def tokenizer_file(self) -> str:
        return str(self.folder / "tokenizer.json")

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def config(self, storage_path: str | None = None, **training: Any) -> Config:
        settings = tiny_run_config(**training).to_dict()
        settings["run"] |= {"storage_path": storage_path or str(self.folder), "name": "run"}
        return Config.from_dict(settings)

    def events(self, config: Config, world_size: int = 1, **task: Any) -> tuple[list[Event], Exception | None]:
        """Return the events of a worker of rank 0 and the error that ends it; `task` replaces what the driver sends."""
        plan = tiny_plan(self.tokenizer, self.folder / "cache", config)
        stream = StepStream(plan, rank=0, world_size=world_size, in_process=True)
        given = {"settings": config.to_dict(), "tokenizer": self.tokenizer_file, "stream": stream} | task
        return run_worker(world_size=world_size, **given)


@pytest.fixture
def workplace(byte_tokenizer: Tokenizer, tmp_path: Path) -> Workplace:  # noqa: F811
    for name, content in byte_tokenizer.files().items():
        (tmp_path / name).write_text(content)
    return Workplace(tmp_path, byte_tokenizer)


def no_room(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def of_type(events: list[Event], kind: type[Event]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def test_a_model_that_does_not_fit_ends_the_run_with_exit_code_5_and_advice(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.Module, "to", no_room)
    events, error = workplace.events(workplace.config())
    (failed,) = events
    assert isinstance(failed, RunFailed) and failed.error == MemoryCapError.__name__ and error is None
    assert failed.exit_code == 5 and "training.vram_limit_gb = 10" in failed.text and "lower model.dim" in failed.text


def test_running_out_of_memory_elsewhere_is_not_reported_as_a_model_that_does_not_fit(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = workplace.config()
    train_recorded(workplace.run, config, tiny_plan(workplace.tokenizer, workplace.folder / "cache", config), stop_at=4)
    events, _ = workplace.events(config)
    assert [event.step for event in of_type(events, RunResumed)] == [4], "the checkpoint is read"

    load = torch.load

    def load_and_fill_the_device(*arguments: Any, **options: Any) -> Any:
        content = load(*arguments, **options)
        monkeypatch.setattr(torch.Tensor, "to", no_room)
        return content

    monkeypatch.setattr(torch, "load", load_and_fill_the_device)
    events, error = workplace.events(config)
    assert not events and isinstance(error, UnexpectedError), "Ray Train restarts the worker"
    assert "Tried to allocate" in str(error)


@pytest.mark.parametrize(
    ("absent", "kind"),
    [
        ({"tokenizer": "/absent/tokenizer.json"}, DataError),
        ({"storage_path": "gopher://absent/runs"}, SettingsError),
        ({"validation": "/absent/cache"}, DataError),
    ],
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_an_error_for_the_user_is_sent_to_the_driver_and_ends_the_other_workers(
    world_size: int, absent: dict[str, str], kind: type[SavantError], workplace: Workplace
) -> None:
    config = workplace.config(absent.get("storage_path"))
    task = {name: value for name, value in absent.items() if name != "storage_path"}
    events, error = workplace.events(config, world_size, **task)
    (failed,) = of_type(events, RunFailed)
    assert (failed.error, failed.exit_code) == (kind.__name__, kind.exit_code) and "absent" in failed.text
    assert (type(error), str(error)) == (kind, failed.text) if world_size > 1 else error is None


def test_workers_do_not_validate_again_the_settings_that_the_driver_has_validated(workplace: Workplace) -> None:
    settings = workplace.config().to_dict()
    settings["training"]["max_steps"] = 0  # refused by a validation
    with pytest.raises(SettingsError):
        Config.from_dict(settings)
    events, _ = workplace.events(workplace.config(), settings=settings)
    assert [event.max_steps for event in of_type(events, AttemptStarted)] == [0]


@pytest.mark.parametrize(("world_size", "n_idle"), [(1, 0), (3, 0), (4, 1), (5, 2)])
def test_workers_without_a_micro_batch_are_counted_in_a_notice(
    world_size: int, n_idle: int, workplace: Workplace
) -> None:
    config = workplace.config(batch_size=4, accumulation=3)
    events, _ = workplace.events(config, world_size=world_size)
    (attempt,) = of_type(events, AttemptStarted)
    notices = [note for note in attempt.notes if "nothing to compute" in note]
    assert len(notices) == (n_idle > 0)
    assert all(f"{n_idle} of {world_size} workers" in note and "3 micro-batches of 4" in note for note in notices)


def test_a_gpu_for_which_pytorch_was_not_built_ends_the_run_with_what_to_install(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_kernel(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(torch, "ones", no_kernel)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 0))
    events, _ = workplace.events(workplace.config())
    assert isinstance(events[0], RunFailed)
    assert "was not built for Tesla V100 (compute capability 7.0)" in events[0].text
