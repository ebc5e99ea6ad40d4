"""Files of the original script go in and come out; what is damaged or foreign is refused."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from savant_ray.config import Config
from savant_ray.errors import CheckpointError
from savant_ray.optim.schedule import learning_rate
from savant_ray.training.original import (
    NO_MOMENTS,
    as_original,
    four_keys,
    newest_original,
    original_files,
    read_original,
    write_original,
)
from savant_ray.training.state import TrainingState
from savant_ray.training.step import MicroBatch, take_step
from tests.training.original_program import OriginalProgram
from tests.training.tiny import LENGTH, VOCABULARY, never, shares, tiny_config, tiny_state, weights

PEAK = 1e-2
MASKS = {"global_mask", "local_mask", "recurrent_block.attn.mask"}


def batch(step: int) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (12, LENGTH), generator=torch.Generator().manual_seed(step))


def rate_after(updates: int) -> float:
    return learning_rate(updates + 1, 1.0, 2, 20)


def trained(steps: int, **settings: Any) -> OriginalProgram:
    program = OriginalProgram(PEAK, **settings)
    for step in range(steps):
        program.train(batch(step))
    return program


def loaded(path: Path, config: Config | None = None) -> tuple[TrainingState, list[str]]:
    config = config or tiny_config()
    state = tiny_state(config)
    notes = state.load_checkpoint(read_original(path, names(state), config.training.effective_batch))
    return state, notes


def names(state: TrainingState) -> list[str]:
    return [name for name, _ in state.model.named_parameters()]


def moments(state: TrainingState) -> dict[str, dict[str, torch.Tensor]]:
    return {name: state.optimizer.state[p] for name, p in state.model.named_parameters()}


def moments_of(program: OriginalProgram) -> dict[str, dict[str, torch.Tensor]]:
    return {name: program.optimizer.state[p] for name, p in program.model.named_parameters()}


def assert_weights_of(program: OriginalProgram, state: TrainingState, **tolerance: float) -> None:
    expected = {name: parameter.data for name, parameter in program.model.named_parameters()}
    torch.testing.assert_close(state.master_weights(), expected, **(tolerance or dict(rtol=0, atol=0)))


def assert_same(state: TrainingState, program: OriginalProgram, **tolerance: float) -> None:
    tolerance = tolerance or dict(rtol=0, atol=0)
    assert_weights_of(program, state, **tolerance)
    torch.testing.assert_close(moments(state), moments_of(program), **tolerance)


def take_steps(state: TrainingState, config: Config) -> None:
    for share in shares(state, config):
        take_step(state, share, 1e-3, 1.0, never)
        state.step += 1


# --- in and out


def test_a_file_of_the_original_goes_in_whatever_its_order_and_nothing_is_lost(tmp_path: Path) -> None:
    program = trained(3)
    state, notes = loaded(program.save(tmp_path))
    assert notes == []
    assert names(state) != [name for name, _ in program.model.named_parameters()], "the test is worth nothing otherwise"
    assert_same(state, program)
    assert (state.step, state.position, state.tokens_seen, state.skipped_micro_batches) == (3, 36, 0, 0)


def test_training_on_from_the_originals_file_is_what_the_original_would_have_done(tmp_path: Path) -> None:
    program = trained(3, rate=rate_after)
    state, _ = loaded(program.save(tmp_path))
    for step in range(3, 7):
        tokens = batch(step)
        share = [MicroBatch(rows, torch.zeros_like(rows), ()) for rows in tokens.split(5)]
        result = take_step(state, share, learning_rate(step + 1, PEAK, 2, 20), 1.0, never)
        assert result.loss == pytest.approx(program.train(tokens), rel=1e-5)
    assert_same(state, program, rtol=1e-3, atol=2e-5)


def test_a_file_of_the_original_goes_in_and_comes_out_the_same(tmp_path: Path) -> None:
    config = tiny_config(max_steps=6)
    first = trained(3).save(tmp_path)
    state, _ = loaded(first, config)
    take_steps(state, config)
    four, lost = as_original(state.to_checkpoint(), PEAK, four_keys(first)["model_state_dict"])
    assert lost == [] and list(four) == ["step", "model_state_dict", "optimizer_state_dict", "scheduler_state_dict"]
    write_original(tmp_path / "step_6.pt", four)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_3.pt", "step_6.pt"]

    again, notes = loaded(tmp_path / "step_6.pt", config)
    assert notes == [] and again.step == 6
    torch.testing.assert_close(weights(again), weights(state), rtol=0, atol=0)
    torch.testing.assert_close(moments(again), moments(state), rtol=0, atol=0)

    program = OriginalProgram(PEAK)
    program.load(tmp_path / "step_6.pt")
    assert_same(state, program)


def test_the_original_trains_on_from_our_file(tmp_path: Path) -> None:
    uninterrupted = trained(5, rate=rate_after)
    first = trained(3, rate=rate_after).save(tmp_path)
    state, _ = loaded(first)
    state.optimizer.param_groups[0]["lr"] = PEAK * rate_after(3)
    four, _ = as_original(state.to_checkpoint(), PEAK, four_keys(first)["model_state_dict"])
    first.unlink()
    write_original(first, four)
    program = OriginalProgram(PEAK, rate_after)
    program.load(first)
    assert program.scheduler.get_last_lr() == [PEAK * rate_after(3)]
    for step in (3, 4):
        program.train(batch(step))
    assert program.scheduler.state_dict() == uninterrupted.scheduler.state_dict()
    torch.testing.assert_close(program.model.state_dict(), uninterrupted.model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(moments_of(program), moments_of(uninterrupted), rtol=0, atol=0)


def test_a_run_of_ours_without_a_file_to_go_by_is_written_in_the_documented_order(tmp_path: Path) -> None:
    config = tiny_config(max_steps=2)
    state = tiny_state(config)
    take_steps(state, config)
    four, lost = as_original(state.to_checkpoint(), PEAK)
    assert lost == [] and set(four["model_state_dict"]) == set(names(state))
    assert [n.split("attn.")[1] for n in four["model_state_dict"] if "attn." in n] == [
        *("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"),
        *("ln.weight", "liquid_gate.weight", "liquid_gate.bias"),
    ]
    assert four["optimizer_state_dict"]["param_groups"][0]["lr"] == 1e-3, "the rate in force"
    assert four["scheduler_state_dict"]["_last_lr"] == [1e-3] and four["scheduler_state_dict"]["base_lrs"] == [PEAK]
    write_original(tmp_path / "step_2.pt", four)
    again, notes = loaded(tmp_path / "step_2.pt", config)
    assert notes == []
    torch.testing.assert_close(moments(again), moments(state), rtol=0, atol=0)


def test_an_optimizer_without_adamw_moments_is_left_out_and_told(tmp_path: Path) -> None:
    state = tiny_state(tiny_config())
    content = state.to_checkpoint()
    for entry in content["optimizer_state_dict"]["state"].values():
        del entry["exp_avg_sq"]
    four, lost = as_original(content, PEAK)
    assert lost == [NO_MOMENTS] and four["optimizer_state_dict"]["state"] == {}
    write_original(tmp_path / "step_0.pt", four)
    program = OriginalProgram(PEAK)
    program.optimizer.load_state_dict(four["optimizer_state_dict"])
    program.train(batch(0))
    _, notes = loaded(tmp_path / "step_0.pt")
    assert notes == ["the optimizer starts afresh: it is for 0 parameters, the model has 15"]


def test_masks_are_dropped_on_the_way_in_and_come_out_for_the_program_that_wrote_them(tmp_path: Path) -> None:
    path = trained(1).save(tmp_path)
    assert set(four_keys(path)["model_state_dict"]) >= MASKS
    state = tiny_state(tiny_config())
    content = read_original(path, names(state), 12)
    assert set(content["model_state_dict"]) == set(names(state))
    state.load_checkpoint(content)
    for like, expected in ((four_keys(path)["model_state_dict"], MASKS), (None, set())):
        four, _ = as_original(state.to_checkpoint(), PEAK, like)
        assert set(four["model_state_dict"]) & MASKS == expected


def test_bf16_weights_and_moments_go_in_as_fp32(tmp_path: Path) -> None:
    program = trained(2)
    content = program.content()
    content["model_state_dict"] = {n: w.bfloat16() for n, w in content["model_state_dict"].items()}
    for entry in content["optimizer_state_dict"]["state"].values():
        entry["exp_avg"] = entry["exp_avg"].bfloat16()
    torch.save(content, tmp_path / "step_2.pt")
    state, notes = loaded(tmp_path / "step_2.pt")
    assert notes == []
    mine = state.master_weights()
    for name, parameter in program.model.named_parameters():
        assert mine[name].dtype == torch.float32 and torch.equal(mine[name], parameter.data.bfloat16().float())


# --- what fits only in part


def test_an_optimizer_of_several_groups_is_told_and_the_weights_stay(tmp_path: Path) -> None:
    program = OriginalProgram(PEAK)
    parameters = list(program.model.parameters())
    groups = [{"params": [p for p in parameters if p.dim() == d], "weight_decay": 0.1 * (d - 1)} for d in (2, 1)]
    program.optimizer = torch.optim.AdamW(groups, lr=PEAK)
    program.scheduler = torch.optim.lr_scheduler.LambdaLR(program.optimizer, lambda _: 1.0)
    program.train(batch(0))
    state, notes = loaded(program.save(tmp_path))
    assert notes == ["the optimizer starts afresh: it has 2 groups of parameters where there is 1 here"]
    assert_weights_of(program, state)
    assert all(not entry["exp_avg"].any() for entry in moments(state).values())


@pytest.mark.parametrize(
    ("optimizer", "why"),
    [
        ({}, "0 groups"),
        (None, "0 groups"),
        ({"state": {0: "x"}, "param_groups": [{"params": [0]}]}, "0 groups"),
        ({"state": {}, "param_groups": torch.ones(2, 2)}, "0 groups"),
        (torch.ones(2, 2), "0 groups"),
        ({"state": {}, "param_groups": [{"params": [[0]]}]}, "0 parameters"),
        ({"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"params": [0]}]}, "1 parameters"),
    ],
)
def test_a_state_of_another_optimizer_is_told_and_the_weights_stay(optimizer: Any, why: str, tmp_path: Path) -> None:
    program = trained(1)
    content = program.content() | {"optimizer_state_dict": optimizer, "scheduler_state_dict": None}
    torch.save(content, tmp_path / "step_1.pt")
    state, notes = loaded(tmp_path / "step_1.pt")
    assert len(notes) == 2 and notes[0].startswith("the optimizer starts afresh: ") and why in notes[0]
    assert notes[1] == "the saved schedule stood at None; it goes on at step 1"
    assert_weights_of(program, state)


def test_a_state_for_only_some_of_the_parameters_is_not_used(tmp_path: Path) -> None:
    content = trained(1).content()
    del content["optimizer_state_dict"]["state"][4]
    torch.save(content, tmp_path / "step_1.pt")
    _, notes = loaded(tmp_path / "step_1.pt")
    assert notes == ["the optimizer starts afresh: it is for 14 parameters, the model has 15"]


# --- what is refused


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return trained(2).save(tmp_path_factory.mktemp("original")).read_bytes()


def refused_or_the_same(path: Path, altered: bytes, expected: dict[str, Any]) -> bool:
    """Whether it is refused; loaded with other content it fails."""
    path.write_bytes(altered)
    try:
        content = four_keys(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        return True
    torch.testing.assert_close(content, expected, rtol=0, atol=0)
    return False


def test_a_file_cut_anywhere_is_refused(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "step_2.pt"
    for tenth in range(10):
        path.write_bytes(whole[: len(whole) * tenth // 10])
        with pytest.raises(CheckpointError, match=r"step_2\.pt: cut short, altered or not written by torch\.save"):
            four_keys(path)


def flipped(whole: bytes, at: int, bit: int) -> bytes:
    return whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :]


def test_a_flipped_byte_is_refused_or_changes_nothing(whole: bytes, tmp_path: Path) -> None:
    path, chance = tmp_path / "step_2.pt", random.Random(5)
    path.write_bytes(whole)
    expected = four_keys(path)
    places = [chance.randrange(len(whole)) for _ in range(100)]
    assert sum(refused_or_the_same(path, flipped(whole, at, chance.randrange(8)), expected) for at in places) > 50


def test_any_flipped_bit_in_the_files_directory_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "step_2.pt"
    weights = {"embed.weight": torch.arange(4.0), "head.weight": torch.ones(3)}
    torch.save(dict(step=2, model_state_dict=weights, optimizer_state_dict={}, scheduler_state_dict={}), path)
    whole, expected = path.read_bytes(), four_keys(path)
    local = whole.rindex(b"PK\x03\x04", 0, whole.index(b"data/0"))
    entry = whole.rindex(b"PK\x01\x02", 0, whole.rindex(b"data/0"))
    headers = [*range(local, local + 50), *range(entry, entry + 60)]  # names, sizes, places: guarded by no CRC
    refused = sum(refused_or_the_same(path, flipped(whole, at, bit), expected) for at in headers for bit in range(8))
    assert refused > 300


def test_a_changed_number_in_a_weight_is_refused(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "step_2.pt"
    path.write_bytes(whole)
    weight = four_keys(path)["model_state_dict"]["embed.weight"].numpy().tobytes()
    at = whole.index(weight) + len(weight) // 2
    path.write_bytes(flipped(whole, at, 0))
    assert torch.load(path, weights_only=True)["step"] == 2, "PyTorch does not notice"
    with pytest.raises(CheckpointError, match="is not what was put in"):
        four_keys(path)


class Code:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_code_in_a_file_is_refused_and_not_executed(tmp_path: Path) -> None:
    path = tmp_path / "step_1.pt"
    torch.save(trained(1).content() | {"extra": Code(tmp_path / "executed")}, path)
    with pytest.raises(CheckpointError, match="could execute code"):
        four_keys(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"step": None}, "its step is None"),
        ({"step": -1}, "its step is -1"),
        ({"step": 7}, r"holds step 7: rename it to step_7\.pt"),
        ({"model_state_dict": [1]}, "no weights by name"),
        ({"model_state_dict": {"embed.weight": 3}}, "no weights by name"),
        ({"model_state_dict": {"embed.weight": torch.ones(3, dtype=torch.complex64)}}, "no weights by name"),
    ],
)
def test_a_file_that_is_not_the_originals_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    torch.save(trained(1).content() | changes, tmp_path / "step_1.pt")
    with pytest.raises(CheckpointError, match=said):
        four_keys(tmp_path / "step_1.pt")


def test_missing_keys_are_named(tmp_path: Path) -> None:
    path = tmp_path / "step_1.pt"
    torch.save({"step": 1, "scheduler_state_dict": {}}, path)
    with pytest.raises(CheckpointError, match="model_state_dict, optimizer_state_dict missing"):
        four_keys(path)
    torch.save([1], path)
    with pytest.raises(CheckpointError, match="it holds a list"):
        four_keys(path)
    with pytest.raises(CheckpointError, match="no such file"):
        four_keys(tmp_path / "step_2.pt")


def test_other_shapes_are_refused_as_for_our_own_checkpoints(tmp_path: Path) -> None:
    content = trained(1).content()
    content["model_state_dict"]["embed.weight"] = torch.zeros(60, 16)
    torch.save(content, tmp_path / "step_1.pt")
    with pytest.raises(CheckpointError, match=r"embed\.weight is \[60, 16\], the model's \[50, 16\]"):
        loaded(tmp_path / "step_1.pt")


# --- in the run folder


def write_step(folder: Path, step: int) -> Path:
    torch.save(OriginalProgram().content() | {"step": step}, folder / f"step_{step}.pt")
    return folder / f"step_{step}.pt"


def test_files_of_the_original_are_found_by_number_and_only_directly_in_the_folder(tmp_path: Path) -> None:
    files = [write_step(tmp_path, step) for step in (9900, 10000, 500)]
    for folder in ("step_7", "step_8.pt"):
        (tmp_path / folder).mkdir()
    write_step(tmp_path / "step_7", 7)
    for name in ("step_x.pt", "step_5.pt.part", "last.pt"):
        (tmp_path / name).touch()
    assert original_files(tmp_path) == [files[2], files[0], files[1]]


def test_the_newest_whole_file_beyond_our_own_checkpoints_is_taken(tmp_path: Path) -> None:
    said: list[str] = []
    assert newest_original(tmp_path, -1, said.append) is None
    older, newest = write_step(tmp_path, 500), write_step(tmp_path, 1000)
    assert newest_original(tmp_path, -1, said.append) == newest_original(tmp_path, 999, said.append) == newest
    assert newest_original(tmp_path, 1000, said.append) is None
    assert said == []
    newest.write_bytes(newest.read_bytes()[:3000])
    assert newest_original(tmp_path, 400, said.append) == older
    assert newest_original(tmp_path, 500, said.append) is None
    assert len(said) == 2 and "step_1000.pt: cut short" in said[0] and "left where it is" in said[0]
    assert newest.exists()


def test_a_refused_write_leaves_the_older_file_whole(tmp_path: Path) -> None:
    path = write_step(tmp_path, 5)
    before = path.read_bytes()
    four = four_keys(path)
    tmp_path.joinpath("step_6.pt").mkdir()
    with pytest.raises(OSError):
        write_original(tmp_path / "step_6.pt", four)
    assert path.read_bytes() == before and not list(tmp_path.glob(".*"))
