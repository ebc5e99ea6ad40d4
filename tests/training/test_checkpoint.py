"""A checkpoint is complete or absent, and the newest has the highest step number."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import resource
import stat
import subprocess
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
    remove_unfinished,
    write_checkpoint,
)
from tests.training.tiny import Code

ROOT = Path(__file__).parents[2]


def write(run: Path, step: int, first: float = 0.0) -> Path:
    savant = {"data_fingerprint": "abc", "format_version": FORMAT_VERSION}
    content = {"step": step, "model_state_dict": {"w": torch.arange(100.0) + first}, "savant": savant}
    return write_checkpoint(run, content, {"config.yaml": "a: 1\n", "tokenizer.json": "{}"})


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    content = read_checkpoint(write(tmp_path, 500))
    assert content["step"] == 500 and torch.equal(content["model_state_dict"]["w"], torch.arange(100.0))
    assert sorted(p.name for p in (tmp_path / "step_500").iterdir()) == [
        "config.yaml", "manifest.json", "step_500.pt", "tokenizer.json",
    ]  # fmt: skip
    assert not list(tmp_path.glob("*.tmp"))


def test_a_newer_format_version_is_refused_and_left_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "FORMAT_VERSION", 2)
    later = write(tmp_path, 1)
    with pytest.raises(CheckpointError, match="step_1: its format is version 2, this program reads version 1"):
        read_checkpoint(later)
    assert newest_checkpoint(tmp_path) == later


def test_the_newest_checkpoint_has_the_highest_step_not_the_last_name(tmp_path: Path) -> None:
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
    with pytest.raises(CheckpointError, match=r"no checkpoint there \(looked for manifest\.json"):
        find_checkpoint(tmp_path / "step_2")
    with pytest.raises(CheckpointError, match=r"no checkpoint there \(there is no such file or folder\)"):
        find_checkpoint(tmp_path / "misspelt")


def test_a_truncated_or_altered_file_is_named(tmp_path: Path) -> None:
    file = write(tmp_path, 7) / "step_7.pt"
    whole = file.read_bytes()
    file.write_bytes(whole[:1000])
    with pytest.raises(CheckpointError, match=r"step_7\.pt has 1,000 of"):
        read_checkpoint(tmp_path / "step_7")
    file.write_bytes(whole[:600] + bytes([whole[600] ^ 1]) + whole[601:])
    with pytest.raises(CheckpointError, match="SHA-256"):
        read_checkpoint(tmp_path / "step_7")


@pytest.mark.parametrize("name", ["step_7.pt", "config.yaml", "tokenizer.json", "manifest.json"])
def test_a_file_truncated_anywhere_or_with_any_byte_flipped_is_never_loaded(name: str, tmp_path: Path) -> None:
    file = write(tmp_path, 7) / name
    whole, chance = file.read_bytes(), random.Random(name)
    cuts = [whole[: len(whole) * tenth // 10] for tenth in range(10)]
    places = [chance.randrange(len(whole)) for _ in range(30)]
    flips = [whole[:at] + bytes([whole[at] ^ 1 << chance.randrange(8)]) + whole[at + 1 :] for at in places]
    for altered in cuts + flips:
        file.write_bytes(altered)
        if name == "manifest.json" and same_json(altered, whole):  # one whitespace character became another
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
    """Change the manifest and its hash accordingly."""
    manifest = {**json.loads((folder / "manifest.json").read_text()), **changes}
    manifest = {key: value for key, value in manifest.items() if value is not None and key != "sha256"}
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("files", [None, {}, [], 3, {"step_7.pt": 3}, {"step_7.pt": {"bytes": 1}}, {"../x": {}}])
def test_a_manifest_of_another_structure_is_refused_although_its_hash_is_right(files: Any, tmp_path: Path) -> None:
    folder = write(tmp_path, 7)
    signed(folder)
    assert read_checkpoint(folder)["step"] == 7
    signed(folder, files=files)
    with pytest.raises(CheckpointError, match="^checkpoint step_7: "):
        read_checkpoint(folder)


def test_a_manifest_of_brackets_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, 7)
    (folder / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="manifest.json was altered"):
        read_checkpoint(folder)


def test_code_in_a_checkpoint_is_refused_and_not_executed_although_its_hashes_are_right(tmp_path: Path) -> None:
    folder = write(tmp_path, 7)
    weights = folder / "step_7.pt"
    torch.save({"step": 7, "extra": Code(tmp_path / "executed")}, weights)
    sums = {"bytes": weights.stat().st_size, "sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}
    signed(folder, files={"step_7.pt": sums})
    with pytest.raises(CheckpointError, match="could execute code"):
        read_checkpoint(folder)
    assert not (tmp_path / "executed").exists()


def test_a_failing_storage_leaves_the_older_checkpoint_intact(tmp_path: Path) -> None:
    write(tmp_path, 1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))  # as on a full disk: no file beyond 100 bytes
    try:
        with pytest.raises(OSError):
            write(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert newest_checkpoint(tmp_path) == tmp_path / "step_1" and read_checkpoint(tmp_path / "step_1")["step"] == 1
    assert not list(tmp_path.glob("*.tmp")), "it leaves no partial files"
    assert read_checkpoint(write(tmp_path, 2))["step"] == 2


def test_writing_again_replaces_what_a_killed_run_left(tmp_path: Path) -> None:
    (write(tmp_path, 7) / "manifest.json").unlink()
    (tmp_path / "step_7" / "stale").write_text("x")
    assert not (write(tmp_path, 7) / "stale").exists()


# Writes step_7 again in a child process. There the Nth file operation fails (or all from the Nth on), or kills the process.
INTERRUPTED = """
import os, shutil, sys
from pathlib import Path
from tests.training.test_checkpoint import write

