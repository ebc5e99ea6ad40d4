"""A checkpoint is a folder `step_N`, complete or absent.

    step_500/step_500.pt      weights, optimizer, position (see training/state.py)
    step_500/config.yaml      the settings it was trained with
    step_500/tokenizer.json   the tokenizer it was trained with
    step_500/records.jsonl    what was told since the checkpoint before, should the driver not have heard it
    step_500/manifest.json    sizes and SHA-256 of the others; written last

The folder is written as `step_500.<random>.tmp`, synced, and renamed, so a folder without a manifest is not a
checkpoint. One that it takes the place of is renamed to `step_500.replaced` before and deleted after.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from savant_ray.config import Config, load_config
from savant_ray.errors import CheckpointError

MANIFEST = "manifest.json"
CONFIG = "config.yaml"
TOKENIZER = "tokenizer.json"
RECORDS = "records.jsonl"
FORMAT_VERSION = 1
ANY_TEXT = ""  # data fingerprint of a checkpoint that does not say what text it has read
REPLACED = ".replaced"
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # of folders, on some network file systems
SETTINGS_BEFORE = {"data.add_special_tokens": False}  # of checkpoints that an older version wrote, without that setting
_FOLDER = re.compile(r"step_(\d+)")


def write_checkpoint(
    run_folder: Path,
    content: dict[str, Any],
    texts: Mapping[str, str],
    before_commit: Callable[[], None] = lambda: None,
) -> Path:
    """Writes `run_folder/step_N` for the content's step N, `texts` (by file name) beside it, and returns it.

    `before_commit` is called when all is written, right before it takes its name; what it raises leaves nothing behind.

    Raises:
        OSError: the storage refuses; what was there before is whole.
    """
    folder = run_folder / f"step_{content['step']}"
    aside = _aside(folder)
    if run_folder.is_dir():
        remove_left_behind(run_folder)
    try:
        _fill(aside, folder.name, content, texts)
        before_commit()
        replace_folder(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)  # what there is of it only takes room
        raise
    return folder


def replace_folder(new: Path, folder: Path) -> None:
    """Renames `new` to `folder`, whose own content, if any, stays whole until then.

    Raises:
        OSError: the storage refuses; `folder` is what it was. After a power cut `remove_left_behind` sees to that.
    """
    replaced = folder.with_name(folder.name + REPLACED)
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    try:
        new.rename(folder)
    except OSError:
        if replaced.exists():
            replaced.rename(folder)
        raise
    sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_left_behind(run_folder: Path) -> None:
    """Removes what a process left that died while writing; what it had renamed to replace it gets its name back."""
    for replaced in run_folder.glob(f"step_*{REPLACED}"):
        folder = replaced.with_name(replaced.name.removesuffix(REPLACED))
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(folder)
    for unfinished in run_folder.glob("step_*.tmp"):
        shutil.rmtree(unfinished, ignore_errors=True)


def delete_folder(folder: Path) -> None:
    """Deletes a checkpoint; cut short, it leaves none that looks complete.

    Raises:
        OSError: the storage refuses; the checkpoint is whole.
    """
    aside = _aside(folder)
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)  # what is left goes with `remove_left_behind`


def _aside(folder: Path) -> Path:
    """A name beside it that no other process uses."""
    return folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.tmp")


def _fill(aside: Path, name: str, content: dict[str, Any], texts: Mapping[str, str]) -> None:
    aside.mkdir(parents=True)
    save(content, aside / f"{name}.pt")
    for file, text in texts.items():
        (aside / file).write_text(text, encoding="utf-8")
    (aside / MANIFEST).write_text(json.dumps(_manifest(aside, content), indent=1))
    for path in [*aside.iterdir(), aside]:
        sync(path)


def save(content: dict[str, Any], path: Path) -> None:
    """`torch.save`.

    Raises:
        OSError: the storage refuses; what there is of the file stays.
    """
    try:
        torch.save(content, path)
    except RuntimeError as error:  # what PyTorch's writer makes of a full disk
        raise OSError(f"{path}: {str(error).splitlines()[0]}") from error


def is_step_name(name: str) -> bool:
    """Return whether `name` is the name of a checkpoint folder, `step_N`."""
    return _FOLDER.fullmatch(name) is not None


def step_of(checkpoint: Path | str) -> int:
    """Return N of a checkpoint `step_N`, given its path or name.

    Raises:
        CheckpointError: it has another name.
    """
    match = _FOLDER.fullmatch(Path(checkpoint).name)
    if match is None:
        raise CheckpointError(f"{checkpoint}: not named step_N")
    return int(match[1])


def in_step_order(names: Iterable[str]) -> list[str]:
    """Return the names of checkpoints among `names`, oldest first.

    The newest checkpoint is the one with the highest step number, whenever it was written.
    """
    return sorted(filter(is_step_name, names), key=step_of)


def step_folders(run_folder: Path) -> list[Path]:
    """Return the checkpoint folders of a run, complete or not, oldest first."""
    return [
        run_folder / name for name in in_step_order(path.name for path in run_folder.glob("step_*") if path.is_dir())
    ]


def checkpoints(run_folder: Path) -> list[Path]:
    """Return the checkpoint folders of a run that have a manifest, oldest first."""
    return [folder for folder in step_folders(run_folder) if (folder / MANIFEST).is_file()]


def newest_checkpoint(run_folder: Path) -> Path | None:
    """Return the newest checkpoint folder of a run that has a manifest, None without one."""
    return next(reversed(checkpoints(run_folder)), None)


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint folder for `path`: itself, the parent folder of a file, or the newest of a run folder.

    Raises:
        CheckpointError: there is none.
    """
    if path.is_file():
        path = path.parent
    if (path / MANIFEST).is_file():
        return path if is_step_name(path.name) else path.resolve()  # of ".", or of a link to it
    newest = newest_checkpoint(path) if path.is_dir() else None
    if newest is None:
        raise CheckpointError(f"{path}: no checkpoint there (looked for {MANIFEST} and step_*/{MANIFEST})")
    return newest


