"""All commands accept a file of the original as a checkpoint; settings provide what it does not contain."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from savant_ray.cli import main
from savant_ray.config import Config
from savant_ray.original.file import optimizer_of, read_file
from savant_ray.storage.object_store import ObjectStorage
from savant_ray.training.checkpoint import write_checkpoint
from tests.original.program import AdamW8bit, OriginalProgram
from tests.original.test_conversion import config, run, start  # noqa: F401 - fixtures
from tests.original.test_file import trained
from tests.original.word_tokenizer import write_tokenizer
from tests.storage.object_store import ObjectStore

Printed = pytest.CaptureFixture[str]


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    """Return settings that the files of `OriginalProgram` do not contain."""
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    return ["--data.tokenizer", str(tokenizer), "--model.n_heads", "2", "--model.n_loops", "4"]


def generate(*arguments: str | Path) -> int:
    prompt = ["--prompt", "w5 w6 w7", "--temperature", "0", "--max-new-tokens", "5"]
    return main(["generate", *prompt, *map(str, arguments)])


def likeliest(program: OriginalProgram, tokens: list[int], n: int) -> list[int]:
    """Return the continuation that the original's model generates; special tokens are never sampled."""
    for _ in range(n):
        padded = torch.tensor([tokens + [0] * (16 - len(tokens))])
        logits = program.model(padded)[0, len(tokens) - 1]
        logits[[0, 1, *range(48, 50)]] = -torch.inf
        if (token := int(logits.argmax())) == 2:  # [SEP]
            break
        tokens = [*tokens, token]
    return tokens


@pytest.mark.parametrize("named", ["step_3.pt", "."])
def test_generate_answers_as_the_original_does(
    named: str, settings: list[str], tmp_path: Path, capsys: Printed
) -> None:
    program = trained(4)
    folder = tmp_path / "original"
    folder.mkdir()
    program.save(folder)
    answer = tmp_path / "answer.json"
    assert generate("--checkpoint", folder / named, *settings, "--json", answer) == 0
    expected = likeliest(program, [8, 9, 10], 5)
    assert json.loads(answer.read_text())["text"].split() == [f"w{token - 3}" for token in expected[3:]]
    assert capsys.readouterr().err == "", "no setting was assumed"
    assert [path.name for path in folder.iterdir()] == ["step_3.pt"]


def test_settings_can_come_from_a_file_and_options_in_any_order(settings: list[str], tmp_path: Path) -> None:
    path = trained(2).save(tmp_path)
    (tmp_path / "their.yaml").write_text(
        f"data: {{tokenizer: {tmp_path}/tokenizer}}\nmodel: {{n_heads: 2, n_loops: 4}}\n"
    )
    answers = []
    for given in (settings, ["--config", f"{tmp_path}/their.yaml"]):
        answers.append(tmp_path / f"{len(answers)}.json")
        assert main(["evaluate", *given, "--max-new-tokens", "1", str(path), "--json", str(answers[-1])]) == 0
    first, second = (json.loads(answer.read_text())["answers"] for answer in answers)
    assert first == second


def test_assumed_settings_are_printed(tmp_path: Path, capsys: Printed) -> None:
    path = trained(2).save(tmp_path)
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    assert generate("--checkpoint", path, "--data.tokenizer", tokenizer, "--model.n_heads=2") == 0
    assert capsys.readouterr().err == (
        "note: step_1.pt does not show all settings of its model; assumed: model.n_loops 12\n"
    )


def test_all_contradictions_and_the_missing_tokenizer_are_listed(tmp_path: Path, capsys: Printed) -> None:
    path = trained(2).save(tmp_path)
    given = ["--model.dim=32", "--model.vocab_size=60", "--model.positions=rotary", "--model.n_heads=3"]
    assert generate("--checkpoint", path, *given) == 2
    printed = capsys.readouterr().err
    for problem in (
        "model.dim: 32, but the file has 16",
        "model.vocab_size: 60, but the file has 50",
        "model.positions: rotary, but the original has none",
        "model.n_heads: 3 does not divide",
        "data.tokenizer: ",
    ):
        assert problem in printed


