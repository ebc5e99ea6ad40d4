"""The commands: what they print, which functions they call, and their exit codes."""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

import savant_ray
from savant_ray import streams
from savant_ray.cli import COMMANDS, main
from savant_ray.config import Config, all_settings, dump_yaml, load_config
from savant_ray.driver import resolve_paths
from savant_ray.errors import STOPPED_EARLY, CheckpointError, MemoryCapError, error_context

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def hook_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore the hook for threads: a command that runs in the process of the tests replaces it."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the calls of training, preparation, generation, export and benchmarks, which are replaced by fakes."""
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

    monkeypatch.setattr("savant_ray.driver.train", train)
    monkeypatch.setattr("savant_ray.driver.prepare", lambda config, verbose: made.append(config))
    install("savant_ray.evaluation.from_checkpoint", stream_answer=stream_answer)
    install("savant_ray.original.export", export_original=lambda *options: made.append(options) or ["no moments"])
    install("savant_ray.training.safetensors_export", export_safetensors=lambda *options: made.append(options))
    install("savant_ray.data.quickstart", write_quickstart=lambda folder, force: made.append((folder, force)))
    install("savant_ray.benchmarks.registry", run=lambda name, json_path: made.append((name, json_path)))
    return made


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    help_text = capsys.readouterr().out
    assert all(name in help_text and command.summary in help_text for name, command in COMMANDS.items())
    assert main([]) == 2
    assert capsys.readouterr().out == help_text


def test_help_of_a_command_is_also_printed_by_help_and_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", "export"]) == 0
    help_text = capsys.readouterr().out
    assert main(["export", "--help"]) == 0 and capsys.readouterr().out == help_text
    assert main(["help", "exportt"]) == 2 and "did you mean export?" in capsys.readouterr().err


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"savant_ray {savant_ray.__version__}\n"


