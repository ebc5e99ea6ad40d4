"""Checkpoint folders `step_N`: write, find, verify, read.

    step_500/step_500.pt      weights, optimizer, position (see training/state.py)
    step_500/config.yaml      the settings it was trained with
    step_500/tokenizer.json   the tokenizer it was trained with
    step_500/chat_template.jinja, tokenizer_config.json   its chat template, and the special tokens that this uses, if any
    step_500/records.jsonl    the newest lines of metrics.jsonl, at least those since the previous checkpoint, in case the
                              driver lost them
    step_500/manifest.json    sizes and SHA-256 of the other files; written last

A checkpoint is complete or absent: it is written as `step_500.<random>.tmp`, synced, and renamed. If it replaces an older
one, that is renamed to `step_500.replaced` first and deleted afterwards. A folder without a manifest is not a checkpoint.
"""

from __future__ import annotations

import errno
import hashlib
import json
import operator
import os
import pickle
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from savant_ray.config import Config, load_config
from savant_ray.data.atomic_files import CHECKSUM, dump_with_checksum, fingerprint
from savant_ray.data.chat_template import SETTINGS_FILE, TEMPLATE_FILE
from savant_ray.data.tokenizer import TOKENIZER_FILE
from savant_ray.errors import CheckpointError

Checkpoint = TypeVar("Checkpoint", Path, str)  # its folder, or only its name
MANIFEST = "manifest.json"
CONFIG = "config.yaml"
TOKENIZER = TOKENIZER_FILE
TOKENIZER_FILES = (TOKENIZER, TEMPLATE_FILE, SETTINGS_FILE)  # the latter two only with a chat template
RECORDS = "records.jsonl"
FORMAT_VERSION = 1
WEIGHTS, AVERAGE = "model_state_dict", "ema_state_dict"  # the latter only with `training.ema_decay`
NO_FINGERPRINT = ""  # data fingerprint of a checkpoint whose training text is unknown
TEMPORARY, REPLACED = ".tmp", ".replaced"  # suffixes while a checkpoint is written
SYNC_NOT_SUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # for folders, on some network file systems
OLDER_SETTINGS = {"data.add_special_tokens": False}  # of checkpoints that were written before this setting existed
_FOLDER = re.compile(r"step_(\d+)")


def state_file(name: str) -> str:
    """Return the name of the file with the training state in the checkpoint folder `name`."""
    return f"{name}.pt"


