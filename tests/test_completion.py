"""The scripts of `savant completion`: each shell that is installed executes its own; all have the same words."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from savant_ray.cli import COMMANDS, main
from savant_ray.config import all_settings
from savant_ray.settings.files import shipped_files
from tests.terminal import ended, read_until, start_in_terminal


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.fixture
def complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Return a function that returns what bash completes the last word of a command line to."""
    (tmp_path / "script").write_text(script("bash", capsys))
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "text.jsonl").touch()

    def completions(*words: str) -> list[str]:
        code = 'source ./script; COMP_WORDS=(savant "$@"); COMP_CWORD=$#; _savant; printf "%s\\n" "${COMPREPLY[@]}"'
        done = subprocess.run(["bash", "-uc", code, "bash", *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        return [line for line in done.stdout.splitlines() if line]

    return completions


def test_bash_completes_commands_options_settings_and_shipped_files(complete) -> None:
    assert complete("") == list(COMMANDS)
    assert complete("qui") == ["quickstart"]
    assert complete("train", "--fr") == ["--fresh"]
    assert complete("train", "--training.max_s") == ["--training.max_steps", "--training.max_skipped_steps"]
    assert complete("train", "--config", "") == [*shipped_files(), "mine.yaml"]
    assert complete("export", "RUN", "--format", "") == ["original", "safetensors", "hf"]
    assert complete("completion", "") == ["bash", "zsh", "fish"]
    assert "--config" not in complete("quickstart", "--"), "it has its own"
    assert complete("evaluate", "") == [], "files, which are bash's default"


def test_bash_completes_names_of_settings_files_with_spaces(complete, tmp_path: Path) -> None:
    (tmp_path / "my own settings.yaml").touch()
    assert sorted(complete("train", "--config", "m")) == ["mine.yaml", "my own settings.yaml"]


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_completes_commands_options_settings_and_shipped_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "script").write_text(script("fish", capsys))
    (tmp_path / "my own.yaml").touch()

    def complete(line: str) -> list[str]:
        code = "source ./script; complete --do-complete $argv"
        variables = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
        done = subprocess.run(["fish", "-c", code, line], cwd=tmp_path, env=variables, capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        return [shown.partition("\t")[0] for shown in done.stdout.splitlines()]

    assert set(complete("savant ")) == set(COMMANDS)
    assert complete("savant qui") == ["quickstart"]
    assert set(complete("savant train --training.max_s")) == {"--training.max_steps", "--training.max_skipped_steps"}
    assert {*shipped_files(), "my own.yaml"} <= set(complete("savant train --config "))
    assert complete("savant export RUN --format s") == ["safetensors"]
    assert set(complete("savant completion ")) == {"bash", "zsh", "fish"}
    assert "my own.yaml" in complete("savant evaluate ")


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("qui", "quickstart "),
        ("train --fr", "train --fresh "),
        ("train --training.max_st", "train --training.max_steps "),
        ("train --config quic", "train --config quickstart "),
        ("train --config my", "train --config my\\ own.yaml "),
        ("export RUN --format s", "export RUN --format safetensors "),
        ("completion fi", "completion fish "),
        ("evaluate my", "evaluate my\\ own.yaml "),
    ],
)
def test_zsh_completes_commands_options_settings_and_shipped_files(
    typed: str, completed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my own.yaml").touch()
    (tmp_path / ".zshrc").write_text(f"autoload -U compinit && compinit -u\n{script('zsh', capsys)}\nPS1='ready> '\n")
    variables = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "TERM": "dumb"}
    shell, terminal = start_in_terminal([shutil.which("zsh") or "", "-d", "-i"], tmp_path, variables)
    read_until(terminal, "ready> ", 60)
    os.write(terminal, f"savant {typed}\t".encode())
    assert f"savant {completed}" in read_until(terminal, completed, 60)
    os.write(terminal, b"\x15exit\n")
    os.close(terminal)
    ended(shell)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_command_and_setting_is_in_the_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = set(re.split(r"[\s'\"]+", script(shell, capsys)))
    assert set(COMMANDS) <= words
    dashes = "" if shell == "fish" else "--"
    assert {f"{dashes}{setting.name}" for setting in all_settings()} <= words
