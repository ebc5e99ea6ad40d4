"""A checkpoint leaves for other programs, and nothing is overwritten on the way."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from savant_ray.cli import main
from savant_ray.config import dump_yaml
from savant_ray.errors import CheckpointError, SavantError
from savant_ray.model.transformer import UniversalTransformer
from savant_ray.training.checkpoint import write_checkpoint
from savant_ray.training.export import export
from savant_ray.training.original import four_keys
from savant_ray.training.state import TrainingState
from savant_ray.training.step import take_step
from tests.training.original_program import OriginalProgram
from tests.training.tiny import MODEL, never, shares, tiny_config, tiny_state

CONFIG = tiny_config(max_steps=3)


@pytest.fixture
def state() -> TrainingState:
    state = tiny_state(CONFIG)
    for share in shares(state, CONFIG):
        take_step(state, share, 1e-3, 1.0, never)
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
    assert export(run, "safetensors", output) == []
    assert sorted(path.name for path in output.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert [path.name for path in output.parent.iterdir()] == ["savant"]
    weights = load_file(output / "model.safetensors")
    torch.testing.assert_close(weights, state.master_weights(), rtol=0, atol=0)
    assert UniversalTransformer(CONFIG.model).load_state_dict(weights).missing_keys == []
    description = json.loads((output / "config.json").read_text())
    assert description == {
        "architectures": ["UniversalTransformer"],
        "torch_dtype": "float32",
        **MODEL,
        "positions": "none",
        "step": 3,
    }
    assert (output / "tokenizer.json").read_text(encoding="utf-8") == '{"model": "€"}'


@pytest.mark.parametrize("named", [".", "step_3", "step_3/step_3.pt"])
def test_a_checkpoint_is_named_by_its_run_its_folder_or_its_file(named: str, run: Path, tmp_path: Path) -> None:
    assert export(run / named, "original", tmp_path / "step_3.pt") == []
    assert four_keys(tmp_path / "step_3.pt")["scheduler_state_dict"]["base_lrs"] == [CONFIG.training.learning_rate]
    assert export(run / named, "safetensors", tmp_path / "folder") == []


def test_the_original_goes_on_from_a_run_that_began_with_its_file(
    run: Path, state: TrainingState, tmp_path: Path
) -> None:
    OriginalProgram().save(run)  # step_0.pt: shows the order of its parameters, and its masks
    assert export(run, "original", tmp_path / "step_3.pt") == []
    program = OriginalProgram()
    program.model.load_state_dict(four_keys(tmp_path / "step_3.pt")["model_state_dict"], strict=True)
    program.load(tmp_path / "step_3.pt")
    mine = state.master_weights()
    by_name = dict(state.model.named_parameters())
    for name, parameter in program.model.named_parameters():
        assert torch.equal(parameter, mine[name])
        for moment in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(program.optimizer.state[parameter][moment], state.optimizer.state[by_name[name]][moment])


def test_a_damaged_file_beside_the_checkpoint_is_told_and_not_needed(run: Path, tmp_path: Path) -> None:
    (run / "step_1.pt").write_bytes(b"half")
    warnings = export(run, "original", tmp_path / "out.pt")
    assert len(warnings) == 1 and "step_1.pt: cut short" in warnings[0]
    assert four_keys(tmp_path / "out.pt")["step"] == 3


def test_a_file_of_the_original_is_written_anew_but_has_no_tokenizer_to_export(tmp_path: Path) -> None:
    path = OriginalProgram().save(tmp_path)
    assert export(path, "original", tmp_path / "copy.pt") == []
    torch.testing.assert_close(four_keys(tmp_path / "copy.pt"), four_keys(path), rtol=0, atol=0)
    with pytest.raises(CheckpointError, match="neither settings nor tokenizer"):
        export(path, "safetensors", tmp_path / "folder")


@pytest.mark.parametrize("format", ["original", "safetensors"])
def test_what_is_there_is_never_overwritten(format: str, run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(SavantError, match="exists already"):
        export(run, format, tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "precious"


@pytest.mark.parametrize("format", ["original", "safetensors"])
def test_storage_that_refuses_leaves_nothing_behind(format: str, run: Path, tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))  # as on a full disk: no file beyond 100 bytes
    try:
        with pytest.raises(SavantError, match="--output .*out"):
            export(run, format, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_damaged_checkpoint_is_not_exported(run: Path, tmp_path: Path) -> None:
    (run / "step_3" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json has 2 of"):
        export(run, "safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_savant_export_writes_and_says_where(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["export", str(run), "--format", "safetensors", "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert capsys.readouterr() == (f"{tmp_path / 'out'} is written\n", "")
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["export", str(tmp_path), "--format", "original", "--output", str(tmp_path / "x.pt")]) == 4
