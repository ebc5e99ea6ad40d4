"""The file format of the original script, `step_X.pt`: read and write.

    step                   number of the last update, counted from 0
    model_state_dict       weights by name, in any float format, and the masks of attention as fp32 buffers
    optimizer_state_dict   moments by parameter number: bitsandbytes' AdamW8bit (see adamw8bit.py), or torch.optim.AdamW
                           where the script found no bitsandbytes
    scheduler_state_dict   torch.optim.lr_scheduler.LambdaLR's; files of an older script have none

The schedule's `last_epoch` counts updates, so it is `step + 1`. A resumed script repeats the number of its last update,
so each resume adds one more. The learning rates in a file are those of the next update.

The order of the parameters is the file's own, that of the names in `model_state_dict`, and need not be ours. PyTorch
assigns moments by number alone, so a file has to be written in the order of the model that is to load it.
The file has no manifest, but a CRC-32 for each record, which PyTorch does not check and which is checked here first.
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
from savant_ray.locations import why
from savant_ray.optim.adamw import MOMENTS
from savant_ray.original.adamw8bit import from_adamw8bit, to_adamw8bit
from savant_ray.original.names import is_original_name, original_step
from savant_ray.training.checkpoint import load, reason, save, sync

OptimizerName = Literal["adamw", "adamw8bit"]

KEYS = ("step", "model_state_dict", "optimizer_state_dict")
SCHEDULER = "scheduler_state_dict"  # the only key that may be missing
MASKS = frozenset({"global_mask", "local_mask", "recurrent_block.attn.mask"})  # buffers among the weights


def newest_intact(files: Iterable[Path], say: Callable[[str], None]) -> Path | None:
    """Return the first file that is whole; each damaged one before it is reported and stays where it is."""
    for path in files:
        try:
            _checked(path)
        except CheckpointError as damage:
            say(f"{damage}; not used, and left where it is")
        else:
            return path
    return None


def read_file(path: Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """A file's four keys, checked: weights (fp32) and AdamW moments (fp32) in the file's own order, and its masks.

    The moments are those of `torch.optim.AdamW`, whichever optimizer the file was written by (see `optimizer_of`).
    Executes no code from the file. A state of optimizer or scheduler that is none comes back empty, so that the weights
    can be used all the same; a missing one of the scheduler is missing here, too.

    Raises:
        CheckpointError: the file is missing, cut short, altered, lacks a key, holds code or the step of another name.
    """
    content = _checked(path, device)
    weights = content["model_state_dict"]
    four = {
        "step": content["step"],
        "model_state_dict": {name: w if name in MASKS else w.float() for name, w in weights.items()},
        "optimizer_state_dict": _optimizer_state(content["optimizer_state_dict"]),
    }
    if SCHEDULER in content:
        scheduler = content[SCHEDULER]
        four[SCHEDULER] = dict(scheduler) if isinstance(scheduler, Mapping) else {}
    return four


def optimizer_of(four: Mapping[str, Any]) -> OptimizerName | None:
    """The optimizer that wrote a file; None if the file has no group of parameters.

    Told by the groups, which also files without moments have: `amsgrad` is an option of PyTorch's AdamW only.
    """
    groups = four["optimizer_state_dict"]["param_groups"]
    if not groups:
        return None
    return "adamw" if "amsgrad" in groups[0] else "adamw8bit"


def has_moments(four: Mapping[str, Any]) -> bool:
    """Whether a file (see `read_file`) has AdamW moments for each parameter that it has a state for, and for one."""
    state = four["optimizer_state_dict"]["state"]
    return bool(state) and all(set(entry) == {"step", *MOMENTS} for entry in state.values())


def for_optimizer(four: Mapping[str, Any], optimizer: OptimizerName) -> dict[str, Any]:
    """The same content (see `read_file`) with the optimizer's state as this optimizer loads it."""
    state, groups = (four["optimizer_state_dict"][key] for key in ("state", "param_groups"))
    if optimizer == "adamw8bit":
        state = {number: to_adamw8bit(entry) for number, entry in state.items()}
    own = _group_options(optimizer)
    others = _group_options("adamw" if optimizer == "adamw8bit" else "adamw8bit").keys() - own.keys()
    groups = [own | {name: value for name, value in group.items() if name not in others} for group in groups]
    return {**four, "optimizer_state_dict": {"state": state, "param_groups": groups}}


