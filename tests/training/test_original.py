"""Files of the original script go in and come out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from savant_ray.config import Config
from savant_ray.optim.schedule import learning_rate
from savant_ray.training.micro_batch import MicroBatch
from savant_ray.training.original import (
    NO_MOMENTS,
    as_original,
    four_keys,
    read_original,
    write_original,
)
from savant_ray.training.state import TrainingState
from savant_ray.training.step import take_step
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
