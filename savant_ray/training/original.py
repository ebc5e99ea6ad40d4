"""Files of the original script, `step_X.pt`: read to go on from them, and written so that the script goes on from ours.

    step                   number of updates
    model_state_dict       weights by name, in any float format; masks may lie among them
    optimizer_state_dict   torch.optim.AdamW's: moments by number, counted in the order of that model's parameters
    scheduler_state_dict   torch.optim.lr_scheduler.LambdaLR's

The order of the parameters is the file's own, that of the names in `model_state_dict`, and need not be ours. PyTorch
hands moments out by number alone, so a file has to be written in the order of the very model that is to load it.
The file has no manifest, but a CRC-32 for each record, which PyTorch does not look at and which is checked here first.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from savant_ray.errors import CheckpointError
from savant_ray.model.transformer import MASK_BUFFERS
from savant_ray.optim.adamw import MOMENTS
from savant_ray.training.checkpoint import FORMAT_VERSION, load, reason, save, sync

KEYS = ("step", "model_state_dict", "optimizer_state_dict", "scheduler_state_dict")
NOTE = "a file of the original, which does not say what it has read: the text goes on at step × effective batch"
NO_MOMENTS = "the optimizer's state has no AdamW moments, so the file holds none: the original starts a fresh optimizer"
ORDER = (
    "embed.weight",
    *(f"recurrent_block.attn.{name}_proj.weight" for name in "qkvo"),
    "recurrent_block.attn.ln.weight",
    "recurrent_block.attn.liquid_gate.weight",
    "recurrent_block.attn.liquid_gate.bias",
    "recurrent_block.ln_ffn.weight",
    "recurrent_block.ffn.0.weight",
    "recurrent_block.ffn.2.weight",
    "recurrent_block.liquid_gate_ffn.weight",
    "recurrent_block.liquid_gate_ffn.bias",
    "ln_f.weight",
    "head.weight",
)  # of the original's parameters, where no file of it shows another
_FILE = re.compile(r"step_(\d+)\.pt")


def original_files(run_folder: Path) -> list[Path]:
    """The original's files that lie directly in a run folder, whole or not, oldest first, by step number."""
    found = (path for path in run_folder.glob("step_*.pt") if is_original_name(path.name) and path.is_file())
    return sorted(found, key=original_step)


def is_original_name(name: str) -> bool:
    """Whether a file of that name is the original's."""
    return _FILE.fullmatch(name) is not None


def original_step(path: Path) -> int:
    """500 of `step_500.pt`."""
    match = _FILE.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path}: not named step_N.pt")
    return int(match.group(1))


def newest_original(run_folder: Path, beyond: int, say: Callable[[str], None]) -> Path | None:
    """The newest whole file of a step after `beyond`; a damaged one is told and stays where it is.

    `beyond` is the step of the newest checkpoint of ours, -1 without one.
    """
    for path in reversed(original_files(run_folder)):
        if original_step(path) <= beyond:
            return None
        try:
            four_keys(path)
        except CheckpointError as damage:
            say(f"{damage}; not used, and left where it is")
        else:
            return path
    return None


def read_original(
    path: Path, names: Sequence[str], effective_batch: int, device: str | torch.device = "cpu"
) -> dict[str, Any]:
    """A file's content as `TrainingState.load_checkpoint` takes it, for a model whose parameters have these names.

    `names` are in the model's order, and the moments are numbered by it. An optimizer of several groups does not say
    which moments are whose; it is left as it is, and `load_checkpoint` tells that it does not fit. The position in the
    global order is step × effective batch, tokens and skips count from 0.

    Raises:
        CheckpointError: as `four_keys`.
    """
    content = four_keys(path, device)
    weights = {name: weight for name, weight in content["model_state_dict"].items() if name not in MASK_BUFFERS}
    savant = {
        "format_version": FORMAT_VERSION,
        "position": content["step"] * effective_batch,
        "tokens_seen": 0,
        "skipped_micro_batches": 0,
        "skipped_in_a_row": 0,
        "data_fingerprint": "",
    }
    optimizer = _renumbered(content["optimizer_state_dict"], list(weights), names)
    return {**content, "model_state_dict": weights, "optimizer_state_dict": optimizer, "savant": savant}