@pytest.mark.parametrize("command", [["evaluate"], ["export", "--format", "safetensors", "--output", "out"]])
def test_a_command_that_needs_a_tokenizer_names_the_setting(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    monkeypatch.chdir(tmp_path)
    trained(2).save(tmp_path)
    assert main([*command, "step_1.pt", "--model.n_heads", "2"]) == 2
    assert "data.tokenizer: a file of the original contains no tokenizer" in capsys.readouterr().err
    assert not Path("out").exists()


def test_settings_for_a_savant_ray_checkpoint_are_refused(
    run: Path,  # noqa: F811 - the fixture
    config,  # noqa: F811
    settings: list[str],
    capsys: Printed,
) -> None:
    trained(2).save(run)
    start(run, config)
    assert generate("--checkpoint", run) == 0
    capsys.readouterr()
    assert generate("--checkpoint", run / "step_1", *settings) == 2
    printed = capsys.readouterr().err
    assert "data.tokenizer, model.n_heads, model.n_loops: given for" in printed and "settings of its own" in printed


def test_a_missing_path_is_reported_even_if_settings_are_given(settings: list[str], capsys: Printed) -> None:
    assert generate("--checkpoint", "nowhere/step_3.pt", *settings) == 4
    assert "nowhere/step_3.pt: no checkpoint there" in capsys.readouterr().err


def test_a_tokenizer_with_more_entries_than_the_model_is_refused(
    settings: list[str], tmp_path: Path, capsys: Printed
) -> None:
    content = trained(2).content()
    weights = dict(content["model_state_dict"])
    for name in ("embed.weight", "head.weight"):
        weights[name] = weights[name][:40]
    torch.save({**content, "model_state_dict": weights}, tmp_path / "step_1.pt")
    assert generate("--checkpoint", tmp_path / "step_1.pt", *settings) == 2
    assert "has 48 entries, but the file's model has only 40" in capsys.readouterr().err


def test_a_misspelt_setting_is_refused_with_a_suggestion(tmp_path: Path, capsys: Printed) -> None:
    assert generate("--checkpoint", trained(2).save(tmp_path), "--model.n_head", "2") == 2
    assert "did you mean model.n_heads?" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "evaluate", "export"])
def test_help_names_the_settings_that_a_file_of_the_original_needs(command: str, capsys: Printed) -> None:
    assert main([command, "--help"]) == 0
    printed = capsys.readouterr().out
    assert "step_X.pt" in printed and "--data.tokenizer FOLDER" in printed and "--config" in printed


def test_safetensors_have_the_files_weights_settings_and_the_named_tokenizer(
    settings: list[str], tmp_path: Path
) -> None:
    path, output = trained(2, dtype=torch.bfloat16).save(tmp_path), tmp_path / "out"
    assert main(["export", str(path), "--format", "safetensors", "--output", str(output), *settings]) == 0
    weights = {name: w for name, w in read_file(path)["model_state_dict"].items() if "mask" not in name}
    torch.testing.assert_close(load_file(output / "model.safetensors"), weights, rtol=0, atol=0)
    described = json.loads((output / "config.json").read_text())
    assert (described["dim"], described["n_heads"], described["window_size"], described["step"]) == (16, 2, 4, 1)
    assert json.loads((output / "tokenizer.json").read_text())["model"]["vocab"]["[SEP]"] == 2


def test_a_file_of_the_original_is_exported_as_one_without_settings(settings: list[str], tmp_path: Path) -> None:
    path, output = trained(2).save(tmp_path), str(tmp_path / "out.pt")
    assert main(["export", str(path), "--format", "original", "--output", output, *settings]) == 2
    assert main(["export", str(path), "--format", "original", "--output", output]) == 0


