"""Paths and URIs are parsed in the same way in all settings and options, and errors name the setting."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from savant_ray.cli import main
from savant_ray.config import Config, load_config
from savant_ray.data.tokenizer import Tokenizer
from savant_ray.errors import CheckpointError, DataError, SettingsError
from savant_ray.locations import create_writable_folder, printable, working_directory
from savant_ray.storage.paths import with_absolute_paths
from savant_ray.storage.run_storage import local_checkpoint, run_storage

SETTINGS = (
    "run.storage_path",
    "run.init_from",
    "run.continue_from",
    "data.cache_dir",
    "data.validation",
    "data.tokenizer",
)


def settings(name: str, value: str) -> Config:
    return load_config([f"--{name}", value], environment={})


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("~nosuchuser/x", "there is no user nosuchuser"),
        ("a\0b", "NUL"),
        ("file:///a%00b", "NUL"),
        ("file://host/x", "without the name of a machine (host)"),
        ("file:x", "file:///absolute/path"),
        ("file:///r%E9sum", "is not UTF-8"),
    ],
)
def test_a_setting_that_cannot_be_a_path_is_named(name: str, value: str, reason: str) -> None:
    with pytest.raises(SettingsError) as error:
        with_absolute_paths(settings(name, value), Path("/in"), Path("/out"))
    assert str(error.value).startswith(f"{name}: ") and reason in str(error.value) and str(error.value).isprintable()


def test_an_invalid_path_in_a_list_is_named_by_its_index() -> None:
    config = load_config(["--data.sources", "[{path: [a, ~nosuchuser/b], weight: 1}]"], environment={})
    with pytest.raises(SettingsError, match=r"data\.sources\[0\]\.path\[1\]: ~nosuchuser/b: there is no user"):
        with_absolute_paths(config, Path("/in"), Path("/out"))


@pytest.mark.parametrize("uri", ["file:///a%20b/%5Bc%5D", "file:/a%20b/%5Bc%5D", "FILE://localhost/a%20b/[c]"])
def test_a_file_uri_is_a_path_in_every_setting(uri: str) -> None:
    together = [name for name in SETTINGS if name != "run.continue_from"]  # not together with run.init_from
    arguments = [argument for name in together for argument in (f"--{name}", uri)]
    config = with_absolute_paths(load_config(arguments, environment={}), Path("/in"), Path("/out"))
    other = with_absolute_paths(settings("run.continue_from", uri), Path("/in"), Path("/out"))
    assert other.run.continue_from == "/a b/[c]"
    assert (config.run.storage_path, config.run.init_from, config.data.cache_dir) == ("/a b/[c]",) * 3
    assert (config.data.validation, config.data.tokenizer) == ("/a b/[c]",) * 2
    assert run_storage(config).location == f"/a b/[c]/{config.run.name}"
    with local_checkpoint(uri) as path:
        assert path == Path("/a b/[c]")


def test_a_tilde_is_expanded_behind_an_equals_sign_and_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = with_absolute_paths(settings("run.storage_path", "~/runs"), Path("/in"), Path("/out"))
    assert config.run.storage_path == f"{tmp_path}/runs"
    (tmp_path / "my.yaml").write_text("run: {seed: 7}")
    assert main(["config", "--config=~/my.yaml"]) == 0


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--config", "PATH"],
        ["evaluate", "run", "--json", "PATH"],
        ["evaluate", "run", "--problems", "PATH"],
        ["export", "run", "--format", "original", "--output", "PATH"],
        ["generate", "--prompt", "x", "--checkpoint", "run", "--json", "PATH"],
        ["status", "PATH"],
        ["report", "PATH"],
        ["runs", "PATH"],
        ["benchmark", "--json", "PATH"],
    ],
)
@pytest.mark.parametrize("path", ["~nosuchuser/x", "s3://bucket/x", "file://host/x", "r\udce9sum"])
def test_an_option_that_cannot_be_a_path_is_named(
    command: list[str], path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([path if word == "PATH" else word for word in command]) == 2
    assert printable(path) in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "checkpoint", ["~nosuchuser/x", "a\0b", "file://host/x", "x" * 300, "r\udce9sum", "hf://nonsense"]
)
def test_a_checkpoint_that_cannot_exist_is_named(checkpoint: str) -> None:
    with pytest.raises(CheckpointError, match=r"^(checkpoint: |hf://nonsense)"), local_checkpoint(checkpoint):
        pass


@pytest.mark.parametrize("name", ["~nosuchuser/x", "x" * 300, "a\0b"])
def test_a_tokenizer_that_cannot_exist_is_named(name: str) -> None:
    with pytest.raises(DataError, match="^tokenizer"):
        Tokenizer.load(name)


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, reason in {"file": "File exists", "file/x": "Not a directory", "x" * 300: "File name too long"}.items():
        with pytest.raises(SettingsError, match=f"data.cache_dir: .* cannot be used as a folder: {reason}"):
            create_writable_folder(tmp_path / name, "data.cache_dir")
    create_writable_folder(tmp_path / "new/er", "data.cache_dir")
    assert (tmp_path / "new/er").is_dir()


def test_a_working_directory_whose_name_is_not_utf8_is_named() -> None:
    with pytest.raises(SettingsError, match=r"run\.storage_path: /r\\xe9sum: this name is not UTF-8"):
        with_absolute_paths(Config(), Path("/in"), Path(os.fsdecode(b"/r\xe9sum")))


def test_a_deleted_working_directory_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SettingsError, match="does not exist any more"):
        working_directory()
    assert main(["status", "run"]) == 2
    assert "the working directory does not exist any more" in capsys.readouterr().err
