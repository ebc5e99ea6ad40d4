"""The commands: what they print, what they call, how they end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from savant_ray.cli import COMMANDS, main
from savant_ray.config import Config, dump_yaml, load_config, setting_rows
from savant_ray.errors import STOPPED_EARLY, CheckpointError, MemoryCapError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a command called in place of training, preparing, generating and measuring."""
    made: list[Any] = []

    def install(module: str, **functions: Any) -> None:
        fake = ModuleType(module)
        fake.__dict__.update(functions)
        monkeypatch.setitem(sys.modules, module, fake)

    def stream_answer(checkpoint: Path, prompt: str, **options: Any) -> Iterator[str]:
        made.append((checkpoint, prompt, options))
        yield from (" five", " plus\x1b[2J", " ten")

    def train(config: Config, **options: bool) -> int:
        made.append((config, options))
        return STOPPED_EARLY

    install("savant_ray.cluster.driver", train=train)
    install("savant_ray.cluster.preparation", prepare=made.append)
    install("savant_ray.training.sampling", stream_answer=stream_answer)
    install("savant_ray.training.export", export=lambda *options: made.append(options) or ["no moments"])
    install("savant_ray.data.quickstart", write_quickstart=lambda folder, force: made.append((folder, force)))
    install("savant_ray.benchmarks.registry", run=lambda name, json_path: made.append((name, json_path)))
    return made


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    help_text = capsys.readouterr().out
    assert all(name in help_text and command.summary in help_text for name, command in COMMANDS.items())
    assert main([]) == 2
    assert capsys.readouterr().out == help_text


def test_help_answers_without_torch_ray_or_pydantic() -> None:
    script = (
        "import sys; from savant_ray.cli import main; main(['--help'])\n"
        "print({'torch', 'ray', 'pydantic', 'rich'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "set()"


@pytest.mark.parametrize("command", ["train", "prepare", "config"])
def test_help_of_a_command_with_settings_lists_each_with_meaning_and_default(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    help_text = " ".join(capsys.readouterr().out.split())
    assert "--config FILE.yaml" in help_text
    for row in setting_rows():
        assert f"--{row.name} {row.meaning} [" in help_text


@pytest.mark.parametrize("command", ["generate", "benchmark"])
def test_help_of_a_command_without_settings_lists_its_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "-h"]) == 0
    assert "--json FILE" in capsys.readouterr().out


def test_an_unknown_command_is_refused_with_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "error: trian: no such command; did you mean train?\n"
    assert main(["xyzzy"]) == 2
    assert (
        "there are train, prepare, runs, status, report, generate, evaluate, export, config, benchmark"
        in capsys.readouterr().err
    )


def test_train_hands_over_the_settings_and_ends_with_the_trainings_exit_code(calls: list[Any]) -> None:
    config = ROOT / "configs" / "quickstart.yaml"
    arguments = ["--training.max_steps", "3", "--training.weight_decay=0", "--run.name", "x"]
    assert main(["train", arguments[0], arguments[1], "--config", str(config), *arguments[2:]]) == STOPPED_EARLY
    assert main(["train", "--fresh", "--allow-changes", "--verbose"]) == STOPPED_EARLY
    assert calls == [
        (load_config(arguments, file=config), {"fresh": False, "allow_changes": False, "verbose": False}),
        (Config(), {"fresh": True, "allow_changes": True, "verbose": True}),
    ]