@pytest.mark.parametrize("command", ["generate", "export"])
def test_a_folder_with_damaged_files_only_ends_with_exit_code_4(
    command: str, settings: list[str], tmp_path: Path, capsys: Printed
) -> None:
    folder = tmp_path / "original"
    folder.mkdir()
    (folder / "step_5.pt").write_bytes(b"")
    (folder / "step_6.pt").mkdir()
    arguments = ["--format", "original", "--output", str(tmp_path / "x.pt")]
    code = generate("--checkpoint", folder, *settings) if command == "generate" else main(
        ["export", str(folder), *arguments]
    )  # fmt: skip
    assert code == 4 and "none that is intact" in capsys.readouterr().err


def test_files_of_the_original_in_object_storage_are_checkpoints_too(
    store: ObjectStore,
    settings: list[str],
    tmp_path: Path,
    capsys: Printed,
) -> None:
    for updates in (2, 4):
        store.write(f"runs/original/step_{updates - 1}.pt", trained(updates).save(tmp_path).read_bytes())
    store.write("runs/original/step_9.pt", b"damaged")
    for name, step in (("original", 3), ("original/step_1.pt", 1)):
        output = tmp_path / f"out{step}"
        arguments = ["--format", "safetensors", "--output", str(output), *settings]
        assert main(["export", store.uri(f"runs/{name}"), *arguments]) == 0
        assert json.loads((output / "config.json").read_text())["step"] == step
    assert "step_9.pt: truncated" in capsys.readouterr().err
    assert main(["export", store.uri("runs/original"), "--format", "original", "--output", f"{tmp_path}/x.pt"]) == 0
    assert read_file(tmp_path / "x.pt")["step"] == 3
    assert generate("--checkpoint", store.uri("runs/original/step_9.pt"), *settings) == 4


def test_an_export_from_object_storage_is_for_the_optimizer_of_the_originals_file_there(
    store: ObjectStore,
    config: Config,  # noqa: F811
    tmp_path: Path,
    capsys: Printed,
) -> None:
    store.write("runs/run/step_3.pt", trained(4, optimizer=AdamW8bit).save(tmp_path).read_bytes())
    storage = ObjectStorage(store.uri("runs/run"), tmp_path / "here")
    start(storage, config)
    for named in ("run", "run/step_3"):
        output = tmp_path / f"{named.replace('/', '_')}.pt"
        assert main(["export", store.uri(f"runs/{named}"), "--format", "original", "--output", str(output)]) == 0
        assert optimizer_of(read_file(output)) == "adamw8bit"
        assert list(read_file(output)["model_state_dict"]) == list(OriginalProgram().model.state_dict()), "its order"
    assert capsys.readouterr().err == ""


def test_status_and_runs_list_files_of_the_original_by_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "checkpoints_savant"
    folder.mkdir()
    for step in (400, 50):
        (folder / f"step_{step}.pt").write_bytes(b"is not opened")
    (tmp_path / "unfinished/step_5").mkdir(parents=True)
    (tmp_path / "unfinished/step_5/step_5.pt").touch()
    assert main(["runs", "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert (listed["name"], listed["state"]) == ("checkpoints_savant", "file of the original")
    assert (listed["step"], listed["checkpoint"]) == (400, "step_400.pt")
    assert main(["runs"]) == 0
    assert "checkpoints_savant" in (printed := capsys.readouterr().out) and "step_400.pt" in printed
    for named, step in (("checkpoints_savant", 400), ("checkpoints_savant/step_50.pt", 50)):
        assert main(["status", named]) == 0
        first, second, *_ = capsys.readouterr().out.splitlines()
        assert "file of the original" in first and second == f"step {step}"
    assert main(["status", "unfinished/step_5"]) == 2


def test_a_missing_tokenizer_in_a_checkpoint_is_reported(tmp_path: Path, capsys: Printed) -> None:
    from savant_ray.config import dump_yaml
    from tests.original.test_file import original_config
    from tests.training.tiny import tiny_state

    config = original_config()  # noqa: F811
    write_checkpoint(tmp_path / "run", tiny_state(config).to_checkpoint(), {"config.yaml": dump_yaml(config)})
    assert generate("--checkpoint", tmp_path / "run") == 4
    assert "step_0: has no tokenizer" in capsys.readouterr().err