def test_help_imports_neither_torch_nor_ray_nor_pydantic() -> None:
    script = (
        "import sys; from savant_ray.cli import main; main(['--help'])\n"
        "print({'torch', 'ray', 'pydantic', 'rich'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "set()"


@pytest.mark.parametrize("command", ["train", "quickstart", "prepare", "config"])
def test_help_of_a_command_with_settings_lists_each_with_meaning_and_default(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    help_text = " ".join(capsys.readouterr().out.split())
    assert ("--config FILE.yaml" in help_text) == (command != "quickstart")
    for row in all_settings():
        assert f"--{row.name} {row.description} [" in help_text


@pytest.mark.parametrize(("command", "arguments"), [("sweep", "--space FILE.yaml"), ("data", "[SOURCE …]")])
def test_the_usage_of_a_command_with_settings_names_its_arguments(
    command: str, arguments: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: savant {command} {arguments} [")


@pytest.mark.parametrize("command", ["generate", "benchmark"])
def test_help_of_a_command_without_settings_lists_its_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "-h"]) == 0
    assert "--json FILE" in capsys.readouterr().out


def test_an_unknown_command_is_refused_with_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "error: trian: no such command; did you mean train?\n"
    assert main(["xyzzy"]) == 2
    assert f"the commands are {', '.join(COMMANDS)}" in capsys.readouterr().err


def test_train_passes_the_settings_and_returns_the_exit_code_of_training(calls: list[Any]) -> None:
    config = ROOT / "configs" / "quickstart.yaml"
    arguments = ["--training.max_steps", "3", "--training.weight_decay=0", "--run.name", "x"]
    assert main(["train", arguments[0], arguments[1], "--config", str(config), *arguments[2:]]) == STOPPED_EARLY
    assert main(["train", "--fresh", "--allow-changes", "--verbose"]) == STOPPED_EARLY
    assert calls == [
        (
            resolve_paths(load_config(arguments, file=config)),
            {"fresh": False, "allow_changes": False, "verbose": False},
        ),
        (resolve_paths(Config()), {"fresh": True, "allow_changes": True, "verbose": True}),
    ]


def test_quickstart_trains_the_shipped_settings_and_ends_with_commands_that_exist(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart.yaml").write_text("run: {name: another}")
    arguments = ["--training.max_steps", "3", "--fresh"]
    assert main(["quickstart", *arguments]) == STOPPED_EARLY
    config = load_config(arguments[:2], file=ROOT / "configs/quickstart.yaml")
    assert calls == [(resolve_paths(config), {"fresh": True, "allow_changes": False, "verbose": False})]
    assert capsys.readouterr().out == "", "a stopped run is not finished"
    assert main(["quickstart", "--config", "savant"]) == 2
    assert "--config: savant quickstart has its own settings file" in capsys.readouterr().err

    monkeypatch.setattr("savant_ray.driver.train", lambda config, **options: 0)
    assert main(["quickstart"]) == 0
    shown = capsys.readouterr().out.partition("To try next:")[2]
    commands = re.findall(r"^  \S*savant (\w+)", shown, re.MULTILINE)
    assert {"generate", "evaluate", "report", "train"} <= set(commands) <= set(COMMANDS)
    assert "--checkpoint checkpoints_quickstart" in shown
    assert "chat checkpoints_quickstart --conversation" in shown, "without the option, messages are continued as text"


@pytest.mark.parametrize("name", ["fresh", "verbose", "config", "-fresh", "allow_changes"])
def test_the_value_of_a_setting_may_look_like_an_option(name: str, calls: list[Any]) -> None:
    assert main(["train", "--run.name", name]) == STOPPED_EARLY
    assert calls[0][0].run.name == name


def test_the_module_of_the_command_line_can_be_run_with_python_m() -> None:
    command = [sys.executable, "-m", "savant_ray.cli", "trian"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: trian: no such command; did you mean train?\n")


def test_all_invalid_settings_are_reported_and_nothing_is_started(
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
def test_an_error_is_printed_in_one_line_and_has_its_exit_code(
    error: Any, calls: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(config: Config, **options: bool) -> int:
        raise error

    monkeypatch.setattr("savant_ray.driver.train", fail)
    assert main(["train"]) == error.exit_code
    assert capsys.readouterr().err == f"error: {error}\n"


def test_an_unexpected_error_is_one_line_and_its_traceback_is_in_a_file_and_printed_by_verbose(
    calls: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(config: Config, **options: bool) -> None:
        with error_context("tokenizing train.jsonl"):
            raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("savant_ray.driver.prepare", fail)
    assert main(["prepare"]) == 1
    printed = capsys.readouterr().err
    (file,) = tmp_path.iterdir()
    assert printed == (
        f"error: while tokenizing train.jsonl: ZeroDivisionError: division by zero (the full traceback is in {file})\n"
    )
    assert "in fail\n" in file.read_text()
    assert main(["prepare", "--verbose"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback (most recent call last)") and "in fail\n" in printed
    assert "\nerror: while tokenizing" in printed


class Panic(BaseException):
    """An exception of a Rust library, which is not an `Exception`."""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (Panic("index out of bounds\nnote: run with RUST_BACKTRACE=1"), "Panic: index out of bounds"),
        (RuntimeError(""), "RuntimeError"),
        (MemoryError(), "MemoryError"),
        (RuntimeError("Traceback (most recent call last):\n  File x\nValueError: the cause"), "ValueError: the cause"),
        (KeyError("x" * 10_000), "KeyError: 'xxx"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_any_exception_is_printed_in_one_line_of_limited_length(
    error: BaseException,
    expected: str,
    calls: list[Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(config: Config, **options: bool) -> None:
        raise error

    monkeypatch.setattr("savant_ray.driver.prepare", fail)
    assert main(["prepare"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: while running savant prepare: ") and expected in printed
    assert printed.count("\n") == 1 and len(printed) < 1000


def test_an_unexpected_error_is_printed_even_if_its_traceback_cannot_be_written(
    calls: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(config: Config, **options: bool) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nothing"))
    monkeypatch.setattr("savant_ray.driver.prepare", fail)
    assert main(["prepare"]) == 1
    assert "division by zero (--verbose prints the full traceback)" in capsys.readouterr().err


def test_an_error_in_a_background_thread_is_a_warning_in_one_line(
    calls: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start_thread(config: Config, **options: bool) -> None:
        thread = threading.Thread(target=lambda: 1 // 0, name="reader")
        thread.start()
        thread.join()

    monkeypatch.setattr("savant_ray.driver.prepare", start_thread)
    assert main(["prepare"]) == 0
    printed = capsys.readouterr().err
    assert printed.startswith("WARNING: the thread reader ended: ZeroDivisionError:") and printed.count("\n") == 1


def test_ctrl_c_ends_a_command_with_exit_code_130(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(config: Config, **options: bool) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("savant_ray.driver.prepare", interrupt)
    assert main(["prepare"]) == 130


def test_prepare_passes_the_settings(calls: list[Any]) -> None:
    assert main(["prepare", "--data.tokenizer", "albert-base-v2"]) == 0
    assert calls == [resolve_paths(load_config(["--data.tokenizer", "albert-base-v2"]))]


def test_prepare_quickstart_writes_the_text_and_prepares_it_only_with_a_config(
    calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", "--quickstart"]) == 0
    assert main(["prepare", "--quickstart", "--force"]) == 0
    assert calls == [(Path("dataset"), False), (Path("dataset"), True)]
    config = ROOT / "configs" / "quickstart.yaml"
    assert main(["prepare", "--quickstart", "--config", str(config)]) == 0
    assert calls[2:] == [(Path("dataset"), False), resolve_paths(load_config(file=config))]
    assert main(["prepare", "--force"]) == 2
    assert "--force requires --quickstart" in capsys.readouterr().err
    assert main(["prepare", "--quickstart", "--data.tokenizer", "gpt2"]) == 2
    assert "settings have no effect" in capsys.readouterr().err


def test_generate_prints_prompt_and_answer_and_writes_json(
    calls: list[Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ["--max-new-tokens", "9", "--temperature", "0", "--seed", "4", "--loops", "2"]
    file = tmp_path / "answer.json"
    assert main(["generate", "--checkpoint", "run", "--prompt", "X =", *options, "--json", str(file)]) == 0
    assert capsys.readouterr().out == "X = five plus\x1b[2J ten\n"
    assert json.loads(file.read_text()) == {"prompt": "X =", "text": " five plus\x1b[2J ten", "checkpoint": "run"}
    expected = {"max_new_tokens": 9, "temperature": 0.0, "seed": 4, "n_loops": 2, "raw_weights": False}
    assert calls == [(Path("run"), "X =", expected)]


def test_generate_uses_the_settings_of_the_checkpoint_for_omitted_options(calls: list[Any]) -> None:
    assert main(["generate", "--checkpoint", "run", "--prompt", "-x"[1:]]) == 0
    assert calls[0][2] == {
        "max_new_tokens": None,
        "temperature": None,
        "seed": 0,
        "n_loops": None,
        "raw_weights": False,
    }


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
def test_generate_refuses_numbers_out_of_range(
    option: str, value: str, message: str, calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--checkpoint", "run", "--prompt", "x", f"{option}={value}"]) == 2
    assert calls == []
    assert f"argument {option}: " in (error_line := capsys.readouterr().err.splitlines()[-1]) and message in error_line


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**64 - 1])
def test_every_accepted_seed_can_seed_a_generator(seed: int, calls: list[Any]) -> None:
    assert main(["generate", "--checkpoint", "run", "--prompt", "x", "--seed", str(seed)]) == 0
    assert calls[0][2]["seed"] == seed
    torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("none/answer.json", "none/answer.json: there is no folder none"),
        (".", ". is a folder"),
        ("x" * 300, "File name too long"),
    ],
)
def test_a_file_that_cannot_be_written_is_named_before_the_answer_is_generated(
    file: str,
    reason: str,
    calls: list[Any],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--checkpoint", "run", "--prompt", "x", "--json", file]) == 2
    assert calls == [] and f"argument --json: {reason}" in capsys.readouterr().err.replace(f"{'x' * 300}: ", "")


def test_export_passes_its_options_and_prints_warnings(calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "run", "--format", "original", "--output", "step_5.pt"]) == 0
    assert main(["export", "run", "--format", "original", "--output", "x.pt", "--optimizer", "adamw8bit"]) == 0
    assert calls == [
        (Path("run"), Path("step_5.pt"), None),
        (Path("run"), Path("x.pt"), "adamw8bit"),
    ]
    assert capsys.readouterr() == ("step_5.pt is written\nx.pt is written\n", "warning: no moments\n" * 2)


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["run", "--format", "gguf", "--output", "x"],
        ["--format", "original"],
        ["run", "--format", "original", "--output", "x", "--optimizer", "sgd"],
        ["run", "--format", "safetensors", "--output", "x", "--optimizer", "adamw"],
    ],
)
def test_export_refuses_invalid_options(arguments: list[str], calls: list[Any]) -> None:
    assert main(["export", *arguments]) == 2
    assert calls == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "run", "--replicas", "-1"], "'-1' is neither a number of at least 1 nor a range such as 1-4"),
        (["serve", "run", "--replicas", "2-"], "'2-' is neither a number of at least 1 nor a range such as 1-4"),
        (["serve", "run", "--replicas", "4-2"], "'2' is not a whole number from 4 to "),
        (["evaluate", "run", "--depths", "1,2", "--loops", "3"], "--depths and --loops exclude each other"),
        (["data", "--sources", "text.jsonl"], "error: --sources: no such setting"),
    ],
)
def test_options_that_have_no_meaning_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_config_prints_the_complete_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--training.max_steps", "5"]) == 0
    printed = capsys.readouterr().out
    assert printed == dump_yaml(load_config(["--training.max_steps", "5"]))
    assert yaml.safe_load(printed)["training"]["max_steps"] == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config", "a.yaml", "--config", "b.yaml"],
            "--config: given twice, a.yaml and b.yaml; use one file (with ",
        ),
        (["--config", ""], "--config: the name of the file is missing"),
        (["--confg", "a.yaml"], "--confg: no such option; did you mean --config?"),
        (["fresh"], "fresh: no such option; did you mean --fresh?"),
        (["--fersh"], "--fersh: no such option; did you mean --fresh?"),
        (["--allow_changes"], "--allow_changes: no such option; did you mean --allow-changes?"),
        (["–config", "a.yaml"], "–config: no such option; did you mean --config?"),
    ],
)
def test_an_invalid_option_is_reported(
    arguments: list[str], message: str, calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert calls == []


def test_environment_variables_that_only_look_like_settings_are_reported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAVANT_LR", "1e-3")
    monkeypatch.setenv("SAVANT_HEAD_SVC_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("SAVANT_API_KEY", "that of savant serve")
    assert main(["config"]) == 0
    output = capsys.readouterr()
    assert yaml.safe_load(output.out) == Config().to_dict()
    assert (
        output.err == "note: SAVANT_LR is not a setting and is ignored; settings look like SAVANT_TRAINING__MAX_STEPS\n"
    )


def test_benchmark_runs_the_named_benchmark(calls: list[Any]) -> None:
    assert main(["benchmark", "step", "--json", "x.json"]) == 0
    assert calls == [("step", Path("x.json"))]


def test_help_of_benchmark_names_all_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    from savant_ray.benchmarks.registry import BENCHMARKS

    main(["benchmark", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{', '.join(list(BENCHMARKS)[:-1])} or {list(BENCHMARKS)[-1]} [all" in printed


@pytest.mark.parametrize("job", ["train", "prepare", "generate", "benchmark"])
def test_a_script_in_jobs_runs_its_command_from_any_folder(job: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"usage: savant {job} ")


RESULTS = [["config"], ["runs", "."], ["runs", ".", "--json"], ["--help"], []]


@pytest.mark.parametrize("arguments", RESULTS)
@pytest.mark.parametrize("redirection", [">&-", "> /dev/full", ">&- <&-"])
def test_a_command_whose_result_cannot_be_printed_fails_with_an_error(
    redirection: str, arguments: list[str], tmp_path: Path
) -> None:
    done = in_a_shell(arguments, redirection, tmp_path)
    assert done.returncode == 1 or (done.returncode, arguments) == (2, [])
    assert done.stderr.startswith("error: standard output cannot be written: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("redirection", ["2>&-", "<&-", "2> /dev/full", "<&- 2>&-"])
def test_a_command_needs_neither_stdin_nor_stderr(redirection: str, tmp_path: Path) -> None:
    done = in_a_shell(["config"], redirection, tmp_path)
    assert done.returncode == 0 and done.stderr == "" and "max_steps: 80000\n" in done.stdout
    assert in_a_shell(["config", "--no.such", "1"], redirection, tmp_path).returncode == 2


@pytest.mark.parametrize("redirection", [">&-", "> /dev/full", ">&- 2>&-", "<&- >&- 2>&-", "> /dev/full 2> /dev/full"])
@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        (["init", "text.jsonl"], "mine.yaml"),
        pytest.param(["prepare", "--quickstart"], "dataset/savant_dataset_train.jsonl", marks=pytest.mark.rare),
    ],
)
def test_a_command_whose_result_is_not_its_output_works_without_stdout(
    arguments: list[str], written: str, redirection: str, tmp_path: Path
) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "one two three"}\n' * 100)
    done = in_a_shell(arguments, redirection, tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert (tmp_path / written).read_text().endswith("\n")


def in_a_shell(arguments: list[str], redirection: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command whose streams the shell redirects, in a folder of its own."""
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from savant_ray.cli import main; sys.exit(main())"
    command = f'exec "$0" "$@" {redirection}'
    return subprocess.run(
        ["bash", "-c", command, sys.executable, "-c", code, str(ROOT), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_child_processes_have_open_streams_even_if_they_were_closed(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys; from savant_ray.streams import open_standard_streams; open_standard_streams()\n"
        "look = 'import os; [os.fstat(descriptor) for descriptor in range(3)]'\n"
        "sys.exit(subprocess.run([sys.executable, '-c', look]).returncode)"
    )
    for redirection in (">&-", "2>&-", "<&-", "<&- >&- 2>&-"):
        command = f'exec "$0" -c "$1" {redirection}'
        done = subprocess.run(["bash", "-c", command, sys.executable, script], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), redirection


def test_a_non_blocking_pipe_receives_the_complete_output(tmp_path: Path) -> None:
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)  # less than is printed
    os.set_blocking(write, False)
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), "--help"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, text=True) as job:
        os.close(write)
        with os.fdopen(read) as pipe:
            printed = pipe.read()
        assert job.wait() == 0 and job.stderr is not None and job.stderr.read() == ""
    assert len(printed) > 4096 and "reporting.wandb" in printed


def test_a_training_whose_output_nobody_reads_continues_and_marks_where_lines_are_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streams, "BLOCKED_SECONDS", 0.1)
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 8192)
    output = streams.Output(write, tolerant=True)
    stream = io.TextIOWrapper(io.BufferedWriter(output), write_through=True)
    for number in range(10_000):  # would block for ever if it waited for a reader
        print(f"step {number}", file=stream, flush=True)
    received = os.read(read, 8192).decode()
    assert received.startswith("step 0\nstep 1\n") and "step 9999" not in received
    print("saved step_9999", file=stream, flush=True)
    received = os.read(read, 8192).decode()
    assert "lines are missing here" in received and received.endswith("saved step_9999\n")
    assert output.error is None
    os.close(read)
    os.close(write)


def test_arguments_that_are_not_utf_8_are_reported(tmp_path: Path) -> None:
    odd = os.fsdecode(b"dog\xe9")
    for arguments in (
        ["config", "--run.name", odd],
        ["train", f"--data.validation={odd}.jsonl"],
        ["generate", "--checkpoint", "run", "--prompt", odd],
    ):
        done = in_a_shell(arguments, "", tmp_path)
        assert done.returncode == 2 and "dog\\xe9" in done.stderr and "is not UTF-8 text" in done.stderr
        assert "Traceback" not in done.stderr
    for arguments in (["report", odd], ["status", odd], ["train", "--config", odd], ["evaluate", odd], [odd]):
        done = in_a_shell(arguments, "", tmp_path)
        assert done.returncode in (2, 4) and "dog\\" in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr


def test_runs_are_listed_for_a_user_without_a_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    monkeypatch.chdir(tmp_path)
    assert main(["runs"]) == 0
    assert capsys.readouterr().out.startswith("no runs found")


def test_folders_to_search_for_runs_must_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["runs", str(tmp_path / "empty")]) == 0
    assert main(["runs", str(tmp_path / "empty"), str(tmp_path / "nowhere")]) == 2
    assert f"{tmp_path}/nowhere: no such folder" in capsys.readouterr().err


def test_writing_to_a_closed_pipe_prints_no_traceback() -> None:
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), "--help"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.stderr == ""


@pytest.mark.parametrize(
    "command",
    [
        ["train"],
        ["prepare"],
        ["generate", "--checkpoint", "/nothing", "--prompt", "x"],
        ["evaluate", "/nothing"],
        ["export", "/nothing", "--format", "original", "--output", "/nothing/x"],
        ["benchmark", "data"],
    ],
)
def test_a_deleted_working_directory_is_reported(command: list[str], tmp_path: Path) -> None:
    script = 'cd "$0" && rmdir "$0" && exec "$@"'
    code = f"import sys; from savant_ray.cli import main; sys.exit(main({command!r}))"
    words = [sys.executable, "-P", "-c", code]
    path = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", script, str(tmp_path), *words], env=os.environ | path, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("error: the working directory does not exist any more")
