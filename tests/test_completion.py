"""The scripts of `savant completion`: bash executes its own; those of zsh and fish have the same words."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from savant_ray.cli import COMMANDS, main
from savant_ray.config import all_settings
from savant_ray.settings.files import shipped_files


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


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_command_and_setting_is_in_the_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = set(re.split(r"[\s'\"]+", script(shell, capsys)))
    assert set(COMMANDS) <= words
    dashes = "" if shell == "fish" else "--"
    assert {f"{dashes}{setting.name}" for setting in all_settings()} <= words
