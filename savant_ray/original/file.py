"""Checkpoint files of the original script, `step_N.pt`: read, verify, write.

    step                   number of the last update, counted from 0
    model_state_dict       weights by name, in any float format, and the attention masks as fp32 buffers
    optimizer_state_dict   moments by parameter number: bitsandbytes' AdamW8bit (see adamw8bit.py), or torch.optim.AdamW
                           if the script ran without bitsandbytes
    scheduler_state_dict   that of torch.optim.lr_scheduler.LambdaLR; absent in files of an older script

The schedule's `last_epoch` is the number of updates, so it is `step + 1`. After a resume, the script's first update repeats
the `step` of the last update before the resume, so after r resumes `last_epoch` is `step + 1 + r`. The learning rates in a
file are those of the next update.

Parameters are numbered in the order of the names in `model_state_dict`, which may differ from that of savant_ray. PyTorch
assigns moments by number alone, so a file has to be written in the parameter order of the model that will load it.

A file has no manifest, but a CRC-32 for each zip record. PyTorch ignores it; here it is verified before a file is loaded.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from savant_ray.errors import CheckpointError
from savant_ray.locations import error_text, replacing
from savant_ray.optim.adamw import MOMENTS
from savant_ray.original.adamw8bit import from_adamw8bit, to_adamw8bit
from savant_ray.original.names import is_original_name, original_step
from savant_ray.training.checkpoint import error_line, load, save, sync

OptimizerName = Literal["adamw", "adamw8bit"]

KEYS = ("step", "model_state_dict", "optimizer_state_dict")
SCHEDULER = "scheduler_state_dict"  # the only optional key
MASKS = frozenset({"global_mask", "local_mask", "recurrent_block.attn.mask"})  # buffers in model_state_dict


def newest_intact(files: Iterable[Path], log: Callable[[str], None]) -> Path | None:
    """Return the first intact one of `files` (sorted newest first); damaged ones before it are reported to `log`."""
    for path in files:
        try:
            _load_verified(path)
        except CheckpointError as damage:
            log(f"{damage}; not used, and left in place")
        else:
            return path
    return None


def read_file(path: Path) -> dict[str, Any]:
    """Verify a file and return its content under the same keys; weights and moments are converted to fp32.

    Their order is that of the file, and the masks are unchanged. The moments have the format of `torch.optim.AdamW`,
    whichever optimizer wrote the file (see `optimizer_of`). Code in the file is not executed. An invalid state of the
    optimizer or scheduler is returned empty, so that the weights remain usable. If the file has no scheduler state, the
    result has none either.

    Raises:
        CheckpointError: the file is missing, truncated or altered, lacks a key or contains code, or its name has another
            step than its content.
    """
    stored = _load_verified(path)
    weights = stored["model_state_dict"]
    content = {
        "step": stored["step"],
        "model_state_dict": {name: w if name in MASKS else w.float() for name, w in weights.items()},
        "optimizer_state_dict": _optimizer_state(stored["optimizer_state_dict"]),
    }
    if SCHEDULER in stored:
        scheduler = stored[SCHEDULER]
        content[SCHEDULER] = dict(scheduler) if isinstance(scheduler, Mapping) else {}
    return content


def optimizer_of(content: Mapping[str, Any]) -> OptimizerName | None:
    """Return the optimizer that wrote a file; None if the file has no parameter group.

    The optimizer is inferred from the options of the group: only PyTorch's AdamW has the option `amsgrad`. The moments are
    not used for this, because a file may have none.
    """
    groups = content["optimizer_state_dict"]["param_groups"]
    if not groups:
        return None
    return "adamw" if "amsgrad" in groups[0] else "adamw8bit"


def has_moments(content: Mapping[str, Any]) -> bool:
    """Return whether the content of a file (see `read_file`) has AdamW moments for each parameter with a state."""
    state = content["optimizer_state_dict"]["state"]
    return bool(state) and all(set(entry) == {"step", *MOMENTS} for entry in state.values())


def for_optimizer(content: Mapping[str, Any], optimizer: OptimizerName) -> dict[str, Any]:
    """Return the content of a file (see `read_file`) with the optimizer state in the format of `optimizer`."""
    state, groups = (content["optimizer_state_dict"][key] for key in ("state", "param_groups"))
    if optimizer == "adamw8bit":
        state = {number: to_adamw8bit(entry) for number, entry in state.items()}
    options = _group_options(optimizer)
    foreign = _group_options("adamw" if optimizer == "adamw8bit" else "adamw8bit").keys() - options.keys()
    groups = [options | {name: value for name, value in group.items() if name not in foreign} for group in groups]
    return {**content, "optimizer_state_dict": {"state": state, "param_groups": groups}}


def renumbered(optimizer: dict[str, Any], old_order: Sequence[str], new_order: Sequence[str]) -> dict[str, Any]:
    """Return the optimizer state with the parameters numbered in a new order; both orders are parameter names.

    A state whose parameters are not all in a single group is returned unchanged.
    """
    groups = optimizer["param_groups"]
    if len(groups) != 1 or len(groups[0]["params"]) != len(old_order):
        return optimizer
    number_of = dict(zip(old_order, groups[0]["params"], strict=True))
    state = {
        number: optimizer["state"][number_of[name]]
        for number, name in enumerate(new_order)
        if name in number_of and number_of[name] in optimizer["state"]
    }
    return {"state": state, "param_groups": [{**groups[0], "params": list(range(len(new_order)))}]}


def write_original(path: Path, content: Mapping[str, Any]) -> None:
    """Write `KEYS` and, if `content` has it, the schedule to a file for the original; replace an existing file atomically.

    The folders above it are created.

    Raises:
        OSError: the storage fails; an existing file is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with replacing(path, temporary):
        save({key: content[key] for key in (*KEYS, SCHEDULER) if key in content}, temporary)
        sync(temporary)
    sync(path.parent)


