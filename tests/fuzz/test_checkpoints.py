"""Checkpoints: whatever is changed in their files, the content is read as written or a CheckpointError is raised."""

from __future__ import annotations

import hashlib
import json
import shutil
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch

from savant_ray.config import dump_yaml
from savant_ray.errors import CheckpointError, SettingsError
from savant_ray.original.conversion import converted
from savant_ray.original.file import read_file
from savant_ray.training.checkpoint import find_checkpoint, read_checkpoint, write_checkpoint
from tests.fuzz.drawing import damaged, from_seed, random_text, random_value
from tests.fuzz.property import holds_for, scratch
from tests.original.program import OriginalProgram
from tests.training.tiny import Code, tiny_config, tiny_state

Files = dict[str, bytes | None]  # None: a folder
STEP, MANIFEST, WEIGHTS = "step_500", "manifest.json", "step_500.pt"
EXECUTED = "executed"
KEYS = ("step", "model_state_dict", "optimizer_state_dict", "scheduler_state_dict")


@cache
def written() -> dict[str, bytes]:
    """Return the files of a checkpoint of a two-loop model."""
    config = tiny_config()
    content = {**tiny_state(config).to_checkpoint(), "step": 500}
    texts = {"config.yaml": dump_yaml(config), "tokenizer.json": '{"model": {}}', "records.jsonl": ""}
    folder = write_checkpoint(scratch() / "written", content, texts)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@cache
def content_written() -> Any:
    return torch.load(scratch() / "written" / STEP / WEIGHTS, weights_only=True)


@cache
def original() -> bytes:
    """Return a file as the original script writes it after one step."""
    program = OriginalProgram()
    program.train(torch.arange(1, 33).reshape(2, 16))
    return program.save(scratch()).read_bytes()


@cache
def original_content() -> Any:
    (path := scratch() / "whole.pt").write_bytes(original())
    return read_file(path)


@cache
def with_code() -> bytes:
    path = scratch() / "code.pt"
    torch.save({**content_written(), "extra": Code(scratch() / EXECUTED)}, path)
    return path.read_bytes()


def damaged_checkpoint(rng: Random) -> tuple[str, Files]:
    """Return the folder's name and its files after one to three random changes."""
    name, files = STEP, Files(written())
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        name = "step_600" if rng.random() < 0.03 else name
        damage(files, rng)
    return name, files


def damage(files: Files, rng: Random) -> None:
    """Change a file, the set of files, or the manifest, with or without updating its hashes."""
    one, other = rng.choice(sorted(written())), rng.choice(sorted(written()))
    kind = rng.randrange(16)
    if kind < 7:
        files[one] = damaged(files.get(one) or b"", rng)
    elif kind == 7:
        files.pop(one, None)
    elif kind == 8:
        files[one], files[other] = files.get(other), files.get(one)
    elif kind == 9:
        files[rng.choice(("extra", "step_600.pt", "step_500.pt.tmp", one))] = rng.choice((b"", b"x", None))
    elif kind == 10:
        files[WEIGHTS] = with_code()
        sign(files, listed(files))
    elif kind < 13 and isinstance(manifest := listed(files), dict):
        edit(manifest, rng)
        sign(files, manifest)
    else:
        manifest = listed(files)
        edit(manifest, rng)
        files[MANIFEST] = json.dumps(manifest).encode(errors="surrogatepass")


def listed(files: Files) -> Any:
    """Return the current manifest, or the original one if it is invalid now."""
    try:
        return json.loads(files.get(MANIFEST) or b"")
    except ValueError:
        return json.loads(written()[MANIFEST])


def edit(manifest: Any, rng: Random) -> None:
    """Change, remove or add a value in the manifest."""
    files = manifest.get("files") if isinstance(manifest, dict) else {}
    places = [manifest, files, *(files.values() if isinstance(files, dict) else ())]
    place = rng.choice([each for each in places if isinstance(each, dict)] or [{}])
    key = rng.choice((*place, "files", random_text(rng)))
    if rng.random() < 0.4:
        place.pop(key, None)
    else:
        place[key] = rng.choice((random_value(rng), 0, place.get(rng.choice((*place, "")))))