def test_wrong_settings_are_all_told_and_nothing_is_started(
    calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--training.max_step", "3", "--model.n_heads", "7", "--training.weight_decay", "-1"]) == 2
    assert capsys.readouterr().err == (
        "error: --training.max_step: no such setting; did you mean training.max_steps?\n"
        "       --model.n_heads: 7 does not divide model.dim = 1024\n"
        "       --training.weight_decay: -1 has to be at least 0\n"
    )
    assert calls == []


@pytest.mark.parametrize("error", [CheckpointError("gone"), MemoryCapError("too small")])
def test_a_failure_is_told_in_a_line_and_has_its_exit_code(
    error: Any, calls: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(config: Config, **options: bool) -> int:
        raise error

    monkeypatch.setattr(sys.modules["savant_ray.cluster.driver"], "train", fail)
    assert main(["train"]) == error.exit_code
    assert capsys.readouterr().err == f"error: {error}\n"


def test_ctrl_c_ends_a_command_as_shells_expect(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(config: Config) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["savant_ray.cluster.preparation"], "prepare", interrupt)
    assert main(["prepare"]) == 130


def test_prepare_prepares_what_the_settings_name(calls: list[Any]) -> None:
    assert main(["prepare", "--data.tokenizer", "albert-base-v2"]) == 0
    assert calls == [load_config(["--data.tokenizer", "albert-base-v2"])]


def test_prepare_quickstart_writes_the_text_and_goes_on_only_with_a_config(
    calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", "--quickstart"]) == 0
    assert main(["prepare", "--quickstart", "--force"]) == 0
    assert calls == [(Path("dataset"), False), (Path("dataset"), True)]
    config = ROOT / "configs" / "quickstart.yaml"
    assert main(["prepare", "--quickstart", "--config", str(config)]) == 0
    assert calls[2:] == [(Path("dataset"), False), load_config(file=config)]
    assert main(["prepare", "--force"]) == 2
    assert "--force goes with --quickstart" in capsys.readouterr().err


def test_generate_prints_prompt_and_answer_and_writes_json(
    calls: list[Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ["--max-new-tokens", "9", "--temperature", "0", "--seed", "4", "--loops", "2"]
    file = tmp_path / "answer.json"
    assert main(["generate", "--checkpoint", "run", "--prompt", "X =", *options, "--json", str(file)]) == 0
    assert capsys.readouterr().out == "X = five plus\x1b[2J ten\n"
    assert json.loads(file.read_text()) == {"prompt": "X =", "text": " five plus\x1b[2J ten", "checkpoint": "run"}
    expected = {"max_new_tokens": 9, "temperature": 0.0, "seed": 4, "n_loops": 2}
    assert calls == [(Path("run"), "X =", expected)]


def test_generate_leaves_to_the_checkpoint_what_is_not_given(calls: list[Any]) -> None:
    assert main(["generate", "--checkpoint", "run", "--prompt", "-x"[1:]]) == 0
    assert calls[0][2] == {"max_new_tokens": None, "temperature": None, "seed": 0, "n_loops": None}


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--max-new-tokens", "0", "'0' is not a whole number from 1 to 1,000,000"),
        ("--max-new-tokens", "1000000000", "'1000000000' is not a whole number from 1 to 1,000,000"),
        ("--temperature", "nan", "'nan' is not a number of at least 0"),
        ("--loops", "2.5", "'2.5' is not a whole number from 1 to 1,024"),
        ("--loops", "1000000000", "'1000000000' is not a whole number from 1 to 1,024"),
        (
            "--seed",
            "99999999999999999999",
            "is not a whole number from -9,223,372,036,854,775,808 to 18,446,744,073,709,",
        ),
        ("--seed", "-9223372036854775809", "is not a whole number from"),
        ("--seed", "9" * 5000, f"'{'9' * 40}…' is not a whole number from"),
        ("--seed", "x", "'x' is not a whole number from"),
    ],
)
def test_generate_refuses_numbers_that_make_no_sense(
    option: str, value: str, message: str, calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--checkpoint", "run", "--prompt", "x", f"{option}={value}"]) == 2
    assert calls == []
    assert f"argument {option}: " in (told := capsys.readouterr().err.splitlines()[-1]) and message in told


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**64 - 1])
def test_every_seed_that_is_accepted_is_one_that_text_is_drawn_with(seed: int, calls: list[Any]) -> None:
    assert main(["generate", "--checkpoint", "run", "--prompt", "x", "--seed", str(seed)]) == 0
    assert calls[0][2]["seed"] == seed
    torch.Generator().manual_seed(seed)


def test_generate_says_where_it_could_not_write(
    calls: list[Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "none" / "answer.json"
    assert main(["generate", "--checkpoint", "run", "--prompt", "x", "--json", str(file)]) == 1
    assert capsys.readouterr().err == f"error: --json {file}: No such file or directory\n"


def test_export_hands_over_what_to_write_where_and_tells_what_was_lost(
    calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "run", "--format", "original", "--output", "step_5.pt"]) == 0
    assert calls == [(Path("run"), "original", Path("step_5.pt"))]
    assert capsys.readouterr() == ("step_5.pt is written\n", "warning: no moments\n")


@pytest.mark.parametrize("arguments", [["run"], ["run", "--format", "gguf", "--output", "x"], ["--format", "original"]])
def test_export_refuses_what_it_cannot_do(arguments: list[str], calls: list[Any]) -> None:
    assert main(["export", *arguments]) == 2
    assert calls == []


def test_config_prints_the_complete_result(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--training.max_steps", "5"]) == 0
    printed = capsys.readouterr().out
    assert printed == dump_yaml(load_config(["--training.max_steps", "5"]))
    assert yaml.safe_load(printed)["training"]["max_steps"] == 5


def test_benchmark_runs_the_one_that_is_named(calls: list[Any]) -> None:
    assert main(["benchmark", "step", "--json", "x.json"]) == 0
    assert calls == [("step", Path("x.json"))]


def test_help_of_benchmark_names_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    from savant_ray.benchmarks.registry import BENCHMARKS

    main(["benchmark", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{', '.join(list(BENCHMARKS)[:-1])} or {list(BENCHMARKS)[-1]}; all" in printed


@pytest.mark.parametrize("job", ["train", "prepare", "generate", "benchmark"])
def test_a_job_is_its_command_from_any_folder(job: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"usage: savant {job} ")


def test_a_reader_that_went_away_gets_no_traceback() -> None:
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), "--help"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.stderr == ""
