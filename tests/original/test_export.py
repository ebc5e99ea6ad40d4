"""Export of checkpoints for other programs."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from savant_ray.cli import main
from savant_ray.config import Config, dump_yaml
from savant_ray.data.tokenizer import Tokenizer
from savant_ray.errors import CheckpointError, SavantError
from savant_ray.model.transformer import UniversalTransformer
from savant_ray.original.export import NO_MOMENTS, NO_OPTIMIZER_KNOWN, OTHER_LOOPS, export_original
from savant_ray.original.file import OptimizerName, optimizer_of, read_file
from savant_ray.training.checkpoint import write_checkpoint
from savant_ray.training.safetensors_export import export_safetensors
from savant_ray.training.state import TrainingState
from savant_ray.training.step import take_step
from tests.data.albert_like import with_chat_template
from tests.original.fixtures import batch
from tests.original.program import AdamW8bit, OriginalProgram, adamw
from tests.original.test_file import FLAT, MAKERS, original_config, trained
from tests.training.tiny import MODEL, local_batches, never, tiny_state

CONFIG = original_config(max_steps=3)
OPTIMIZERS = {"adamw": adamw, "adamw8bit": AdamW8bit}
EXPORTS: dict[str, Any] = {"original": export_original, "safetensors": export_safetensors}
CONSTANTS = (
    "set these constants in the original (now: the values in parentheses): vocab_size 50 (32000), dim 16 (1024), "
)


@pytest.fixture
def state() -> TrainingState:
    state = tiny_state(CONFIG)
    for local_batch in local_batches(state, CONFIG):
        take_step(state, local_batch, 1e-3, 1.0, never)
        state.step += 1
    return state


@pytest.fixture
def run(state: TrainingState, tmp_path: Path) -> Path:
    texts = {"config.yaml": dump_yaml(CONFIG), "tokenizer.json": '{"model": "€"}'}
    return write_checkpoint(tmp_path / "run", state.to_checkpoint(), texts).parent


def test_safetensors_is_a_folder_with_weights_settings_and_tokenizer(
    run: Path, state: TrainingState, tmp_path: Path
) -> None:
    output = tmp_path / "new" / "savant"
    export_safetensors(run, output)
    assert sorted(path.name for path in output.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert [path.name for path in output.parent.iterdir()] == ["savant"]
    weights = load_file(output / "model.safetensors")
    torch.testing.assert_close(weights, state.master_weights(), rtol=0, atol=0)
    assert UniversalTransformer(CONFIG.model).load_state_dict(weights).missing_keys == []
    description = json.loads((output / "config.json").read_text())
    assert description == {
        "architectures": ["UniversalTransformer"],
        "add_special_tokens": "auto",
        "torch_dtype": "float32",
        **MODEL,
        "n_loops": 4,
        "global_every": 4,
        "positions": "none",
        "step": 3,
    }
    assert (output / "tokenizer.json").read_text(encoding="utf-8") == '{"model": "€"}'


def test_safetensors_has_the_chat_template_of_the_checkpoint(state: TrainingState, tmp_path: Path) -> None:
    texts = {"config.yaml": dump_yaml(CONFIG), **with_chat_template(tmp_path / "tokenizer").files()}
    write_checkpoint(tmp_path / "run", state.to_checkpoint(), texts)
    export_safetensors(tmp_path / "run", tmp_path / "output")
    template = Tokenizer.load(tmp_path / "output").chat_template
    assert template is not None and template == with_chat_template(tmp_path / "tokenizer").chat_template


@pytest.mark.parametrize("named", [".", "step_3", "step_3/step_3.pt"])
def test_a_checkpoint_can_be_named_by_its_run_its_folder_or_its_file(named: str, run: Path, tmp_path: Path) -> None:
    warnings = export_original(run / named, tmp_path / "step_3.pt")
    assert len(warnings) == 2 and warnings[0] == NO_OPTIMIZER_KNOWN and warnings[1].startswith(CONSTANTS)
    assert read_file(tmp_path / "step_3.pt")["scheduler_state_dict"]["base_lrs"] == [CONFIG.training.learning_rate]
    export_safetensors(run / named, tmp_path / "folder")


def test_a_name_with_another_step_than_the_checkpoint_is_reported(run: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "step_1000.pt"
    assert "contains step 3: rename it to step_3.pt" in export_original(run, wrong)[-1]
    wrong.rename(tmp_path / "step_3.pt")
    assert "contains step 3: rename it" in export_original(tmp_path / "step_3.pt", tmp_path / "step_4.pt")[-1]
    assert not any("rename" in warning for warning in export_original(run, tmp_path / "other.pt"))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_the_original_continues_from_a_run_that_started_with_its_file(
    make: Any, run: Path, state: TrainingState, tmp_path: Path
) -> None:
    trained(1, optimizer=make).save(run)  # step_0.pt: shows its optimizer, the order of its parameters, and its masks
    assert export_original(run, tmp_path / "step_3.pt") == []
    program = OriginalProgram(optimizer=make)
    program.load(tmp_path / "step_3.pt")
    master_weights, by_name, moments = state.master_weights(), dict(state.model.named_parameters()), program.moments()
    for name, parameter in program.model.named_parameters():
        assert torch.equal(parameter, master_weights[name])
        torch.testing.assert_close(moments[name], state.optimizer.state[by_name[name]], rtol=0, atol=0)
    program.train(batch(3))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_the_original_continues_with_another_optimizer_if_it_is_named(
    make: Any, optimizer: OptimizerName, run: Path, tmp_path: Path
) -> None:
    trained(1, optimizer=make).save(run)
    assert export_original(run, tmp_path / "step_3.pt", optimizer) == []
    program = OriginalProgram(optimizer=OPTIMIZERS[optimizer])
    program.load(tmp_path / "step_3.pt")
    program.train(batch(3))


def test_the_optimizer_is_that_of_the_newest_file_of_the_original(run: Path, tmp_path: Path) -> None:
    trained(1).save(run)
    trained(2, optimizer=AdamW8bit).save(run)
    export_original(run, tmp_path / "step_3.pt")
    assert optimizer_of(read_file(tmp_path / "step_3.pt")) == "adamw8bit"


def test_a_damaged_file_beside_the_checkpoint_is_reported_and_ignored(run: Path, tmp_path: Path) -> None:
    (run / "step_1.pt").write_bytes(b"half")
    warnings = export_original(run, tmp_path / "out.pt", "adamw")
    assert len(warnings) == 2 and "step_1.pt: truncated" in warnings[0]
    assert read_file(tmp_path / "out.pt")["step"] == 3


@pytest.mark.parametrize("optimizer", [None, "adamw", "adamw8bit"])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_file_of_the_original_is_copied_for_either_optimizer(
    make: Any, optimizer: OptimizerName | None, tmp_path: Path
) -> None:
    path = trained(3, optimizer=make).save(tmp_path)
    assert export_original(path, tmp_path / "copy.pt", optimizer) == []
    before, after = read_file(path), read_file(tmp_path / "copy.pt")
    assert optimizer_of(after) == (optimizer or optimizer_of(before))
    torch.testing.assert_close(after["optimizer_state_dict"]["state"], before["optimizer_state_dict"]["state"])
    if optimizer_of(after) == optimizer_of(before):
        torch.testing.assert_close(after, before, rtol=0, atol=0)
    program = OriginalProgram(optimizer=adamw if optimizer_of(after) == "adamw" else AdamW8bit)
    program.load(tmp_path / "copy.pt")
    program.train(batch(3))


def test_a_file_of_the_original_without_a_schedule_is_copied_without_one(tmp_path: Path) -> None:
    content = trained(3, optimizer=FLAT).content()
    del content["scheduler_state_dict"]
    torch.save(content, tmp_path / "step_2.pt")
    assert export_original(tmp_path / "step_2.pt", tmp_path / "copy.pt") == []
    assert list(read_file(tmp_path / "copy.pt")) == ["step", "model_state_dict", "optimizer_state_dict"]


@pytest.mark.parametrize("optimizer", [None, "adamw", "adamw8bit"])
@pytest.mark.parametrize("spoilt", [{"absmax1": torch.ones(3)}, {"momentum_buffer": torch.ones(3)}])
def test_unreadable_moments_of_a_file_of_the_original_are_left_out_and_reported(
    spoilt: dict[str, Any], optimizer: OptimizerName | None, tmp_path: Path
) -> None:
    content = trained(3, optimizer=FLAT).content()
    for number, entry in content["optimizer_state_dict"]["state"].items():
        content["optimizer_state_dict"]["state"][number] = entry | spoilt if "absmax1" in spoilt else spoilt
    torch.save(content, tmp_path / "step_2.pt")
    warnings = export_original(tmp_path / "step_2.pt", tmp_path / "copy.pt", optimizer)
    assert warnings == [NO_MOMENTS]
    program = OriginalProgram(optimizer=OPTIMIZERS[optimizer or "adamw8bit"])
    program.load(tmp_path / "copy.pt")
    program.train(batch(3))


def test_for_a_folder_with_only_files_of_the_original_the_newest_intact_one_is_exported(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for updates in (2, 3):
        trained(updates, optimizer=AdamW8bit).save(folder)
    (folder / "step_7.pt").write_bytes(b"half")
    warnings = export_original(folder, tmp_path / "copy.pt", "adamw")
    assert len(warnings) == 1 and "step_7.pt: truncated" in warnings[0]
    assert read_file(tmp_path / "copy.pt")["step"] == 2


# --- what the original cannot represent


def changed_run(folder: Path, **model: Any) -> Path:
    config = Config.from_dict(CONFIG.to_dict() | {"model": {**CONFIG.model.model_dump(), **model}})
    texts = {"config.yaml": dump_yaml(config), "tokenizer.json": "{}"}
    return write_checkpoint(folder, tiny_state(config).to_checkpoint(), texts).parent


def test_steps_with_twice_the_loops_are_reported(tmp_path: Path) -> None:
    training = {**CONFIG.training.model_dump(), "double_loops_fraction": 0.5}
    config = Config.from_dict(CONFIG.to_dict() | {"training": training})
    texts = {"config.yaml": dump_yaml(config), "tokenizer.json": "{}"}
    run = write_checkpoint(tmp_path / "run", tiny_state(config).to_checkpoint(), texts).parent
    assert OTHER_LOOPS in export_original(run, tmp_path / "out.pt", "adamw")


def test_a_model_with_positions_is_refused(tmp_path: Path) -> None:
    run = changed_run(tmp_path / "run", positions="rotary")
    with pytest.raises(
        CheckpointError, match=r"trained with model\.positions: rotary, which the original does not support"
    ):
        export_original(run, tmp_path / "out.pt", "adamw")
    assert not (tmp_path / "out.pt").exists()
    export_safetensors(run, tmp_path / "folder")


@pytest.mark.parametrize(
    ("model", "pattern"),
    [
        ({"global_every": 2}, "model.global_every: 2, but the original's code has 4"),
        ({"global_every": 3}, "model.global_every: 3, but the original's code has 4"),
        ({"soft_cap": 30.0}, "model.soft_cap: 30.0, but the original's code has 50.0"),
        (
            {"vocab_size": 60},
            r"step_0.pt in the run folder has another model: .*head.weight is [50, 16] instead of [60, 16]",
        ),
        ({"dim": 32}, "step_0.pt in the run folder has another model: "),
        ({"window_size": 5}, "local_mask does not match model.max_seq_len 16 and model.window_size 5"),
        ({"max_seq_len": 32}, "global_mask does not match model.max_seq_len 32 and model.window_size 4"),
    ],
)
def test_a_model_that_the_original_would_compute_differently_is_reported(
    model: dict[str, Any], pattern: str, tmp_path: Path
) -> None:
    run = changed_run(tmp_path / "run", **model)
    trained(1).save(run)
    warnings = export_original(run, tmp_path / "out.pt")
    assert len(warnings) == 1 and re.search(pattern.replace("[", r"\["), warnings[0])


@pytest.mark.parametrize(
    "model", [{"n_loops": 2, "global_every": 3}, {"global_every": 2, "window_size": 15}], ids=["no global loop", "all"]
)
def test_another_global_every_with_the_same_effect_gives_no_warning(model: dict[str, Any], tmp_path: Path) -> None:
    warnings = export_original(changed_run(tmp_path / "run", **model), tmp_path / "out.pt", "adamw")
    assert len(warnings) == 1 and warnings[0].startswith(CONSTANTS)


def test_the_original_computes_with_our_file_what_our_model_computes(
    run: Path, state: TrainingState, tmp_path: Path
) -> None:
    export_original(run, tmp_path / "step_3.pt")
    program, tokens = OriginalProgram(), batch(1)
    program.load(tmp_path / "step_3.pt")
    with torch.no_grad():
        expected = state.model(tokens, torch.zeros_like(tokens))
        torch.testing.assert_close(program.model(tokens), expected, rtol=1e-5, atol=1e-5)


# --- failures


@pytest.mark.parametrize("format", ["original", "safetensors"])
def test_an_existing_output_is_never_overwritten(format: str, run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(SavantError, match="exists already"):
        EXPORTS[format](run, tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "precious"


@pytest.mark.parametrize("format", ["original", "safetensors"])
def test_a_failing_storage_leaves_no_partial_output(format: str, run: Path, tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))  # as on a full disk: no file beyond 100 bytes
    try:
        with pytest.raises(SavantError, match="--output .*out"):
            EXPORTS[format](run, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("format", ["original", "safetensors"])
def test_a_checkpoint_that_cannot_be_read_is_not_reported_as_the_output(
    format: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(torch, "load", fail)
    assert main(["export", str(run), "--format", format, "--output", str(tmp_path / "out")]) != 0
    printed = capsys.readouterr().err
    assert "Input/output error" in printed and "run/step_3" in printed and "--output" not in printed


def test_a_damaged_checkpoint_is_not_exported(run: Path, tmp_path: Path) -> None:
    (run / "step_3" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json has 2 of"):
        export_safetensors(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["original", "safetensors", "hf"])
def test_a_refused_export_creates_no_folder(format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "models/of/june"
    assert main(["export", str(tmp_path / "no_run"), "--format", format, "--output", str(output)]) == 4
    assert "no checkpoint there" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["original", "safetensors"])
def test_the_folders_above_the_output_are_created(format: str, run: Path, tmp_path: Path) -> None:
    EXPORTS[format](run, tmp_path / "models/of/june")
    assert (tmp_path / "models/of/june").exists()


def test_savant_export_prints_what_it_wrote(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["export", str(run), "--format", "safetensors", "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert capsys.readouterr() == (f"{tmp_path / 'out'} is written\n", "")
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["export", str(tmp_path), "--format", "original", "--output", str(tmp_path / "x.pt")]) == 4
