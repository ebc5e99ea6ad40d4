"""Files of the original script are read and written, for both of its optimizers."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from savant_ray.config import Config
from savant_ray.events import StepDone
from savant_ray.optim.schedule import learning_rate
from savant_ray.original.conversion import to_checkpoint
from savant_ray.original.export import NO_MOMENTS, to_original
from savant_ray.original.file import OptimizerName, optimizer_of, read_file, write_original
from savant_ray.training.loop import train
from savant_ray.training.state import TrainingState
from savant_ray.training.step import take_step
from tests.original.fixtures import KINDS, PEAK, batch, expected, file_of, rate
from tests.original.program import AdamW8bit, OriginalProgram, adamw
from tests.training.tiny import (
    LENGTH,
    MODEL,
    RecordingHost,
    local_batches,
    never,
    tiny_config,
    tiny_state,
    unmasked,
    weights,
)

MASKS = {"global_mask", "local_mask"}
FLAT = functools.partial(AdamW8bit, nested=False)
MAKERS = {"adamw": adamw, "adamw8bit": AdamW8bit, "adamw8bit-flat": FLAT}
EACH = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def original_config(**training: Any) -> Config:
    """Settings whose model is that of `OriginalProgram`."""
    config = tiny_config(**{"max_steps": 20, "warmup_fraction": 0.1, "learning_rate": PEAK, **training})
    return Config.from_dict(config.to_dict() | {"model": {**MODEL, "n_loops": 4, "global_every": 4}})


def trained(updates: int, **settings: Any) -> OriginalProgram:
    """Train the stand-in for the original; its file is `step_{updates - 1}.pt`."""
    program = OriginalProgram(PEAK, **settings)
    for update in range(updates):
        program.train(batch(update))
    return program


def loaded(path: Path, config: Config | None = None) -> tuple[TrainingState, list[str]]:
    config = config or original_config()
    state = tiny_state(config)
    notes = state.load_checkpoint(to_checkpoint(read_file(path), names(state), config.training.effective_batch))
    return state, notes


def names(state: TrainingState) -> list[str]:
    return [name for name, _ in state.model.named_parameters()]


def moments(state: TrainingState) -> dict[str, dict[str, torch.Tensor]]:
    return {name: state.optimizer.state[p] for name, p in state.model.named_parameters()}


def assert_weights_of(program: OriginalProgram, state: TrainingState, **tolerance: float) -> None:
    expected = {name: parameter.data.float() for name, parameter in program.model.named_parameters()}
    torch.testing.assert_close(state.master_weights(), expected, **(tolerance or dict(rtol=0, atol=0)))


def assert_same(state: TrainingState, program: OriginalProgram, **tolerance: float) -> None:
    tolerance = tolerance or dict(rtol=0, atol=0)
    assert_weights_of(program, state, **tolerance)
    torch.testing.assert_close(moments(state), program.moments(), **tolerance)


def take_steps(state: TrainingState, config: Config) -> None:
    for local_batch in local_batches(state, config):
        take_step(state, local_batch, 1e-3, 1.0, never)
        state.step += 1


def exported(
    state: TrainingState, path: Path, optimizer: OptimizerName = "adamw", like: Path | None = None
) -> dict[str, Any]:
    config = original_config()
    like_content = read_file(like) if like else None
    original, lost = to_original(state.to_checkpoint(), config.training, config.model, optimizer, like_content)
    assert lost == []
    write_original(path, original)
    return torch.load(path, weights_only=True)


# --- read and write


@EACH
def test_a_file_of_the_original_is_read_in_any_parameter_order_without_loss(make: Any, tmp_path: Path) -> None:
    program = trained(4, optimizer=make)
    state, notes = loaded(program.save(tmp_path))
    assert notes == []
    assert names(state) != [name for name, _ in program.model.named_parameters()], "the orders have to differ"
    assert_same(state, program)
    assert (state.step, state.position, state.tokens_seen, state.skipped_micro_batches) == (3, 36, 0, 0)


def test_most_moments_of_an_8_bit_file_are_8_bit_and_the_small_ones_fp32(tmp_path: Path) -> None:
    content = torch.load(trained(1, optimizer=FLAT).save(tmp_path), weights_only=True)
    dtypes = [entry["state1"].dtype for entry in content["optimizer_state_dict"]["state"].values()]
    assert {torch.uint8, torch.float32} == set(dtypes), "otherwise the tests do not test both formats"


@pytest.mark.parametrize("block", [256, 2048])
def test_8_bit_moments_are_code_value_times_block_scale_for_both_block_sizes(block: int, tmp_path: Path) -> None:
    path = trained(1, optimizer=FLAT).save(tmp_path)
    content = torch.load(path, weights_only=True)
    number, entry = next((n, e) for n, e in content["optimizer_state_dict"]["state"].items() if "qmap1" in e)
    codes, values = entry["state1"].flatten().tolist(), entry["qmap1"].tolist()
    entry["absmax1"], entry["absmax2"] = (torch.rand(-(-len(codes) // block)) for _ in range(2))
    torch.save(content, path)
    moment = read_file(path)["optimizer_state_dict"]["state"][number]["exp_avg"]
    expected = [values[code] * entry["absmax1"][i // block].item() for i, code in enumerate(codes)]
    assert torch.equal(moment.flatten(), torch.tensor(expected)) and moment.shape == entry["state1"].shape


@EACH
def test_training_from_the_originals_file_continues_as_the_original_would(make: Any, tmp_path: Path) -> None:
    program = trained(3, rate=rate, optimizer=make)
    state, _ = loaded(program.save(tmp_path))
    for update in range(3, 7 if make is adamw else 4):  # its 8-bit moments are rounded after each update
        tokens = batch(update)
        local_batch = [unmasked(rows, torch.zeros_like(rows)) for rows in tokens.split(5)]
        result = take_step(state, local_batch, learning_rate(update, PEAK, 2, 20), 1.0, never)
        assert result.loss == pytest.approx(program.train(tokens), rel=1e-5)
    assert_weights_of(program, state, rtol=1e-3, atol=2e-5)
    if make is adamw:
        assert_same(state, program, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@EACH
def test_a_file_of_the_original_is_read_and_written_unchanged_for_either_optimizer(
    make: Any, optimizer: OptimizerName, tmp_path: Path
) -> None:
    config = original_config(max_steps=6)
    first = trained(4, optimizer=make).save(tmp_path)
    state, _ = loaded(first, config)
    take_steps(state, config)
    content = exported(state, tmp_path / "step_6.pt", optimizer, first)
    assert list(content) == ["step", "model_state_dict", "optimizer_state_dict", "scheduler_state_dict"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_3.pt", "step_6.pt"]
    assert optimizer_of(read_file(tmp_path / "step_6.pt")) == optimizer

    again, notes = loaded(tmp_path / "step_6.pt", config)
    assert notes == [] and again.step == 6
    torch.testing.assert_close(weights(again), weights(state), rtol=0, atol=0)
    torch.testing.assert_close(moments(again), moments(state), rtol=0, atol=0)

    program = OriginalProgram(PEAK, optimizer=adamw if optimizer == "adamw" else AdamW8bit)
    program.load(tmp_path / "step_6.pt")
    assert_same(state, program)
    program.train(batch(6))


def test_without_a_file_of_the_original_parameters_are_written_in_the_documented_order(tmp_path: Path) -> None:
    config = original_config(max_steps=2)
    state = tiny_state(config)
    take_steps(state, config)
    original = exported(state, tmp_path / "step_2.pt")
    assert set(original["model_state_dict"]) == {*names(state), *MASKS}
    assert [n.split("attn.")[1] for n in original["model_state_dict"] if "attn." in n] == [
        *("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"),
        *("ln.weight", "liquid_gate.weight", "liquid_gate.bias"),
    ]
    again, notes = loaded(tmp_path / "step_2.pt", config)
    assert notes == []
    torch.testing.assert_close(moments(again), moments(state), rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_an_optimizer_without_adamw_moments_is_left_out_and_reported(optimizer: OptimizerName, tmp_path: Path) -> None:
    config = original_config()
    content = tiny_state(config).to_checkpoint()
    for entry in content["optimizer_state_dict"]["state"].values():
        del entry["exp_avg_sq"]
    original, lost = to_original(content, config.training, config.model, optimizer)
    assert lost == [NO_MOMENTS] and original["optimizer_state_dict"]["state"] == {}
    write_original(tmp_path / "step_0.pt", original)
    assert optimizer_of(read_file(tmp_path / "step_0.pt")) == optimizer
    program = OriginalProgram(PEAK, optimizer=adamw if optimizer == "adamw" else AdamW8bit)
    program.optimizer.load_state_dict(original["optimizer_state_dict"])
    program.train(batch(0))
    _, notes = loaded(tmp_path / "step_0.pt")
    assert notes == [
        "the optimizer starts from its initial state: the saved state is for 0 parameters, the model has 15"
    ]


def test_masks_are_dropped_on_reading_and_written_as_the_original_writes_them(tmp_path: Path) -> None:
    program = trained(1)
    path = program.save(tmp_path)
    assert set(read_file(path)["model_state_dict"]) >= MASKS
    config = original_config()
    state = tiny_state(config)
    content = to_checkpoint(read_file(path), names(state), 12)
    assert set(content["model_state_dict"]) == set(names(state))
    state.load_checkpoint(content)
    for like in (path, None):
        written = exported(state, tmp_path / "out.pt", like=like)["model_state_dict"]
        expected = program.model.state_dict()
        assert all(torch.equal(written[name], expected[name]) for name in MASKS)
        program.model.load_state_dict(written, strict=True)


def test_masks_of_an_older_version_are_written_for_the_program_that_wrote_them(tmp_path: Path) -> None:
    content = trained(1).content()
    for name in MASKS:
        del content["model_state_dict"][name]
    content["model_state_dict"]["recurrent_block.attn.mask"] = torch.ones(LENGTH, LENGTH).tril()
    torch.save(content, tmp_path / "step_0.pt")
    state, notes = loaded(tmp_path / "step_0.pt")
    assert notes == []
    written = exported(state, tmp_path / "out.pt", like=tmp_path / "step_0.pt")["model_state_dict"]
    assert set(written) == set(content["model_state_dict"])


def test_bf16_weights_and_moments_are_read_as_fp32(tmp_path: Path) -> None:
    program = trained(3, dtype=torch.bfloat16)
    content = torch.load(program.save(tmp_path), weights_only=True)
    assert content["optimizer_state_dict"]["state"][0]["exp_avg"].dtype == torch.bfloat16
    state, notes = loaded(tmp_path / "step_2.pt")
    assert notes == []
    assert all(weight.dtype == torch.float32 for weight in state.master_weights().values())
    assert_weights_of(program, state)
    for name, entry in program.moments().items():
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(moments(state)[name][moment], entry[moment].float())


# --- files of the original in `fixtures/`


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_file_has_the_content_of_the_original_program(kind: str, tmp_path: Path) -> None:
    held = expected()[kind]
    config = original_config()
    state, notes = loaded(file_of(kind), config)
    assert notes == [] and state.step == held["step"]
    settings = config.training
    if kind != "adamw8bit_without_schedule":
        schedule = (settings.learning_rate, settings.n_warmup_steps, settings.max_steps)
        assert learning_rate(state.next_in_schedule, *schedule) == pytest.approx(held["rate"])
    with torch.no_grad():
        logits = state.model(batch(0)[:1])[0, -1]
    torch.testing.assert_close(logits, torch.tensor(held["logits"]), rtol=1e-5, atol=1e-6)
    for name, entry in moments(state).items():
        first, second, sums = entry["exp_avg"].double(), entry["exp_avg_sq"].double(), held["moments"][name]
        assert entry["step"] == held["updates"]
        assert [first.norm().item(), first.sum().item(), second.sum().item()] == pytest.approx(
            [sums["norm"], sums["sum"], sums["square_sum"]], rel=1e-6
        )


# --- optimizers of the original


def assert_continues(program: OriginalProgram, uninterrupted: OriginalProgram, path: Path) -> None:
    """Train two more updates from our file, and compare them with an uninterrupted program."""
    program.load(path)
    program.next = uninterrupted.next
    for update in (3, 4):
        program.train(batch(update))
        uninterrupted.train(batch(update))


def test_the_original_with_adamw_continues_from_our_file_as_if_uninterrupted(tmp_path: Path) -> None:
    uninterrupted = trained(3, rate=rate)
    first = uninterrupted.save(tmp_path)
    exported(loaded(first)[0], tmp_path / "out.pt", like=first)
    program = OriginalProgram(PEAK, rate)
    assert_continues(program, uninterrupted, tmp_path / "out.pt")
    assert program.scheduler.state_dict() == uninterrupted.scheduler.state_dict()
    torch.testing.assert_close(program.model.state_dict(), uninterrupted.model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(program.moments(), uninterrupted.moments(), rtol=0, atol=0)


@pytest.mark.parametrize("nested", [True, False])
def test_the_original_with_adamw8bit_continues_from_our_file(nested: bool, tmp_path: Path) -> None:
    make = functools.partial(AdamW8bit, nested=nested)
    uninterrupted = trained(3, rate=rate, optimizer=make)
    first = uninterrupted.save(tmp_path)
    exported(loaded(first)[0], tmp_path / "out.pt", "adamw8bit", first)
    program = OriginalProgram(PEAK, rate, make)
    assert_continues(program, uninterrupted, tmp_path / "out.pt")
    assert program.scheduler.state_dict() == uninterrupted.scheduler.state_dict()
    torch.testing.assert_close(program.model.state_dict(), uninterrupted.model.state_dict(), rtol=0, atol=1e-3)


def test_a_file_for_the_other_optimizer_fails_at_the_originals_first_update(tmp_path: Path) -> None:
    state, _ = loaded(trained(3).save(tmp_path))
    for optimizer, make, missing in (("adamw", AdamW8bit, "state1"), ("adamw8bit", adamw, "exp_avg")):
        exported(state, tmp_path / "out.pt", optimizer)  # type: ignore[arg-type]
        program = OriginalProgram(PEAK, optimizer=make)
        program.load(tmp_path / "out.pt")
        with pytest.raises(KeyError, match=missing):
            program.train(batch(3))


def test_bitsandbytes_continues_from_our_file_and_writes_one_that_we_read(tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def make(params: Any, lr: float) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(params, lr=lr, min_8bit_size=512)
        return optimizer

    # the file that it wrote is read with its own moments
    program = trained(3, rate=rate, optimizer=make, dtype=torch.bfloat16)
    first = program.save(tmp_path)
    state, notes = loaded(first)
    assert notes == []
    assert_weights_of(program, state)
    for name, parameter in program.model.named_parameters():
        own, mine = program.optimizer.state[parameter], moments(state)[name]
        for number, moment in enumerate(("exp_avg", "exp_avg_sq"), start=1):
            expected = own[f"state{number}"]
            if expected.dtype == torch.uint8:
                expected = bitsandbytes.functional.dequantize_blockwise(
                    expected, absmax=own[f"absmax{number}"], code=own[f"qmap{number}"], blocksize=256
                )
            assert torch.equal(mine[moment], expected.float())
    # and training continues from its export
    exported(state, tmp_path / "out.pt", "adamw8bit", first)
    resumed = OriginalProgram(PEAK, rate, make, torch.bfloat16)
    assert_continues(resumed, program, tmp_path / "out.pt")
    for (name, weight), expected in zip(resumed.model.named_parameters(), program.model.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=0.02, atol=2e-3, msg=name)
    _, notes = loaded(resumed.save(tmp_path))
    assert notes == []
    # a file for PyTorch's AdamW is accepted, and fails at the first update
    exported(state, tmp_path / "wrong.pt", "adamw", first)
    wrong = OriginalProgram(PEAK, rate, make, torch.bfloat16)
    wrong.load(tmp_path / "wrong.pt")
    with pytest.raises(KeyError, match="state1"):
        wrong.train(batch(3))


# --- schedule


@EACH
def test_the_schedule_of_a_file_is_written_as_the_original_writes_it_for_that_step(make: Any, tmp_path: Path) -> None:
    program = trained(4, rate=rate, optimizer=make)
    first = program.save(tmp_path)
    state, _ = loaded(first)
    optimizer: OptimizerName = "adamw" if make is adamw else "adamw8bit"
    for _ in range(3):
        for like in (first, None):
            written = exported(state, tmp_path / "out.pt", optimizer, like)
            content = program.content()
            torch.testing.assert_close(written["scheduler_state_dict"], content["scheduler_state_dict"])
            written_group, group = (saved["optimizer_state_dict"]["param_groups"][0] for saved in (written, content))
            assert written_group["lr"] == pytest.approx(group["lr"]) and written_group.keys() == group.keys()
            assert all(written_group[name] == group[name] for name in group.keys() - {"lr"})
        program.train(batch(program.next))
        state.step += 1


@pytest.mark.parametrize("resumes", [0, 1, 4])
@EACH
def test_the_schedule_is_one_update_ahead_for_each_resume_of_the_original(
    make: Any, resumes: int, tmp_path: Path
) -> None:
    program = trained(3, rate=rate, optimizer=make)
    for _ in range(resumes):
        program.load(program.save(tmp_path))
        program.train(batch(9))
        program.train(batch(10))
    content = program.content()
    assert content["scheduler_state_dict"]["last_epoch"] == content["step"] + 1 + resumes
    first, config = program.save(tmp_path), original_config(max_steps=20, batch_size=12, accumulation=1)
    state, notes = loaded(first, config)
    assert notes == [] and state.step == content["step"]
    again = tiny_state(config)
    assert again.load_checkpoint(state.to_checkpoint()) == [], "a checkpoint of savant_ray preserves it"
    written = exported(again, tmp_path / "out.pt", "adamw" if make is adamw else "adamw8bit", first)
    torch.testing.assert_close(written["scheduler_state_dict"], content["scheduler_state_dict"])

    host, left = RecordingHost(), list(local_batches(again, config))
    train(again, config, left[:2], host)
    rates = [event.learning_rate for event in host.events if isinstance(event, StepDone)]
    expected = []
    for update in (11, 12):
        expected.append(program.scheduler.get_last_lr()[0])
        program.train(batch(update))
    assert rates == pytest.approx(expected)


@EACH
def test_a_file_without_a_schedule_is_read_with_weights_optimizer_and_step(make: Any, tmp_path: Path) -> None:
    program = trained(4, optimizer=make)
    content = program.content()
    del content["scheduler_state_dict"]
    torch.save(content, tmp_path / "step_3.pt")
    state, notes = loaded(tmp_path / "step_3.pt")
    assert notes == [] and state.step == 3
    assert_same(state, program)
    exported(state, tmp_path / "out.pt", "adamw" if make is adamw else "adamw8bit", tmp_path / "step_3.pt")
    OriginalProgram(optimizer=make).load(tmp_path / "out.pt")


def test_a_schedule_behind_the_step_is_reported(tmp_path: Path) -> None:
    content = trained(4).content()
    content["scheduler_state_dict"]["last_epoch"] = 1
    torch.save(content, tmp_path / "step_3.pt")
    _, notes = loaded(tmp_path / "step_3.pt")
    assert notes == ["the saved schedule is at 1; it continues at step 3"]


# --- files that fit only in part


def test_an_optimizer_of_several_groups_is_reported_and_the_weights_are_kept(tmp_path: Path) -> None:
    program = OriginalProgram(PEAK)
    parameters = list(program.model.parameters())
    groups = [{"params": [p for p in parameters if p.dim() == d], "weight_decay": 0.1 * (d - 1)} for d in (2, 1)]
    program.optimizer = torch.optim.AdamW(groups, lr=PEAK)
    program.scheduler = torch.optim.lr_scheduler.LambdaLR(program.optimizer, lambda _: 1.0)
    program.train(batch(0))
    state, notes = loaded(program.save(tmp_path))
    problem = "the saved state has 2 parameter groups, this optimizer has 1"
    assert notes == [f"the optimizer starts from its initial state: {problem}"]
    assert_weights_of(program, state)
    assert all(not entry["exp_avg"].any() for entry in moments(state).values())


@pytest.mark.parametrize(
    ("optimizer", "why"),
    [
        ({}, "0 parameter groups"),
        (None, "0 parameter groups"),
        ({"state": {0: "x"}, "param_groups": [{"params": [0]}]}, "0 parameter groups"),
        ({"state": {}, "param_groups": torch.ones(2, 2)}, "0 parameter groups"),
        (torch.ones(2, 2), "0 parameter groups"),
        ({"state": {}, "param_groups": [{"params": [[0]]}]}, "0 parameters"),
        ({"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"params": [0]}]}, "1 parameters"),
    ],
)
def test_a_state_of_another_optimizer_is_reported_and_the_weights_are_kept(
    optimizer: Any, why: str, tmp_path: Path
) -> None:
    program = trained(2)
    content = program.content() | {"optimizer_state_dict": optimizer, "scheduler_state_dict": None}
    torch.save(content, tmp_path / "step_1.pt")
    state, notes = loaded(tmp_path / "step_1.pt")
    assert len(notes) == 1 and notes[0].startswith("the optimizer starts from its initial state: ") and why in notes[0]
    assert_weights_of(program, state)


def test_a_state_for_only_some_of_the_parameters_is_not_used(tmp_path: Path) -> None:
    content = trained(2).content()
    del content["optimizer_state_dict"]["state"][4]
    torch.save(content, tmp_path / "step_1.pt")
    _, notes = loaded(tmp_path / "step_1.pt")
    assert notes == [
        "the optimizer starts from its initial state: the saved state is for 14 parameters, the model has 15"
    ]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"absmax1": torch.ones(3)}, "the saved state holds absmax1, absmax2, "),
        ({"qmap2": torch.ones(16)}, "the saved state holds absmax1, absmax2, "),
        ({"state1": torch.zeros(5)}, "has another shape"),
        ({"state2": None}, "0 parameter groups"),
    ],
)
def test_8_bit_moments_with_inconsistent_sizes_are_reported_and_not_used(
    changes: dict[str, Any], why: str, tmp_path: Path
) -> None:
    program = trained(2, optimizer=AdamW8bit)
    content = program.content()
    for entry in content["optimizer_state_dict"]["state"].values():
        inner = next(value for value in entry.values() if isinstance(value, dict))
        inner.update(changes if "qmap1" in inner else {})
    torch.save(content, tmp_path / "step_1.pt")
    state, notes = loaded(tmp_path / "step_1.pt")
    assert len(notes) == 1 and notes[0].startswith("the optimizer starts from its initial state: ") and why in notes[0]
    assert_weights_of(program, state)