def four_keys(path: Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """A file's four keys, checked: weights (fp32) and moments in the file's own order, and its masks.

    Executes no code from the file. A state of optimizer or scheduler that is none comes back empty, so that the weights
    can be used all the same.

    Raises:
        CheckpointError: the file is missing, cut short, altered, lacks a key, holds code or the step of another name.
    """
    _check_records(path)
    content = load(path, device)
    if missing := [key for key in KEYS if key not in content]:
        raise CheckpointError(f"{path}: not a file of the original: {', '.join(missing)} missing")
    step, weights = content["step"], content["model_state_dict"]
    if type(step) is not int or step < 0:
        raise CheckpointError(f"{path}: not a file of the original: its step is {step!r}")
    if _FILE.fullmatch(path.name) and original_step(path) != step:
        raise CheckpointError(f"{path} holds step {step}: rename it to step_{step}.pt")
    if not isinstance(weights, Mapping) or not all(map(_is_real, weights.values())):
        raise CheckpointError(f"{path}: not a file of the original: its model_state_dict holds no weights by name")
    scheduler = content["scheduler_state_dict"]
    return {
        "step": step,
        "model_state_dict": {name: w if name in MASK_BUFFERS else w.float() for name, w in weights.items()},
        "optimizer_state_dict": _optimizer_state(content["optimizer_state_dict"]),
        "scheduler_state_dict": dict(scheduler) if isinstance(scheduler, Mapping) else {},
    }


def as_original(
    content: Mapping[str, Any], peak_learning_rate: float, like: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """A checkpoint of ours as the original's four keys, and what they cannot hold, a sentence each.

    `like` is the `model_state_dict` of a file of the original (see `four_keys`): its order is kept and its masks are
    taken over, so that the program that wrote it loads the new one too. The learning rate in force is that of the last
    update, which is what a `LambdaLR` has after as many steps.
    """
    weights, optimizer = content["model_state_dict"], content["optimizer_state_dict"]
    masks = {name: mask for name, mask in (like or {}).items() if name in MASK_BUFFERS}
    names = _in_order(weights, like or ORDER)
    moments = _renumbered(optimizer, list(weights), names)["state"] if _is_adamw(optimizer, weights) else {}
    mine = optimizer["param_groups"][0]
    group, scheduler = _torch_states(peak_learning_rate)
    known = {name: mine[name] for name in ("lr", "betas", "eps", "weight_decay") if name in mine}
    group = {**group, **known, "params": list(range(len(names)))}
    step = content["step"]
    four = {
        "step": step,
        "model_state_dict": {name: weights[name].float() for name in names} | masks,
        "optimizer_state_dict": {"state": moments, "param_groups": [group]},
        "scheduler_state_dict": {**scheduler, "last_epoch": step, "_step_count": step + 1, "_last_lr": [group["lr"]]},
    }
    return four, [] if moments else [NO_MOMENTS]


def write_original(path: Path, four: Mapping[str, Any]) -> None:
    """Writes the four keys to a file that the original loads: aside first, so that it is whole or not there.

    Raises:
        OSError: the storage refuses; what was there before is whole.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save({key: four[key] for key in KEYS}, aside)
        sync(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    sync(path.parent)


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
    """State by parameter number, tensors in fp32, and groups; without either where it is no optimizer's."""
    try:
        groups = [dict(group.items(), params=list(group["params"])) for group in saved.get("param_groups")]
        state = {
            number: {name: torch.as_tensor(value, dtype=torch.float32) for name, value in values.items()}
            for number, values in saved["state"].items()
        }
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):  # something else
        return {"state": {}, "param_groups": []}
    return {"state": state, "param_groups": groups}


def _renumbered(optimizer: dict[str, Any], theirs: Sequence[str], ours: Sequence[str]) -> dict[str, Any]:
    """The state of a single group of all parameters, numbered in our order; any other as it is."""
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


def _in_order(weights: Mapping[str, Tensor], order: Iterable[str]) -> list[str]:
    """The names of the weights in this order; those that it does not know come last."""
    known = [name for name in order if name in weights]
    return known + [name for name in weights if name not in known]


def _is_adamw(optimizer: Mapping[str, Any], weights: Mapping[str, Tensor]) -> bool:
    """Whether there is a step and both moments for each weight."""
    state = optimizer["state"]
    return len(optimizer["param_groups"]) == 1 and all(
        set(entry := state.get(number, {})) == {"step", *MOMENTS}
        and all(entry[name].shape == weight.shape for name in MOMENTS)
        for number, weight in enumerate(weights.values())
    )


def _torch_states(peak_learning_rate: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """What PyTorch saves beside the moments: a new AdamW's only group, and a new LambdaLR."""
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=peak_learning_rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    return optimizer.state_dict()["param_groups"][0], scheduler.state_dict()
