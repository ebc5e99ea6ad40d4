"""A profile of some steps: what it contains, where it goes, and that it disturbs nothing."""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from savant_ray.config import Config, ProfileConfig, load_config
from savant_ray.errors import MemoryCapError, SavantError
from savant_ray.events import Notice, StepDone
from savant_ray.storage.local import LocalStorage
from savant_ray.training.loop import train
from savant_ray.training.profiling import StepProfiler, region
from savant_ray.training.state import TrainingState
from tests.training.tiny import RecordingHost, local_batches, tiny_config, tiny_state, weights

CUDA = torch.device("cuda")


def with_profile(accumulation: int = 1, **profile: Any) -> Config:
    return tiny_config(accumulation=accumulation, profile=profile)


def trained(config: Config, host: RecordingHost, state: TrainingState | None = None) -> TrainingState:
    state = state or tiny_state(config)
    train(state, config, local_batches(state, config), host)
    return state


def regions(content: bytes) -> Counter[str]:
    """Return how often each region of a step is in a trace."""
    events = json.loads(gzip.decompress(content))["traceEvents"]
    names = ("data wait", "forward", "backward", "all-reduce", "update")
    return Counter(event["name"] for event in events if event.get("ph") == "X" and event["name"] in names)


def notices(host: RecordingHost) -> list[str]:
    return [event.text for event in host.events if isinstance(event, Notice)]


def test_a_profile_contains_the_regions_and_operations_of_its_steps() -> None:
    host = RecordingHost()
    trained(with_profile(accumulation=3, first_step=3, steps=2), host)
    ((name, content),) = host.files.items()
    assert name == "profile/rank0-step3.pt.trace.json.gz"
    assert regions(content) == {"data wait": 2, "forward": 6, "backward": 6, "all-reduce": 2, "update": 2}
    operations = {event["name"] for event in json.loads(gzip.decompress(content))["traceEvents"]}
    assert {"aten::mm", "aten::embedding"} <= operations
    (text,) = notices(host)
    assert text == f"rank 0: the profile of steps 3 to 4 is in {name}; open it at ui.perfetto.dev or with TensorBoard"


def test_a_profile_changes_no_loss_and_no_weight() -> None:
    plain, profiled = RecordingHost(), RecordingHost()
    expected, state = (
        trained(tiny_config(accumulation=1), plain),
        trained(with_profile(first_step=2, steps=2), profiled),
    )
    losses = [[e.train_loss for e in host.events if isinstance(e, StepDone)] for host in (plain, profiled)]
    assert losses[0] == losses[1]
    assert all(torch.equal(w, weights(state)[name]) for name, w in weights(expected).items())
    assert not plain.files


def test_a_stop_writes_the_steps_that_were_profiled_until_then_and_a_resumed_attempt_the_others() -> None:
    config = with_profile(first_step=2, steps=4)
    first = RecordingHost(stop_at=3)
    trained(config, first)
    assert first.saved == [(3, "stop")]
    second, state = RecordingHost(), tiny_state(config)
    state.load_checkpoint(first.checkpoint)
    trained(config, second, state)
    files = first.files | second.files
    assert {name: regions(content)["update"] for name, content in files.items()} == {
        "profile/rank0-step2.pt.trace.json.gz": 2,
        "profile/rank0-step4.pt.trace.json.gz": 2,
    }
    assert "of steps 2 to 3 is in" in notices(first)[0] and "of steps 4 to 5 is in" in notices(second)[0]


def test_after_a_rewind_to_an_earlier_step_the_profile_begins_again_with_its_first_step() -> None:
    config, host = with_profile(first_step=3, steps=2), RecordingHost()
    with StepProfiler(config.training, tiny_state(config), host) as profiler:
        profiler.before_step(3)
        with region("update"):  # of a spike, after which training goes back to the beginning
            pass
        for step in (1, 2, 3, 4):
            profiler.before_step(step)
            with region("update"):
                pass
            profiler.after_step(step)
    ((name, content),) = host.files.items()
    assert name == "profile/rank0-step3.pt.trace.json.gz" and regions(content)["update"] == 2


def test_a_run_that_ends_within_the_profiled_steps_writes_the_steps_it_had() -> None:
    host = RecordingHost()
    trained(with_profile(first_step=6, steps=100), host)
    assert "of step 6 is in" in notices(host)[0]


@pytest.mark.parametrize(
    ("first_step", "resumed_at", "steps_text"),
    [(7, 0, "steps 1 to 6 and not step 7"), (2, 4, "steps 5 to 6 and not step 2")],
)
def test_a_profile_of_steps_that_the_attempt_does_not_have_is_reported_as_missing(
    first_step: int, resumed_at: int, steps_text: str
) -> None:
    config, host = with_profile(first_step=first_step), RecordingHost()
    state = tiny_state(config)
    state.step = resumed_at
    trained(config, host, state)
    assert not host.files
    assert notices(host) == [f"rank 0: training.profile: this attempt takes {steps_text}, so nothing is profiled"]