def sign(files: Files, manifest: Any) -> None:
    """Write the manifest with correct hashes: its own, and that of the weights if they are `with_code`."""
    if not isinstance(manifest, dict):
        return
    listed_files = manifest.get("files")
    for name, file in listed_files.items() if isinstance(listed_files, dict) else ():
        if isinstance(file, dict) and name == WEIGHTS and files.get(name) == with_code():
            file |= {"bytes": len(with_code()), "sha256": hashlib.sha256(with_code()).hexdigest()}
    manifest.pop("sha256", None)
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    files[MANIFEST] = json.dumps(manifest).encode()


def same(one: Any, other: Any) -> bool:
    """Return whether two contents are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


def lay_out(name: str, files: Files) -> Path:
    """Write a run folder with that checkpoint."""
    run = scratch() / "run"
    shutil.rmtree(run, ignore_errors=True)
    (run / name).mkdir(parents=True)
    for file, content in files.items():
        (run / name / file).mkdir() if content is None else (run / name / file).write_bytes(content)
    return run


@holds_for(
    "a real checkpoint after 1 to 3 changes: files truncated, damaged, swapped, missing, added, with code; "
    "manifest edited, also with correct checksums",
    quick=100,
    one_in=10,
    case=from_seed(damaged_checkpoint),
)
def test_a_damaged_checkpoint_is_refused_or_read_with_its_original_content(case: tuple[str, Files]) -> None:
    name, files = case
    whole = all(files.get(file) == content for file, content in written().items())
    run = lay_out(name, files)
    try:
        content = read_checkpoint(find_checkpoint(run))
    except CheckpointError as error:
        assert not whole or name != STEP
        assert name in str(error) or "no checkpoint there" in str(error)
    else:
        assert name == STEP and files[WEIGHTS] == written()[WEIGHTS]
        assert whole or files[MANIFEST] != written()[MANIFEST], "an altered text file was not detected"
        assert same(content, content_written())
    assert not (scratch() / EXECUTED).exists()


@holds_for(
    "a file of the original program, truncated or damaged",
    quick=60,
    one_in=10,
    content=from_seed(lambda rng: damaged(original(), rng)),
)
def test_a_damaged_file_of_the_original_is_refused_or_read_with_its_original_content(content: bytes) -> None:
    expected, path = original_content(), scratch() / "step_0.pt"
    path.write_bytes(content)
    try:
        found = read_file(path)
    except CheckpointError as error:
        assert str(path) in str(error) and content != original()
    else:
        assert same(found, expected)


def foreign(rng: Random) -> dict[Any, Any]:
    """Return the four keys, one or two of them with other values."""
    original_content()
    content: dict[Any, Any] = torch.load(scratch() / "whole.pt", weights_only=True)
    for _ in range(rng.randrange(1, 3)):
        place: Any = content
        while isinstance(place, dict) and place and rng.random() < 0.7:
            parent, key = place, rng.choice(list(place))
            place = place[key]
            place = place[0] if isinstance(place, list) and place and rng.random() < 0.8 else place
            parent[key] = rng.choice((parent[key], random_value(rng), random_tensor(rng)))
        if isinstance(place, dict):
            place[rng.choice((*KEYS, "params", "state", 0, random_text(rng)))] = random_value(rng)
    return content


def random_tensor(rng: Random) -> torch.Tensor:
    kind = rng.choice((torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.uint8))
    return torch.ones(rng.choice(((), (0,), (3,), (16, 16))), dtype=kind)


@holds_for(
    "four keys with other values, tensors or names anywhere in them", quick=60, one_in=40, content=from_seed(foreign)
)
def test_a_foreign_file_is_refused_or_read_as_a_checkpoint(content: dict[Any, Any]) -> None:
    path = scratch() / "step_0.pt"
    torch.save(content, path)
    try:
        with converted(path, {"model": {"n_heads": 2, "n_loops": 4}}, log=str, allow_changes=True) as folder:
            found = read_checkpoint(folder)
    except (CheckpointError, SettingsError) as error:
        assert "step_0" in str(error) or "model." in str(error)
    else:
        assert found["step"] == 0 and all(
            weight.dtype == torch.float32 for weight in found["model_state_dict"].values()
        )
        assert set(found) == {*KEYS, "savant"}