def write_checkpoint(
    run_folder: Path,
    content: dict[str, Any],
    texts: Mapping[str, str],
    before_commit: Callable[[], None] = lambda: None,
) -> Path:
    """Write `content` and text files (`texts`, by name) as `run_folder/step_N`, N being the content's step; return its path.

    `before_commit` is called when all files are written, before the folder gets its name. If it raises an error, no
    checkpoint is written.

    Raises:
        OSError: the storage fails. An older checkpoint of this step is unchanged, unless only the last sync failed.
    """
    folder = run_folder / f"step_{content['step']}"
    temporary = _temporary(folder)
    if run_folder.is_dir():
        remove_unfinished(run_folder)
    try:
        _write_files(temporary, folder.name, content, texts)
        before_commit()
        replace_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def replace_folder(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`, replacing an existing folder.

    If the process is killed between the renames, `remove_unfinished` restores the existing folder.

    Raises:
        OSError: the storage fails. The existing folder is unchanged, unless only the sync after the renames failed.
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


def remove_unfinished(run_folder: Path) -> None:
    """Remove checkpoints that a killed process left half written, and restore those that it was replacing."""
    for replaced in run_folder.glob(f"step_*{REPLACED}"):
        folder = replaced.with_name(replaced.name.removesuffix(REPLACED))
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(folder)
    for unfinished in run_folder.glob(f"step_*{TEMPORARY}"):
        shutil.rmtree(unfinished, ignore_errors=True)


def delete_folder(folder: Path) -> None:
    """Delete a checkpoint. If the process is killed meanwhile, no folder is left that looks complete.

    Raises:
        OSError: the storage fails; the checkpoint is unchanged.
    """
    temporary = _temporary(folder)
    folder.rename(temporary)
    shutil.rmtree(temporary, ignore_errors=True)  # `remove_unfinished` retries


def _temporary(folder: Path) -> Path:
    """Return a path next to `folder` that no other process uses."""
    return folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}{TEMPORARY}")


def _write_files(folder: Path, name: str, content: dict[str, Any], texts: Mapping[str, str]) -> None:
    """Write and sync all files of the checkpoint `name`, the manifest last."""
    folder.mkdir(parents=True)
    save(content, folder / state_file(name))
    for file, text in texts.items():
        (folder / file).write_text(text, encoding="utf-8")
    (folder / MANIFEST).write_text(dump_with_checksum(_manifest(folder, content), indent=1))
    for path in [*folder.iterdir(), folder]:
        sync(path)


def save(content: dict[str, Any], path: Path) -> None:
    """Write a file with `torch.save`.

    Raises:
        OSError: the storage fails; a partial file may remain.
    """
    try:
        torch.save(content, path)
    except RuntimeError as error:  # raised by PyTorch's writer if the disk is full
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
    """Return the names of checkpoints among `names`, oldest first."""
    return sorted(filter(is_step_name, names), key=step_of)


def newest_of(checkpoints: Iterable[Checkpoint]) -> Checkpoint | None:
    """Return the newest of checkpoints, given as paths or names: that with the highest step, whenever it was written."""
    return max(checkpoints, key=step_of, default=None)


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
    return newest_of(checkpoints(run_folder))


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint folder for `path`: itself, the parent folder of a file, or the newest of a run folder.

    Raises:
        CheckpointError: there is none.
    """
    if path.is_file():
        path = path.parent
    if (path / MANIFEST).is_file():
        return path if is_step_name(path.name) else path.resolve()  # `.` and links have other names
    newest = newest_checkpoint(path) if path.is_dir() else None
    if newest is None:
        reason = f"looked for {MANIFEST} and step_*/{MANIFEST}" if path.exists() else "there is no such file or folder"
        raise CheckpointError(f"{path}: no checkpoint there ({reason})")
    return newest


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """Verify a checkpoint and return its content. Executes no code from the file.

    Raises:
        CheckpointError: a file is missing, truncated or altered, the folder was renamed, or the format version is unknown.
    """
    verify(folder)
    content = load(folder / state_file(folder.name))
    savant = content.get("savant")
    if (version := savant.get("format_version") if isinstance(savant, dict) else None) != FORMAT_VERSION:
        raise CheckpointError(
            f"checkpoint {folder.name}: its format is version {version}, this program reads version {FORMAT_VERSION}; "
            "use the version of savant_ray that wrote it"
        )
    return content


def model_weights(content: Mapping[str, Any], raw: bool = False) -> dict[str, torch.Tensor]:
    """Return the fp32 weights of a checkpoint's content by name: their average if it has one, unless `raw`."""
    weights: dict[str, torch.Tensor] = content[WEIGHTS if raw or AVERAGE not in content else AVERAGE]
    return weights


def left_out_file(data_fingerprint: str) -> str:
    """Return the name of the run folder's file with the sequences of this text that rewinds have left out."""
    return f"left_out_{data_fingerprint[:16]}.json"


def read_left_out(file: Path) -> tuple[tuple[int, int], ...]:
    """Return the content of a `left_out_file`: pairs of first position and number of sequences, as in data/order.py.

    Raises:
        CheckpointError: it is damaged.
        OSError: it cannot be read.
    """
    try:
        pairs = json.loads(file.read_bytes())
        return tuple((operator.index(first), operator.index(n_sequences)) for first, n_sequences in pairs)
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{file} is damaged: {error_line(error)}. Restore it, or delete it: then the sequences are left out that the "
            "newest checkpoint names, and a spike since then is found again"
        ) from error


def tokenizer_file(folder: Path) -> Path:
    """Return the path of a checkpoint's tokenizer.

    Raises:
        CheckpointError: it has none, since it was converted from a file of the original script, which holds none.
    """
    if TOKENIZER not in read_manifest(folder)["files"]:
        raise CheckpointError(f"checkpoint {folder.name}: has no tokenizer; it was converted from a file without one")
    return folder / TOKENIZER


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the paths of a checkpoint's tokenizer and, if it has one, of the files of its chat template.

    Raises:
        CheckpointError: it has no tokenizer, as in `tokenizer_file`.
    """
    listed = read_manifest(folder)["files"]
    return [
        tokenizer_file(folder),
        *(folder / name for name in TOKENIZER_FILES if name in listed and name != TOKENIZER),
    ]


def read_settings(folder: Path) -> Config:
    """Return the settings that a checkpoint was trained with; environment variables do not change them.

    Older versions, whose settings lack `data.add_special_tokens`, never added special tokens to a text.

    Raises:
        SettingsError: the file is missing, or has settings that this version does not know.
    """
    return load_config(file=folder / CONFIG, environment={}, defaults=OLDER_SETTINGS)


def load(path: Path) -> dict[str, Any]:
    """Read a file that `save` wrote. Executes no code from the file.

    Raises:
        CheckpointError: the file is damaged, or is not a dict of tensors, numbers and text.
        OSError: the storage fails.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds objects other than tensors, numbers and text; not loaded, because it could execute code"
        ) from error
    except (OSError, MemoryError):  # the file may be intact
        raise
    except Exception as error:  # torch.load raises errors of many types for a damaged archive
        raise CheckpointError(f"{path}: cannot be read ({error_line(error)})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a file of weights: it holds a {type(content).__name__}")
    return content


def error_line(error: Exception) -> str:
    """Return type and first line of an error of a library."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint: step, data fingerprint, and size and SHA-256 of each file.

    Raises:
        CheckpointError: it is missing or altered.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
        if manifest.pop(CHECKSUM) != fingerprint(manifest) or not _is_valid(manifest):
            raise ValueError
    except (FileNotFoundError, IsADirectoryError):
        raise CheckpointError(f"checkpoint {folder.name}: no {MANIFEST}, so it was never completed") from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise CheckpointError(f"checkpoint {folder.name}: {MANIFEST} was altered") from None
    return manifest


def verify(folder: Path, *names: str) -> None:
    """Compare size and SHA-256 of the named files, or all files, with the manifest.

    Raises:
        CheckpointError: a file is missing, truncated or altered.
    """
    files = read_manifest(folder)["files"]
    for name in names or dict.fromkeys([*files, state_file(folder.name)]):
        if name not in files:
            raise CheckpointError(f"checkpoint {folder.name}: {MANIFEST} does not list {name}; was the folder renamed?")
        _verify_file(folder, name, files[name])


def _manifest(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}
    return {"step": content["step"], "data_fingerprint": content["savant"]["data_fingerprint"], "files": files}


def _is_valid(manifest: dict[str, Any]) -> bool:
    """Return whether the manifest has a data fingerprint, and a name, size and hash for each file."""
    files = manifest["files"].items()
    return "data_fingerprint" in manifest and all(
        Path(name).name == name and type(file["bytes"]) is int and type(file["sha256"]) is str for name, file in files
    )


def _verify_file(folder: Path, name: str, expected: dict[str, Any]) -> None:
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"checkpoint {folder.name}: {name} is missing")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise CheckpointError(f"checkpoint {folder.name}: {name} has {size:,} of {expected['bytes']:,} bytes")
    if _sha256(path) != expected["sha256"]:
        raise CheckpointError(f"checkpoint {folder.name}: {name} was altered (SHA-256 differs)")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in SYNC_NOT_SUPPORTED):
            raise
    finally:
        os.close(descriptor)