def renumbered(optimizer: dict[str, Any], theirs: Sequence[str], ours: Sequence[str]) -> dict[str, Any]:
    """Return the state of a single group of all parameters, numbered in our order; any other as it is."""
    groups = optimizer["param_groups"]
    if len(groups) != 1 or len(groups[0]["params"]) != len(theirs):
        return optimizer
    number_of = dict(zip(theirs, groups[0]["params"], strict=True))
    state = {
        number: optimizer["state"][number_of[name]]
        for number, name in enumerate(ours)
        if name in number_of and number_of[name] in optimizer["state"]
    }
    return {"state": state, "param_groups": [{**groups[0], "params": list(range(len(ours)))}]}


def write_original(path: Path, four: Mapping[str, Any]) -> None:
    """Writes the keys to a file that the original loads: aside first, so that it is whole or not there.

    Raises:
        OSError: the storage refuses; what was there before is whole.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save({key: four[key] for key in (*KEYS, SCHEDULER) if key in four}, aside)
        sync(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    sync(path.parent)


def _checked(path: Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """A file's content as it was written.

    Raises:
        CheckpointError: as `read_file`.
    """
    _check_records(path)
    content = load(path, device)
    if missing := [key for key in KEYS if key not in content]:
        raise CheckpointError(f"{path}: not a file of the original: {', '.join(missing)} missing")
    step, weights = content["step"], content["model_state_dict"]
    if type(step) is not int or step < 0:
        raise CheckpointError(f"{path}: not a file of the original: its step is {step!r}")
    if is_original_name(path.name) and original_step(path.name) != step:
        raise CheckpointError(f"{path} holds step {step}: rename it to step_{step}.pt")
    if not isinstance(weights, Mapping) or not all(map(_is_real, weights.values())):
        raise CheckpointError(f"{path}: not a file of the original: its model_state_dict holds no weights by name")
    return content


def _check_records(path: Path) -> None:
    """Every record against its CRC-32.

    Raises:
        CheckpointError: one differs, or this is no archive of records.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip() or _marked_as_folder(archive)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (IsADirectoryError, PermissionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({why(error)})") from error
    except Exception as error:  # damaged headers let `zipfile` fail in a dozen ways
        raise CheckpointError(f"{path}: cut short, altered or not written by torch.save ({reason(error)})") from error
    if damaged is not None:
        raise CheckpointError(f"{path}: altered since it was written (its record {damaged} is not what was put in)")


def _is_real(weight: Any) -> bool:
    return isinstance(weight, Tensor) and not weight.is_complex()


def _marked_as_folder(archive: zipfile.ZipFile) -> str | None:
    """A record with MS-DOS's folder bit: PyTorch reads nothing then and hands out memory as it finds it."""
    return next((info.filename for info in archive.infolist() if info.external_attr & 0x10), None)


def _optimizer_state(saved: Any) -> dict[str, Any]:
    """AdamW's state by parameter number, tensors in fp32, and groups; without either where it is no optimizer's."""
    try:
        groups = [dict(group.items(), params=list(group["params"])) for group in saved.get("param_groups")]
        state = {
            number: {name: torch.as_tensor(value, dtype=torch.float32) for name, value in from_adamw8bit(entry).items()}
            for number, entry in saved["state"].items()
        }
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):  # something else
        return {"state": {}, "param_groups": []}
    return {"state": state, "param_groups": groups}


def _group_options(optimizer: OptimizerName) -> dict[str, Any]:
    """What the optimizer keeps in a group beside rate, betas, eps and decay."""
    if optimizer == "adamw8bit":
        return {"alpha": 0.0, "t_alpha": None, "t_beta3": None}
    options: dict[str, Any] = torch.optim.AdamW([torch.zeros(1)]).state_dict()["param_groups"][0]
    return {
        name: value for name, value in options.items() if name not in ("lr", "betas", "eps", "weight_decay", "params")
    }