def read_checkpoint(folder: Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """The content of a checkpoint, checked against its manifest. Executes no code from the file.

    Raises:
        CheckpointError: a file is missing, cut short or altered, the folder was renamed, or the format is not known.
    """
    verify(folder)
    content = load(folder / f"{folder.name}.pt", device)
    own = content.get("savant")
    if (version := own.get("format_version") if isinstance(own, dict) else None) != FORMAT_VERSION:
        raise CheckpointError(
            f"checkpoint {folder.name}: its format is version {version}, this program reads version {FORMAT_VERSION}; "
            "go on with the savant_ray that wrote it"
        )
    return content


def tokenizer_file(folder: Path) -> Path:
    """Return the tokenizer.json of a checkpoint.

    Raises:
        CheckpointError: it has none, since it was converted from a file without one.
    """
    if TOKENIZER not in read_manifest(folder)["files"]:
        raise CheckpointError(f"checkpoint {folder.name}: has no tokenizer; it was converted from a file without one")
    return folder / TOKENIZER


def read_settings(folder: Path) -> Config:
    """The settings that a checkpoint was trained with; those of the environment do not count.

    An older version, whose settings lack `data.add_special_tokens`, never put special tokens around a text.

    Raises:
        SettingsError: they are missing, or not ones that this version knows.
    """
    return load_config(file=folder / CONFIG, environment={}, defaults=SETTINGS_BEFORE)


def load(path: Path, device: str | torch.device) -> dict[str, Any]:
    """What `save` wrote. Executes no code from the file.

    Raises:
        CheckpointError: the file is damaged, or holds anything but tensors, numbers and text by name.
        OSError: the storage does not hand it out.
    """
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds something else than tensors, numbers and text; not loaded, because it could execute code"
        ) from error
    except (OSError, MemoryError):  # of the machine, not of the file
        raise
    except Exception as error:  # what an altered directory of records makes of it
        raise CheckpointError(f"{path}: cannot be read ({reason(error)})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a file of weights: it holds a {type(content).__name__}")
    return content


def reason(error: Exception) -> str:
    """An error of somebody else's code on one line."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def read_manifest(folder: Path) -> dict[str, Any]:
    """Step, data fingerprint, and size and hash of each file.

    Raises:
        CheckpointError: it is missing or not one of ours.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
        if manifest.pop("sha256") != _sha256_of(manifest) or not _lists_files(manifest):
            raise ValueError
    except (FileNotFoundError, IsADirectoryError):
        raise CheckpointError(f"checkpoint {folder.name}: no {MANIFEST}, so it was never completed") from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise CheckpointError(f"checkpoint {folder.name}: {MANIFEST} is not what was written") from None
    return manifest


def verify(folder: Path, *names: str) -> None:
    """Checks the named files, or all, against the manifest; reads them whole.

    Raises:
        CheckpointError: one is missing, cut short or altered.
    """
    files = read_manifest(folder)["files"]
    for name in names or dict.fromkeys([*files, f"{folder.name}.pt"]):
        if name not in files:
            raise CheckpointError(f"checkpoint {folder.name}: {MANIFEST} does not list {name}; was the folder renamed?")
        _check(folder, name, files[name])


def _manifest(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}
    manifest = {"step": content["step"], "data_fingerprint": content["savant"]["data_fingerprint"], "files": files}
    return {**manifest, "sha256": _sha256_of(manifest)}


def _lists_files(manifest: dict[str, Any]) -> bool:
    """Whether it has what `_manifest` writes."""
    files = manifest["files"].items()
    return "data_fingerprint" in manifest and all(
        Path(name).name == name and type(file["bytes"]) is int and type(file["sha256"]) is str for name, file in files
    )


def _check(folder: Path, name: str, expected: dict[str, Any]) -> None:
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"checkpoint {folder.name}: {name} is missing")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise CheckpointError(f"checkpoint {folder.name}: {name} has {size:,} of {expected['bytes']:,} bytes")
    if _sha256(path) != expected["sha256"]:
        raise CheckpointError(f"checkpoint {folder.name}: {name} is not what was written (SHA-256 differs)")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def sync(path: Path) -> None:
    """Asks the operating system to put a file or a folder's entries on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in NO_SYNC):
            raise
    finally:
        os.close(descriptor)
