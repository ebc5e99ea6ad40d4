"""A checkpoint is complete or absent, and newest means the highest number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from savant_ray.errors import CheckpointError
from savant_ray.training.checkpoint import (
    checkpoints,
    find_checkpoint,
    newest_checkpoint,
    read_checkpoint,
    write_checkpoint,
)


def write(run: Path, step: int) -> Path:
    return write_checkpoint(run, {"step": step, "model_state_dict": {"w": torch.arange(100.0)}}, "a: 1\n", "{}")


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    content = read_checkpoint(write(tmp_path, 500))
    assert content["step"] == 500 and torch.equal(content["model_state_dict"]["w"], torch.arange(100.0))
    assert sorted(p.name for p in (tmp_path / "step_500").iterdir()) == [
        "config.yaml", "manifest.json", "step_500.pt", "tokenizer.json",
    ]  # fmt: skip
    assert not list(tmp_path.glob("*.tmp"))


def test_the_newest_is_the_highest_number_not_the_last_name(tmp_path: Path) -> None:
    for step in (9900, 10000, 500):
        write(tmp_path, step)
    assert [p.name for p in checkpoints(tmp_path)] == ["step_500", "step_9900", "step_10000"]
    assert find_checkpoint(tmp_path) == newest_checkpoint(tmp_path) == tmp_path / "step_10000"
    assert find_checkpoint(tmp_path / "step_500") == tmp_path / "step_500"


def test_a_folder_without_a_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (write(tmp_path, 2) / "manifest.json").unlink()
    (tmp_path / "step_3.tmp").mkdir()
    assert newest_checkpoint(tmp_path) == tmp_path / "step_1"
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        find_checkpoint(tmp_path / "step_2")


def test_a_file_cut_short_or_altered_is_named(tmp_path: Path) -> None:
    file = write(tmp_path, 7) / "step_7.pt"
    whole = file.read_bytes()
    file.write_bytes(whole[:1000])
    with pytest.raises(CheckpointError, match=r"step_7\.pt has 1,000 of"):
        read_checkpoint(tmp_path / "step_7")
    file.write_bytes(whole[:600] + bytes([whole[600] ^ 1]) + whole[601:])
    with pytest.raises(CheckpointError, match="SHA-256"):
        read_checkpoint(tmp_path / "step_7")


def test_writing_again_replaces_what_a_dead_run_left(tmp_path: Path) -> None:
    (write(tmp_path, 7) / "manifest.json").unlink()
    (tmp_path / "step_7" / "stale").write_text("x")
    assert not (write(tmp_path, 7) / "stale").exists()
