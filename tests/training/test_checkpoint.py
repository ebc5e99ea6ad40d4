"""A checkpoint is complete or absent, and newest means the highest number."""

from __future__ import annotations

import hashlib
import json
import random
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from savant_ray.errors import CheckpointError
from savant_ray.training.checkpoint import (
    FORMAT_VERSION,
    checkpoints,
    find_checkpoint,
    newest_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from tests.training.tiny import Code


def write(run: Path, step: int) -> Path:
    savant = {"data_fingerprint": "abc", "format_version": FORMAT_VERSION}
    content = {"step": step, "model_state_dict": {"w": torch.arange(100.0)}, "savant": savant}
    return write_checkpoint(run, content, {"config.yaml": "a: 1\n", "tokenizer.json": "{}"})


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    content = read_checkpoint(write(tmp_path, 500))
    assert content["step"] == 500 and torch.equal(content["model_state_dict"]["w"], torch.arange(100.0))
    assert sorted(p.name for p in (tmp_path / "step_500").iterdir()) == [
        "config.yaml", "manifest.json", "step_500.pt", "tokenizer.json",
    ]  # fmt: skip
    assert not list(tmp_path.glob("*.tmp"))


def test_a_format_of_later_is_refused_and_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "FORMAT_VERSION", 2)
    later = write(tmp_path, 1)
    with pytest.raises(CheckpointError, match="step_1: its format is version 2, this program reads version 1"):
        read_checkpoint(later)
    assert newest_checkpoint(tmp_path) == later


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


@pytest.mark.parametrize("name", ["step_7.pt", "config.yaml", "tokenizer.json", "manifest.json"])
def test_a_file_cut_anywhere_or_with_any_byte_flipped_is_never_loaded(name: str, tmp_path: Path) -> None:
    file = write(tmp_path, 7) / name
    whole, chance = file.read_bytes(), random.Random(name)
    cuts = [whole[: len(whole) * tenth // 10] for tenth in range(10)]
    places = [chance.randrange(len(whole)) for _ in range(30)]
    flips = [whole[:at] + bytes([whole[at] ^ 1 << chance.randrange(8)]) + whole[at + 1 :] for at in places]
    for altered in cuts + flips:
        file.write_bytes(altered)
        if name == "manifest.json" and same_json(altered, whole):  # a blank became another blank
            continue
        with pytest.raises(CheckpointError, match="checkpoint step_7"):
            read_checkpoint(tmp_path / "step_7")
    file.write_bytes(whole)
    assert read_checkpoint(tmp_path / "step_7")["step"] == 7


def same_json(altered: bytes, whole: bytes) -> bool:
    try:
        return json.loads(altered) == json.loads(whole)
    except ValueError:
        return False


def test_a_missing_file_is_named_even_if_it_was_empty(tmp_path: Path) -> None:
    content = {"step": 7, "model_state_dict": {}, "savant": {"data_fingerprint": "abc"}}
    folder = write_checkpoint(tmp_path, content, {"records.jsonl": ""})
    (folder / "records.jsonl").unlink()
    with pytest.raises(CheckpointError, match=r"^checkpoint step_7: records\.jsonl is missing$"):
        read_checkpoint(folder)
    (folder / "records.jsonl").mkdir()
    with pytest.raises(CheckpointError, match=r"records\.jsonl is missing"):
        read_checkpoint(folder)


def test_a_renamed_folder_is_refused_and_a_link_to_it_or_a_dot_is_not(tmp_path: Path, monkeypatch: Any) -> None:
    folder = write(tmp_path, 7)
    (tmp_path / "best").symlink_to(folder)
    assert read_checkpoint(find_checkpoint(tmp_path / "best"))["step"] == 7
    monkeypatch.chdir(folder)
    assert read_checkpoint(find_checkpoint(Path()))["step"] == 7
    folder.rename(tmp_path / "step_8")
    with pytest.raises(CheckpointError, match=r"does not list step_8\.pt; was the folder renamed\?"):
        read_checkpoint(tmp_path / "step_8")


def signed(folder: Path, **changes: Any) -> None:
    """The manifest with changes, and a sum that is right for them."""
    manifest = {**json.loads((folder / "manifest.json").read_text()), **changes}
    manifest = {key: value for key, value in manifest.items() if value is not None and key != "sha256"}
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("files", [None, {}, [], 3, {"step_7.pt": 3}, {"step_7.pt": {"bytes": 1}}, {"../x": {}}])
def test_a_manifest_of_another_shape_is_refused_though_its_sum_is_right(files: Any, tmp_path: Path) -> None:
    folder = write(tmp_path, 7)
    signed(folder)
    assert read_checkpoint(folder)["step"] == 7
    signed(folder, files=files)
    with pytest.raises(CheckpointError, match="^checkpoint step_7: "):
        read_checkpoint(folder)


def test_a_manifest_of_brackets_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, 7)
    (folder / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="manifest.json is not what was written"):
        read_checkpoint(folder)


def test_code_in_a_checkpoint_is_refused_and_not_executed_though_its_sums_are_right(tmp_path: Path) -> None:
    folder = write(tmp_path, 7)
    weights = folder / "step_7.pt"
    torch.save({"step": 7, "extra": Code(tmp_path / "executed")}, weights)
    sums = {"bytes": weights.stat().st_size, "sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}
    signed(folder, files={"step_7.pt": sums})
    with pytest.raises(CheckpointError, match="could execute code"):
        read_checkpoint(folder)
    assert not (tmp_path / "executed").exists()


def test_storage_that_refuses_leaves_the_older_checkpoint_whole(tmp_path: Path) -> None:
    write(tmp_path, 1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))  # as on a full disk: no file beyond 100 bytes
    try:
        with pytest.raises(OSError):
            write(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert newest_checkpoint(tmp_path) == tmp_path / "step_1" and read_checkpoint(tmp_path / "step_1")["step"] == 1
    assert not list(tmp_path.glob("*.tmp")), "and takes no room"
    assert read_checkpoint(write(tmp_path, 2))["step"] == 2


def test_writing_again_replaces_what_a_dead_run_left(tmp_path: Path) -> None:
    (write(tmp_path, 7) / "manifest.json").unlink()
    (tmp_path / "step_7" / "stale").write_text("x")
    assert not (write(tmp_path, 7) / "stale").exists()
