"""Files of the original script that are damaged, have another content or contain code are refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from savant_ray.errors import CheckpointError
from savant_ray.original.file import read_file, write_original
from savant_ray.original.names import original_files
from savant_ray.training.checkpoint import write_checkpoint
from tests.original.program import AdamW8bit, OriginalProgram
from tests.original.test_file import loaded, original_config, trained
from tests.training.tiny import Code, tiny_state


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return trained(3, optimizer=AdamW8bit).save(tmp_path_factory.mktemp("original")).read_bytes()


def refused_or_the_same(path: Path, altered: bytes, expected: dict[str, Any]) -> bool:
    """Return whether the altered file is refused; fail if it is loaded with other content."""
    path.write_bytes(altered)
    try:
        content = read_file(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        return True
    torch.testing.assert_close(content, expected, rtol=0, atol=0)
    return False


def test_a_file_truncated_anywhere_is_refused(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "step_2.pt"
    for tenth in range(10):
        path.write_bytes(whole[: len(whole) * tenth // 10])
        with pytest.raises(CheckpointError, match=r"step_2\.pt: truncated, altered or not written by torch\.save"):
            read_file(path)


def flipped(whole: bytes, at: int, bit: int) -> bytes:
    return whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :]


def test_a_flipped_byte_is_refused_or_changes_nothing(whole: bytes, tmp_path: Path) -> None:
    path, chance = tmp_path / "step_2.pt", random.Random(5)
    path.write_bytes(whole)
    expected = read_file(path)
    places = [chance.randrange(len(whole)) for _ in range(100)]
    assert sum(refused_or_the_same(path, flipped(whole, at, chance.randrange(8)), expected) for at in places) > 50


def test_any_flipped_bit_in_the_files_directory_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "step_2.pt"
    weights = {"embed.weight": torch.arange(4.0), "head.weight": torch.ones(3)}
    torch.save(dict(step=2, model_state_dict=weights, optimizer_state_dict={}, scheduler_state_dict={}), path)
    whole, expected = path.read_bytes(), read_file(path)
    local = whole.rindex(b"PK\x03\x04", 0, whole.index(b"data/0"))
    entry = whole.rindex(b"PK\x01\x02", 0, whole.rindex(b"data/0"))
    headers = [*range(local, local + 50), *range(entry, entry + 60)]  # names, sizes, offsets: not protected by a CRC
    refused = sum(refused_or_the_same(path, flipped(whole, at, bit), expected) for at in headers for bit in range(8))
    assert refused > 300


def test_a_changed_number_in_a_weight_is_refused(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "step_2.pt"
    path.write_bytes(whole)
    weight = read_file(path)["model_state_dict"]["embed.weight"].numpy().tobytes()
    at = whole.index(weight) + len(weight) // 2
    path.write_bytes(flipped(whole, at, 0))
    assert torch.load(path, weights_only=True)["step"] == 2, "PyTorch does not notice"
    with pytest.raises(CheckpointError, match="altered since it was written"):
        read_file(path)


def test_the_weights_of_a_savant_ray_checkpoint_without_its_folder_are_refused(tmp_path: Path) -> None:
    config = original_config(max_steps=3)
    folder = write_checkpoint(tmp_path / "run", tiny_state(config).to_checkpoint() | {"step": 3}, {})
    with pytest.raises(CheckpointError, match="use the complete folder step_N"):
        read_file((folder / "step_3.pt").rename(tmp_path / "step_3.pt"))


def test_code_in_a_file_is_refused_and_not_executed(tmp_path: Path) -> None:
    path = tmp_path / "step_1.pt"
    torch.save(trained(2).content() | {"extra": Code(tmp_path / "executed")}, path)
    with pytest.raises(CheckpointError, match="could execute code"):
        read_file(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"step": None}, "its step is None"),
        ({"step": -1}, "its step is -1"),
        ({"step": 7}, r"contains step 7: rename it to step_7\.pt"),
        ({"model_state_dict": [1]}, "no weights by name"),
        ({"model_state_dict": {"embed.weight": 3}}, "no weights by name"),
        ({"model_state_dict": {"embed.weight": torch.ones(3, dtype=torch.complex64)}}, "no weights by name"),
    ],
)
def test_a_file_that_was_not_written_by_the_original_is_refused(
    changes: dict[str, Any], pattern: str, tmp_path: Path
) -> None:
    torch.save(trained(2).content() | changes, tmp_path / "step_1.pt")
    with pytest.raises(CheckpointError, match=pattern):
        read_file(tmp_path / "step_1.pt")


def test_missing_keys_are_named(tmp_path: Path) -> None:
    path = tmp_path / "step_1.pt"
    torch.save({"step": 1, "scheduler_state_dict": {}}, path)
    with pytest.raises(CheckpointError, match="model_state_dict, optimizer_state_dict missing"):
        read_file(path)
    torch.save([1], path)
    with pytest.raises(CheckpointError, match="it holds a list"):
        read_file(path)
    with pytest.raises(CheckpointError, match="no such file"):
        read_file(tmp_path / "step_2.pt")


def test_other_weight_shapes_are_refused_as_in_savant_ray_checkpoints(tmp_path: Path) -> None:
    content = trained(2).content()
    content["model_state_dict"]["embed.weight"] = torch.zeros(60, 16)
    torch.save(content, tmp_path / "step_1.pt")
    with pytest.raises(CheckpointError, match=r"embed\.weight is \[60, 16\], the model's \[50, 16\]"):
        loaded(tmp_path / "step_1.pt")


# --- in the run folder


def write_step(folder: Path, step: int) -> Path:
    torch.save(OriginalProgram().content() | {"step": step}, folder / f"step_{step}.pt")
    return folder / f"step_{step}.pt"


def test_files_of_the_original_are_sorted_by_number_and_found_only_directly_in_the_folder(tmp_path: Path) -> None:
    files = [write_step(tmp_path, step) for step in (9900, 10000, 500)]
    (tmp_path / "step_7").mkdir()
    write_step(tmp_path / "step_7", 7)
    for name in ("step_x.pt", "step_5.pt.part", "last.pt"):
        (tmp_path / name).touch()
    assert original_files(tmp_path) == [files[2], files[0], files[1]]
    assert original_files(tmp_path / "step_7") == [], "a checkpoint of savant_ray without its manifest"
    copied = (tmp_path / "step_7").rename(tmp_path / "best")
    (copied / "manifest.json").touch()
    assert original_files(copied) == [], "a renamed copy of a checkpoint of savant_ray"


def test_a_failed_write_leaves_the_older_file_intact(tmp_path: Path) -> None:
    path = write_step(tmp_path, 5)
    before = path.read_bytes()
    content = read_file(path)
    tmp_path.joinpath("step_6.pt").mkdir()
    with pytest.raises(OSError):
        write_original(tmp_path / "step_6.pt", content)
    assert path.read_bytes() == before and not list(tmp_path.glob(".*"))
