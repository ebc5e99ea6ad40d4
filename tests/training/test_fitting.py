"""A step that does not fit under the cap is repeated with smaller micro-batches and has the same result."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch._dynamo.exc import BackendCompilerFailed

from savant_ray.config import Config
from savant_ray.errors import MemoryCapError
from savant_ray.evaluation.validator import Validator
from savant_ray.events import Event, Notice, StepDone, ValidationDone
from savant_ray.optim.adamw import AdamWRule
from savant_ray.training.device import (
    DeviceMemoryError,
    is_out_of_memory,
    none_on_oom,
    raise_memory_cap_error_on_oom,
    retry_on_oom,
)
from savant_ray.training.efficiency import Peak
from savant_ray.training.host_copies import HostCopy, WeightChanges
from savant_ray.training.loop import train
from savant_ray.training.state import BatchFit, TrainingState
from savant_ray.training.step import take_step
from tests.training.tiny import (
    CPU,
    RecordingHost,
    local_batches,
    never,
    rank_micro_batches,
    tiny_config,
    tiny_state,
    tiny_tokenizer,
    weights,
)

Room = Callable[[], None]


def with_room_for(state: TrainingState, rows: float, after: int = 0) -> TrainingState:
    """Simulate memory for `rows / 2` sequences with kept loops or `rows` with recomputed ones.

    The first `after` forward passes always fit.
    """
    model, honest, calls = state.model, state.model.hidden_states, iter(range(10**6))

    def hidden_states(tokens_BT: torch.Tensor, *others: object) -> torch.Tensor:
        needed = len(tokens_BT) * (1 if model.recompute_loops else 2)
        if next(calls) >= after and needed > rows:
            raise torch.OutOfMemoryError("Tried to allocate")
        return honest(tokens_BT, *others)

    model.hidden_states = hidden_states  # type: ignore[method-assign]
    return state


def trained(config: Config, state: TrainingState) -> tuple[RecordingHost, TrainingState]:
    host = RecordingHost()
    assert train(state, config, local_batches(state, config), host)
    return host, state


def steps(host: RecordingHost) -> list[StepDone]:
    return [event for event in host.events if isinstance(event, StepDone)]


def notices(host: RecordingHost) -> list[str]:
    return [event.text for event in host.events if isinstance(event, Notice)]


@pytest.mark.parametrize(
    ("room", "expected_rows", "recompute"), [(8, 4, False), (4, 4, True), (3, 2, True), (2, 2, True), (1, 1, True)]
)
@pytest.mark.parametrize("after", [0, 4])
def test_a_smaller_room_gives_the_same_steps(room: int, expected_rows: int, recompute: bool, after: int) -> None:
    config = tiny_config()
    free, free_state = trained(config, tiny_state(config))
    host, state = trained(config, with_room_for(tiny_state(config), room, after))
    assert (state.batch_fit.rows, state.batch_fit.recompute_loops) == (expected_rows, recompute)
    assert len(notices(host)) == (recompute + (expected_rows < 4) + (expected_rows < 2)), "each is printed once"
    assert steps(host)[-1].micro_batch_size == expected_rows
    for mine, other in zip(steps(host), steps(free), strict=True):
        assert mine.train_loss == pytest.approx(other.train_loss, rel=1e-5) and mine.tokens == other.tokens
    for mine, other in zip(weights(state).values(), weights(free_state).values(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


def test_nothing_of_a_step_is_applied_that_did_not_fit() -> None:
    state = with_room_for(tiny_state(tiny_config()), 0, after=2)
    before, moments = weights(state), state.optimizer.state_dict()
    result = take_step(state, rank_micro_batches(0, 12, 0, 1, 4), 1e-2, 1.0, never)
    assert result.out_of_memory and not result.updated
    assert all(torch.equal(before[name], w) for name, w in weights(state).items())
    assert not any(moment["exp_avg"].any() for moment in moments["state"].values())


def test_if_not_even_one_sequence_fits_the_run_ends_with_what_to_lower() -> None:
    config = tiny_config()
    with pytest.raises(MemoryCapError, match="vram_limit_gb = 10.*max_seq_len") as caught:
        trained(config, with_room_for(tiny_state(config), 0.5))
    assert caught.value.exit_code == 5


def test_what_fits_is_remembered_in_the_checkpoint_for_the_same_settings() -> None:
    config = tiny_config()
    host, _ = trained(config, with_room_for(tiny_state(config), 2))
    file = io.BytesIO()
    torch.save(host.checkpoint, file)
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)

    longer = tiny_config(max_steps=8)
    again = with_room_for(tiny_state(longer), 2)
    again.load_checkpoint(checkpoint)
    assert not notices(trained(longer, again)[0])
    for change in ({"vram_limit_gb": 20.0}, {"batch_size": 6, "accumulation": 2}, {"recompute_loops": False}):
        other = tiny_state(tiny_config(**change))
        other.load_checkpoint(checkpoint)
        assert other.batch_fit == BatchFit.from_config(tiny_config(**change), CPU), "found for other settings"


def test_a_resumed_run_recomputes_loops_if_the_setting_now_asks_for_it() -> None:
    checkpoint = tiny_state(tiny_config()).to_checkpoint()
    asked = tiny_state(tiny_config(recompute_loops=True))
    asked.load_checkpoint(checkpoint)
    assert asked.batch_fit.recompute_loops and asked.model.recompute_loops


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("auto", [(12, False), (12, True), (6, True), (3, True), (2, True), (1, True)]),
        (True, [(12, True), (6, True), (3, True), (2, True), (1, True)]),
        (False, [(12, False), (6, False), (3, False), (2, False), (1, False)]),
    ],
)
def test_recomputation_comes_first_and_then_micro_batches_are_halved(
    setting: bool | str, expected: list[tuple[int, bool]]
) -> None:
    config = Config.from_dict({"training": {"recompute_loops": setting}})
    fit, seen = BatchFit.from_config(config, torch.device("cuda")), []
    with pytest.raises(MemoryCapError):
        while True:
            seen.append((fit.rows, fit.recompute_loops))
            fit = fit.smaller()
    assert seen == expected


@pytest.mark.parametrize(
    ("dim", "max_seq_len", "rows"), [(1024, 1024, 1), (512, 1024, 1), (128, 256, 4), (64, 128, 12), (256, 512, 1)]
)
def test_micro_batches_on_a_cpu_are_limited_to_the_size_that_is_fastest(dim: int, max_seq_len: int, rows: int) -> None:
    config = Config.from_dict({"model": {"dim": dim, "max_seq_len": max_seq_len}})
    assert BatchFit.from_config(config, CPU).rows == rows
    assert BatchFit.from_config(config, torch.device("cuda")).rows == 12


NCCL = """NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, unhandled cuda error, NCCL version 2.27.5
ncclUnhandledCudaError: Call to CUDA function failed.
Last error:
Cuda failure %s"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", True),
        ("CUDA driver error: out of memory", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", True),
        ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSgemm( handle, opa, opb)`", False),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("Triton Error [CUDA]: out of memory", True),
        (NCCL % "2 'out of memory'", True),
        (NCCL % "'out of memory'", True),
        (NCCL % "700 'an illegal memory access was encountered'", False),
        ("Triton Error [CUDA]: an illegal memory access was encountered", False),
        ("out of resource: shared memory, Required: 180224, Hardware limit: 101376", False),
        ("CUDA error: device-side assert triggered", False),
    ],
)
def test_out_of_memory_errors_of_libraries_are_recognized_by_their_message(text: str, expected: bool) -> None:
    assert is_out_of_memory(RuntimeError(text)) == expected
    assert not is_out_of_memory(ValueError(text))


def test_out_of_memory_errors_are_recognized_by_type_also_as_the_cause_of_another_error() -> None:
    cause = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert is_out_of_memory(cause)
    assert is_out_of_memory(BackendCompilerFailed("inductor", cause, None))
    assert is_out_of_memory(BackendCompilerFailed("inductor", RuntimeError("Triton Error [CUDA]: out of memory"), None))
    assert not is_out_of_memory(BackendCompilerFailed("inductor", RuntimeError("no such kernel"), None))
    wrapped = RuntimeError("the benchmark of a kernel failed")
    wrapped.__cause__ = cause
    assert is_out_of_memory(wrapped)


def test_other_errors_are_not_treated_as_out_of_memory() -> None:
    def fail() -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        none_on_oom(fail, CPU)
    with pytest.raises(RuntimeError, match="shapes"):
        retry_on_oom(fail, CPU, "a save")
    with pytest.raises(RuntimeError, match="shapes"), raise_memory_cap_error_on_oom(10):
        fail()


def test_an_update_that_does_not_fit_ends_the_run_with_what_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    state = tiny_state(config)

    def no_room(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nProcess 7 has 9 GiB in use")

    monkeypatch.setattr(AdamWRule, "update", no_room)
    with pytest.raises(MemoryCapError, match="vram_limit_gb = 10; raise it, or lower model.dim") as caught:
        trained(config, state)
    assert caught.value.exit_code == 5 and "\n" not in str(caught.value)


class NoRoom:
    """Raises the allocator's error for the first `times` calls, then calls `act`."""

    def __init__(self, act: Callable[..., object], times: int = 10**6) -> None:
        self.act, self.left = act, times

    def __call__(self, *arguments: object, **options: object) -> object:
        if self.left:
            self.left -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.act(*arguments, **options)


def with_due(config: Config, checkpoint: int = 1000, validation: int = 1000) -> Config:
    settings = config.to_dict()
    settings["checkpoint"]["every_steps"], settings["validation"]["every_steps"] = checkpoint, validation
    return Config.from_dict(settings)


@pytest.mark.parametrize("failures", [1, 2])
def test_a_save_without_device_memory_is_tried_once_more_and_then_fails_as_any_worker_does(
    failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_due(tiny_config(), checkpoint=2)
    state, host = tiny_state(config), RecordingHost()
    master, save = NoRoom(state.optimizer.master, times=0), HostCopy.update

    def save_without_room(host_copy: HostCopy, state: TrainingState) -> object:
        master.left = failures if state.step == 4 else 0
        return save(host_copy, state)

    monkeypatch.setattr(state.optimizer, "master", master)
    monkeypatch.setattr(HostCopy, "update", save_without_room)
    if failures == 1:
        assert train(state, config, local_batches(state, config), host)
        assert host.saved == [(2, "periodic"), (4, "periodic"), (6, "final")]
    else:
        with pytest.raises(DeviceMemoryError, match="copying step 4 for its checkpoint ran out of device memory"):
            train(state, config, local_batches(state, config), host)
        assert host.saved == [(2, "periodic")] and host.step == 4


def test_what_training_does_not_depend_on_is_skipped_with_a_notice_if_it_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = with_due(tiny_config(), validation=3)
    state, host = tiny_state(config), RecordingHost()
    monkeypatch.setattr(Peak, "measure", NoRoom(Peak.measure))
    monkeypatch.setattr(WeightChanges, "measure", NoRoom(WeightChanges.measure))
    assert train(state, config, local_batches(state, config), host) and len(steps(host)) == 6
    skipped = "was skipped: the device ran out of memory"
    assert notices(host) == [
        f"rank 0: measuring the speed of matrix products {skipped}",
        f"rank 0: measuring the speed of matrix products {skipped}",
    ]
    assert all(step.share_of_peak is None for step in steps(host))

    about_first_weights: list[Event] = []
    validator(config, about_first_weights).remember_weights(state)
    assert about_first_weights == [Notice(text=f"step 6: comparing weights {skipped}")]

    monkeypatch.setattr("savant_ray.evaluation.validator.loop_statistics", NoRoom(lambda: None))
    about_weights, about_loops, loss, _ = validated(state, config)
    assert isinstance(about_loops, Notice) and about_loops.text == f"step 6: loop statistics {skipped}"
    assert isinstance(about_weights, Notice) and about_weights.text == f"step 6: comparing weights {skipped}"
    assert isinstance(loss, ValidationDone) and loss.residuals == () and loss.weights_moved is None


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_validation_of_which_not_even_one_sequence_fits_fails_as_any_worker_does(batch_size: int) -> None:
    config = tiny_config(batch_size=batch_size, accumulation=12 // batch_size)
    with pytest.raises(DeviceMemoryError, match="the validation after step 0 ran out of device memory"):
        validated(with_room_for(tiny_state(config), 0), config)


def test_a_validation_of_one_sequence_is_retried_once_and_then_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(batch_size=1, accumulation=12)
    expected, state = validated(tiny_state(config), config), tiny_state(config)
    monkeypatch.setattr(state.model, "hidden_states", NoRoom(state.model.hidden_states, times=1))
    losses = [
        event.validation_loss
        for events in (expected, validated(state, config))
        for event in events
        if isinstance(event, ValidationDone)
    ]
    assert len(losses) == 2 and losses[0] == losses[1]


def validated(state: TrainingState, config: Config) -> list[Event]:
    """Return the events of a validation of twelve sequences."""
    events: list[Event] = []
    validator(config, events)(state)
    return events


def validator(config: Config, events: list[Event], step_sequences: int | None = None) -> Validator:
    return Validator(
        config, tiny_tokenizer(), rank_micro_batches(0, 12, 0, 1, 4), target_tokens=9, trained_bytes=9, rank=0,
        emit=events.append, stop_requested=lambda: False, step_sequences=step_sequences,
    )  # fmt: skip


def test_a_validation_that_does_not_fit_shrinks_itself_only() -> None:
    config = tiny_config()
    whole = validated(tiny_state(config), config)
    state = with_room_for(tiny_state(config), 4)
    notice, loss, _ = validated(state, config)
    assert isinstance(notice, Notice) and "at most 2 sequences" in notice.text
    assert isinstance(loss, ValidationDone) and isinstance(whole[0], ValidationDone)
    assert loss.validation_loss == pytest.approx(whole[0].validation_loss, rel=1e-6)
    assert state.batch_fit == BatchFit.from_config(config, CPU)


def test_an_answer_that_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    config, state = tiny_config(), tiny_state(tiny_config())

    def no_room(*_: object) -> None:
        raise torch.OutOfMemoryError("Tried to allocate")

    monkeypatch.setattr(state.model, "decode", no_room)
    loss, notice = validated(state, config)
    assert isinstance(loss, ValidationDone) and isinstance(notice, Notice) and "answer" in notice.text


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.set_num_threads(1)
    config = tiny_config(max_steps=3)
    state = tiny_state(config)
    if rank == 1:
        with_room_for(state, 2, after=1)
    host = RecordingHost(rank)
    train(state, config, local_batches(state, config, rank, 2), host)
    torch.save((asdict(state.batch_fit), weights(state), notices(host)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_all_ranks_shrink_together_when_one_has_no_room(tmp_path: Path) -> None:
    mp.spawn(_rank, (str(tmp_path),), nprocs=2)
    (fit, first, notices_of_0), (other_fit, second, notices_of_1) = (
        torch.load(tmp_path / f"{rank}.pt") for rank in range(2)
    )
    assert fit == other_fit and fit["rows"] == 2 and fit["recompute_loops"]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len(notices_of_0) == 2 and not notices_of_1
