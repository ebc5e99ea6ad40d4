"""Files of the original script, `step_X.pt`: read to go on from them, and written so that the script goes on from ours.

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

import functools
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from savant_ray.config import ModelConfig, TrainingConfig
from savant_ray.errors import CheckpointError
from savant_ray.model.transformer import MASK_BUFFERS
from savant_ray.optim.adamw import BETAS, EPS, MOMENTS
from savant_ray.optim.schedule import learning_rate
from savant_ray.training.adamw8bit import from_adamw8bit, to_adamw8bit
from savant_ray.training.checkpoint import FORMAT_VERSION, load, reason, save, sync

OptimizerName = Literal["adamw", "adamw8bit"]

KEYS = ("step", "model_state_dict", "optimizer_state_dict")
SCHEDULER = "scheduler_state_dict"  # the only key that may be missing
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
    found = (path for path in run_folder.glob("step_*.pt") if is_original_name(path.name) and not path.is_dir())
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
    """Return the newest whole file of a step after `beyond`; a damaged one is reported and stays where it is.

    `beyond` is the step of the newest checkpoint of ours, -1 without one.

    Raises:
        CheckpointError: there is no checkpoint of ours, and all files of the original are damaged.
    """
    files = [path for path in original_files(run_folder) if original_step(path) > beyond]
    newest = next(whole_files(files, say), None)
    if newest is None and files and beyond < 0:
        raise CheckpointError(
            f"{run_folder} holds files of the original, but none that is whole. Bring one back, or start anew with "
            "--fresh: it moves this folder aside and loses nothing."
        )
    return newest


def whole_files(files: Sequence[Path], say: Callable[[str], None]) -> Iterator[Path]:
    """Yield the files that are whole, the last first; the others are reported and stay where they are."""
    for path in reversed(files):
        try:
            _checked(path)
        except CheckpointError as damage:
            say(f"{damage}; not used, and left where it is")
        else:
            yield path


def read_original(
    path: Path, names: Sequence[str], effective_batch: int, device: str | torch.device = "cpu"
) -> dict[str, Any]:
    """A file's content as `TrainingState.load_checkpoint` takes it, for a model whose parameters have these names.

    `names` are in the model's order, and the moments are numbered by it. An optimizer of several groups does not say
    which moments are whose; it is left as it is, and `load_checkpoint` tells that it does not fit. The position in the
    global order is step × effective batch, tokens and skips count from 0. The schedule goes on with the rate that the
    original's next update would have; one that is behind the step, because the original could not load its optimizer
    and began anew, is left behind, and `load_checkpoint` reports it.

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
        "schedule_offset": max(0, _last_epoch(content) - content["step"] - 1),
        "data_fingerprint": "",
    }
    return {
        "step": content["step"],
        "model_state_dict": weights,
        "optimizer_state_dict": _renumbered(content["optimizer_state_dict"], list(weights), names),
        SCHEDULER: {"last_epoch": min(_last_epoch(content), content["step"])},
        "savant": savant,
    }


def four_keys(path: Path, device: str | torch.device = "cpu") -> dict[str, Any]:
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
        "model_state_dict": {name: w if name in MASK_BUFFERS else w.float() for name, w in weights.items()},
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
    """Whether a file (see `four_keys`) has AdamW moments for each parameter that it has a state for, and for one."""
    state = four["optimizer_state_dict"]["state"]
    return bool(state) and all(set(entry) == {"step", *MOMENTS} for entry in state.values())