run, whole, how = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
WATCHED = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "shutil.rmtree")
for at in range(1, 200):
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(whole, run)
    child = os.fork()
    if child == 0:
        count = 0

        def interrupt(name):
            global count
            count += 1
            if count == at and how == "dies":
                os._exit(9)
            if count == at or (count > at and how == "stays broken"):
                raise OSError(28, "no space left", name)

        def watch(event, arguments):
            if event in WATCHED and str(arguments[0]).startswith(str(run)):
                interrupt(event)

        fsync = os.fsync
        os.fsync = lambda file: (interrupt("fsync"), fsync(file))
        sys.addaudithook(watch)
        try:
            write(run, 7, 2.0)
        except OSError:
            os._exit(8)
        os._exit(0 if count < at else 7)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    shutil.copytree(run, run.with_name(f"after-{at}-{code}"), symlinks=True)
    if code == 0:
        break
"""


@pytest.mark.parametrize("how", ["dies", "fails once", "stays broken"])
def test_wherever_a_replacement_is_interrupted_the_old_or_the_new_checkpoint_is_intact(
    how: str, tmp_path: Path
) -> None:
    write(tmp_path / "whole", 7, 1.0)
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path / "run"), str(tmp_path / "whole"), how]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    outcomes = []
    for run in sorted(tmp_path.glob("after-*"), key=lambda path: int(path.name.split("-")[1])):
        code = int(run.name.split("-")[2])
        if how == "fails once" and code == 8:
            assert read_checkpoint(run / "step_7"), (
                "a process that continues has a complete checkpoint without a restart"
            )
        remove_unfinished(run)
        outcomes.append(float(read_checkpoint(run / "step_7")["model_state_dict"]["w"][0]))
        assert [path.name for path in run.iterdir()] == ["step_7"]
    assert len(outcomes) > 20 and sorted(outcomes) == outcomes == [*outcomes[:-1], 2.0], (
        "the old checkpoint until the new one"
    )


def test_a_new_checkpoint_is_synced_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def remember(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)
        fsync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        synced.append(f"renamed to {Path(target).name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", remember)
    monkeypatch.setattr(Path, "rename", renamed)
    write(tmp_path / "run", 7)
    *before, folder, name, after = synced
    assert sorted(before) == ["config.yaml", "manifest.json", "step_7.pt", "tokenizer.json"]
    assert folder.startswith("step_7.") and (name, after) == ("renamed to step_7", "run")


def test_a_file_system_that_cannot_sync_folders_is_supported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    assert read_checkpoint(write(tmp_path, 7))["step"] == 7