@pytest.mark.parametrize(("ranks", "profiled"), [(0, [0]), ("all", [0, 1])])
def test_the_first_rank_is_profiled_or_all_are(ranks: int | str, profiled: list[int]) -> None:
    hosts = [RecordingHost(rank) for rank in range(2)]
    for host in hosts:
        trained(with_profile(first_step=2, ranks=ranks), host)
    assert [host.rank for host in hosts if host.files] == profiled
    assert all(name.startswith(f"profile/rank{host.rank}-") for host in hosts for name in host.files)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SavantError("another process owns it")])
def test_a_profile_that_cannot_be_stored_is_reported_and_training_continues(error: Exception) -> None:
    def refuse(file: Path, name: str) -> str:
        raise error

    host = RecordingHost()
    host.store_file = refuse  # type: ignore[method-assign]
    assert trained(with_profile(first_step=2), host).step == 6
    assert notices(host) == [f"rank 0: profiling failed: {error.args[-1]}; training continues without it"]


def test_a_profiler_that_does_not_start_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUPTI is in use")

    monkeypatch.setattr("savant_ray.training.profiling.profile", fail)
    host = RecordingHost()
    assert trained(with_profile(first_step=2, steps=3), host).step == 6
    assert notices(host) == ["rank 0: profiling failed: CUPTI is in use; training continues without it"]


def test_an_error_that_ends_the_run_leaves_the_profile_behind() -> None:
    config, host = (
        tiny_config(accumulation=1, profile={"first_step": 1, "steps": 50}, max_skipped_steps=2),
        RecordingHost(),
    )
    state = tiny_state(config)
    with torch.no_grad():
        state.model.head.weight.fill_(float("nan"))
    with pytest.raises(SavantError, match="2 steps in a row"):
        trained(config, host, state)
    assert list(host.files) == ["profile/rank0-step1.pt.trace.json.gz"]


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replaces CUDA's recording of allocations; returns its calls."""
    calls: list[Any] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda enabled, **_: calls.append(enabled))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda name: Path(name).write_bytes(b"snapshot"))
    return calls


def profiler_on_cuda(config: Config, host: RecordingHost) -> StepProfiler:
    state = tiny_state(config)
    state.settings = dataclasses.replace(state.settings, device=CUDA)
    return StepProfiler(config.training, state, host)


def test_out_of_memory_that_ends_the_run_leaves_a_memory_snapshot(recordings: list[Any]) -> None:
    host = RecordingHost()
    with pytest.raises(MemoryCapError), profiler_on_cuda(with_profile(first_step=5), host) as profiler:
        profiler.before_step(2)
        raise MemoryCapError("not even one sequence fits")
    assert host.files == {"profile/rank0-step2-out-of-memory.pickle": b"snapshot"}
    assert "use of GPU memory up to step 2 is in profile/rank0-step2" in notices(host)[0]
    assert recordings == ["all", None], "and it is no longer recorded"


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_memory_is_recorded_until_the_profile_is_written(recordings: list[Any]) -> None:
    host = RecordingHost()
    with profiler_on_cuda(with_profile(first_step=2), host) as profiler:
        for step in (1, 2):
            profiler.before_step(step)
            assert recordings == ["all"]
            profiler.after_step(step)
        assert host.files["profile/rank0-step2-memory.pickle"] == b"snapshot"
        assert recordings == ["all", None]
    assert recordings == ["all", None]


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_memory_is_no_longer_recorded_if_the_profile_cannot_be_stored(recordings: list[Any]) -> None:
    def refuse(file: Path, name: str) -> str:
        raise OSError(28, "No space left on device")

    host = RecordingHost()
    host.store_file = refuse  # type: ignore[method-assign]
    with profiler_on_cuda(with_profile(first_step=2), host) as profiler:
        profiler.before_step(2)
        profiler.after_step(2)
        assert recordings == ["all", None]
    assert notices(host) == ["rank 0: profiling failed: No space left on device; training continues without it"]


@pytest.mark.parametrize("config", [tiny_config(), with_profile(first_step=5, ranks=0), with_profile(first_step=7)])
def test_memory_is_recorded_for_a_profile_only(config: Config, recordings: list[Any]) -> None:
    host = RecordingHost(rank=1)
    with pytest.raises(MemoryCapError), profiler_on_cuda(config, host):
        raise MemoryCapError("not even one sequence fits")
    assert not host.files and not recordings


def test_a_local_run_has_its_profile_in_its_folder(tmp_path: Path) -> None:
    file = tmp_path / "trace"
    file.write_bytes(b"1")
    run = tmp_path / "run"
    run.mkdir()
    storage = LocalStorage(run)
    for content in (b"1", b"2"):
        file.write_bytes(content)
        assert storage.store_file(file, "profile/rank0") == str(run / "profile/rank0")
        assert [path.read_bytes() for path in (run / "profile").iterdir()] == [content]


def test_a_profile_is_set_with_a_mapping() -> None:
    config = load_config(["--training.profile", "{first_step: 3, steps: 2, ranks: all}"], environment={})
    assert config.training.profile == ProfileConfig(first_step=3, steps=2, ranks="all")
    assert Config.from_dict(config.to_dict()) == config == Config.from_validated(config.to_dict())
    assert load_config([], environment={}).training.profile is None