def as_original(
    content: Mapping[str, Any],
    training: TrainingConfig,
    model: ModelConfig,
    optimizer: OptimizerName = "adamw",
    like: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """A checkpoint of ours as the original's four keys, and what they cannot hold, a sentence each.

    `like` is the content of a file of the original (see `four_keys`): its order is kept and its masks are taken over,
    so that the program that wrote it loads the new one too. Learning rates are those of the next update.
    """
    weights, mine = content["model_state_dict"], content["optimizer_state_dict"]
    theirs = like["model_state_dict"] if like else {}
    masks = {name: mask for name, mask in theirs.items() if name in MASK_BUFFERS} or attention_masks(model)
    names = _in_order(weights, theirs or ORDER)
    moments = _renumbered(mine, list(weights), names)["state"] if _is_adamw(mine, weights) else {}
    last_epoch = content["step"] + 1 + content["savant"].get("schedule_offset", 0)
    rate = learning_rate(last_epoch, training.learning_rate, training.warmup_steps, training.max_steps)
    hyperparameters = {"lr": rate, "betas": BETAS, "eps": EPS, "weight_decay": training.weight_decay}
    group = {**hyperparameters, "initial_lr": training.learning_rate, "params": list(range(len(names)))}
    schedule = {
        "base_lrs": [training.learning_rate],
        "last_epoch": last_epoch,
        "_step_count": last_epoch + 1,
        "_last_lr": [rate],
    }
    four = {
        "step": content["step"],
        "model_state_dict": masks | {name: weights[name].float() for name in names},
        "optimizer_state_dict": {"state": moments, "param_groups": [group]},
        SCHEDULER: {**_new_schedule(), **(like or {}).get(SCHEDULER, {}), **schedule},
    }
    return for_optimizer(four, optimizer), [] if moments else [NO_MOMENTS]


def for_optimizer(four: Mapping[str, Any], optimizer: OptimizerName) -> dict[str, Any]:
    """The same content (see `four_keys`) with the optimizer's state as this optimizer loads it."""
    state, groups = (four["optimizer_state_dict"][key] for key in ("state", "param_groups"))
    if optimizer == "adamw8bit":
        state = {number: to_adamw8bit(entry) for number, entry in state.items()}
    own = _group_options(optimizer)
    others = _group_options("adamw" if optimizer == "adamw8bit" else "adamw8bit").keys() - own.keys()
    groups = [own | {name: value for name, value in group.items() if name not in others} for group in groups]
    return {**four, "optimizer_state_dict": {"state": state, "param_groups": groups}}


def attention_masks(model: ModelConfig) -> dict[str, Tensor]:
    """The original's two masks [T, T]: 0 where a query (row) sees a key (column), -inf where not."""
    hidden = torch.full((model.max_seq_len, model.max_seq_len), -torch.inf)
    future = hidden.triu(1)
    return {"global_mask": future, "local_mask": future + hidden.tril(-model.window_size - 1)}


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
        CheckpointError: as `four_keys`.
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
    except Exception as error:  # damaged headers let `zipfile` fail in a dozen ways
        raise CheckpointError(f"{path}: cut short, altered or not written by torch.save ({reason(error)})") from error
    if damaged is not None:
        raise CheckpointError(f"{path}: altered since it was written (its record {damaged} is not what was put in)")


def _is_real(weight: Any) -> bool:
    return isinstance(weight, Tensor) and not weight.is_complex()


def _marked_as_folder(archive: zipfile.ZipFile) -> str | None:
    """A record with MS-DOS's folder bit: PyTorch reads nothing then and hands out memory as it finds it."""
    return next((info.filename for info in archive.infolist() if info.external_attr & 0x10), None)


def _last_epoch(four: Mapping[str, Any]) -> int:
    """Updates that the file's schedule has counted; of a file without a schedule, those up to its step."""
    last_epoch = four.get(SCHEDULER, {}).get("last_epoch")
    return last_epoch if type(last_epoch) is int and 0 <= last_epoch < 2**63 else int(four["step"]) + 1


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


def _group_options(optimizer: OptimizerName) -> dict[str, Any]:
    """What the optimizer keeps in a group beside rate, betas, eps and decay."""
    if optimizer == "adamw8bit":
        return {"alpha": 0.0, "t_alpha": None, "t_beta3": None}
    options: dict[str, Any] = torch.optim.AdamW([torch.zeros(1)]).state_dict()["param_groups"][0]
    return {
        name: value for name, value in options.items() if name not in ("lr", "betas", "eps", "weight_decay", "params")
    }


def _new_schedule() -> dict[str, Any]:
    """What PyTorch saves of a LambdaLR; its function is an object, as in the original."""
    optimizer = torch.optim.AdamW([torch.zeros(1)])
    state: dict[str, Any] = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(max, 1.0)).state_dict()
    return state