def _load_verified(path: Path) -> dict[str, Any]:
    """Verify and load a file; return its content unchanged.

    Raises:
        CheckpointError: as `read_file`.
    """
    _verify_records(path)
    content = load(path)
    if missing := [key for key in KEYS if key not in content]:
        raise CheckpointError(f"{path}: not a file of the original: {', '.join(missing)} missing")
    if "savant" in content:
        raise CheckpointError(
            f"{path}: not a file of the original, but the weights of a savant_ray checkpoint without its settings and "
            "tokenizer; use the complete folder step_N of that checkpoint"
        )
    step, weights = content["step"], content["model_state_dict"]
    if type(step) is not int or step < 0:
        raise CheckpointError(f"{path}: not a file of the original: its step is {step!r}")
    if is_original_name(path.name) and original_step(path.name) != step:
        raise CheckpointError(f"{path} contains step {step}: rename it to step_{step}.pt")
    if not isinstance(weights, Mapping) or not all(map(_is_real_tensor, weights.values())):
        raise CheckpointError(f"{path}: not a file of the original: its model_state_dict contains no weights by name")
    return content


def _verify_records(path: Path) -> None:
    """Verify the CRC-32 of all records of the zip archive.

    Raises:
        CheckpointError: a record is damaged or marked as a folder, or the file is not a zip archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged, folder = archive.testzip(), _folder_record(archive)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (IsADirectoryError, PermissionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error_text(error)})") from error
    except Exception as error:  # zipfile raises errors of many types for damaged headers
        raise CheckpointError(
            f"{path}: truncated, altered or not written by torch.save ({error_line(error)})"
        ) from error
    if damaged is not None:
        raise CheckpointError(f"{path}: altered since it was written (checksum of record {damaged} differs)")
    if folder is not None:
        raise CheckpointError(f"{path}: altered since it was written (record {folder} is marked as a folder)")


def _is_real_tensor(weight: Any) -> bool:
    return isinstance(weight, Tensor) and not weight.is_complex()


def _folder_record(archive: zipfile.ZipFile) -> str | None:
    """Return the name of a record that is marked as a folder, for which PyTorch would return uninitialized memory."""
    return next((info.filename for info in archive.infolist() if info.external_attr & 0x10), None)  # MS-DOS folder bit


def _optimizer_state(saved: Any) -> dict[str, Any]:
    """Return AdamW's fp32 state by parameter number, and its parameter groups; both are empty if `saved` is invalid."""
    try:
        groups = [dict(group.items(), params=list(group["params"])) for group in saved.get("param_groups")]
        state = {
            number: {name: torch.as_tensor(value, dtype=torch.float32) for name, value in from_adamw8bit(entry).items()}
            for number, entry in saved["state"].items()
        }
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return {"state": {}, "param_groups": []}
    return {"state": state, "param_groups": groups}


def _group_options(optimizer: OptimizerName) -> dict[str, Any]:
    """Return the default options of an optimizer's parameter group, except rate, betas, eps and weight decay."""
    if optimizer == "adamw8bit":
        return {"alpha": 0.0, "t_alpha": None, "t_beta3": None}
    options: dict[str, Any] = torch.optim.AdamW([torch.zeros(1)]).state_dict()["param_groups"][0]
    return {
        name: value for name, value in options.items() if name not in ("lr", "betas", "eps", "weight_decay", "params")
    }
