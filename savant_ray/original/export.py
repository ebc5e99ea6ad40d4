"""A checkpoint as a file of the original script, which goes on from it."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from savant_ray.config import ModelConfig, TrainingConfig
from savant_ray.errors import CheckpointError
from savant_ray.optim.adamw import BETAS, EPS, MOMENTS
from savant_ray.optim.schedule import learning_rate
from savant_ray.original.conversion import find_original
from savant_ray.original.file import (
    MASKS,
    SCHEDULER,
    OptimizerName,
    for_optimizer,
    has_moments,
    newest_intact,
    optimizer_of,
    read_file,
    renumbered,
    write_original,
)
from savant_ray.original.file_settings import CONSTANTS, attention_masks, global_loops, visible_keys
from savant_ray.original.names import original_files
from savant_ray.training.checkpoint import find_checkpoint, read_checkpoint, read_settings
from savant_ray.training.safetensors_export import new_output

IN_ITS_CODE = ("global_every", "soft_cap")
NO_OPTIMIZER_KNOWN = (
    "written for PyTorch's AdamW. Where the original runs with bitsandbytes it would fail at its first update "
    "(KeyError: 'state1'): export with --optimizer adamw8bit for it"
)
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


def export_original(checkpoint: Path, output: Path, optimizer: OptimizerName | None = None) -> list[str]:
    """Write a run's newest checkpoint, that of a step folder or a file of the original; return warnings, in sentences.

    A run folder that holds only files of the original stands for the newest of them. The new file is in the order of the
    original's files in the run folder if there are any. `optimizer` is the one that the original goes on with; without
    it, that of its newest file.

    Raises:
        CheckpointError: there is no whole checkpoint, or its model has a setting without a counterpart in the original.
        SavantError: `output` exists already, or cannot be written.
    """
    with new_output(output):
        warnings: list[str] = []
        if source := find_original(checkpoint, warnings.append):
            return warnings + _export_anew(source, output, optimizer)
        return warnings + _export(find_checkpoint(checkpoint), output, optimizer)


def _export_anew(source: Path, output: Path, optimizer: OptimizerName | None) -> list[str]:
    """Write a file of the original once more, for this optimizer if there is one."""
    four = read_file(source)
    lost = [] if has_moments(four) else [NO_MOMENTS]
    if lost:
        four["optimizer_state_dict"]["state"] = {}
    target = optimizer or optimizer_of(four)
    write_original(output, for_optimizer(four, target) if target else four)
    return lost


def _export(folder: Path, output: Path, optimizer: OptimizerName | None) -> list[str]:
    """Write a checkpoint of ours."""
    warnings: list[str] = []
    config = read_settings(folder)
    _refuse_unknown_to_the_original(folder, config.model)
    content = read_checkpoint(folder)
    neighbour = newest_intact(reversed(original_files(folder.parent)), warnings.append)
    like = read_file(neighbour) if neighbour else None
    target = optimizer or (optimizer_of(like) if like else None)
    four, lost = as_original(content, config.training, config.model, target or "adamw", like)
    write_original(output, four)
    warnings += lost
    if target is None and not lost:
        warnings.append(NO_OPTIMIZER_KNOWN)
    return warnings + _differences(config.model, four["model_state_dict"], neighbour, like)


def _refuse_unknown_to_the_original(folder: Path, model: ModelConfig) -> None:
    """Refuse a model with a setting that has no counterpart in the original.

    Raises:
        CheckpointError: the model has one that is not at its default; all are listed.
    """
    defaults = ModelConfig()
    unknown = [
        f"model.{name}: {getattr(model, name)}"
        for name in ModelConfig.model_fields
        if name not in (*CONSTANTS, *IN_ITS_CODE) and getattr(model, name) != getattr(defaults, name)
    ]
    if unknown:
        raise CheckpointError(
            f"{folder}: trained with {', '.join(unknown)}, which the original does not have; with the same weights it "
            "would compute something else. --format safetensors can hold this model."
        )


def _differences(
    model: ModelConfig, written: Mapping[str, Tensor], neighbour: Path | None, like: Mapping[str, Any] | None
) -> list[str]:
    """What has to be changed in the original before it loads the file or computes the same with it, in sentences.

    The constants are compared with the `neighbour`, a file of the original beside the checkpoint, as far as it shows
    them, else with the original's published ones, which are the defaults here.
    """
    defaults = ModelConfig()
    warnings = []
    for name in IN_ITS_CODE:
        mine, theirs = getattr(model, name), getattr(defaults, name)
        if mine != theirs and not (
            name == "global_every"
            and global_loops(model.model_dump(), mine) == global_loops(model.model_dump(), theirs)
        ):
            warnings.append(
                f"trained with model.{name}: {mine}, where the original's code has {theirs}; unless that is changed, it "
                "computes something else with these weights"
            )
    if like is not None and neighbour is not None:
        theirs = like["model_state_dict"]
        other = [
            f"{name} is {list(tensor.shape)}, there {list(theirs[name].shape)}"
            for name, tensor in written.items()
            if name in theirs and theirs[name].shape != tensor.shape
        ]
        other += [
            f"{name} is not that of model.max_seq_len {model.max_seq_len} and model.window_size {model.window_size}"
            for name, mask in attention_masks(model).items()
            if name in theirs and not torch.equal(visible_keys(theirs[name]), visible_keys(mask))
        ]
        return warnings + (
            [f"{neighbour.name} in the run folder is of another model: {'; '.join(other)}"] * bool(other)
        )
    other = [
        f"{name} {getattr(model, name)} ({getattr(defaults, name)})"
        for name in CONSTANTS
        if getattr(model, name) != getattr(defaults, name)
    ]
    if other:
        warnings.append(f"the original needs this model's constants instead of its own: {', '.join(other)}")
    return warnings


def as_original(
    content: Mapping[str, Any],
    training: TrainingConfig,
    model: ModelConfig,
    optimizer: OptimizerName = "adamw",
    like: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """A checkpoint of ours as the original's four keys, and what they cannot hold, a sentence each.

    `like` is the content of a file of the original (see `read_file`): its order is kept and its masks are taken over,
    so that the program that wrote it loads the new one too. Learning rates are those of the next update.
    """
    weights, mine = content["model_state_dict"], content["optimizer_state_dict"]
    theirs = like["model_state_dict"] if like else {}
    masks = {name: mask for name, mask in theirs.items() if name in MASKS} or attention_masks(model)
    names = _in_order(weights, theirs or ORDER)
    moments = renumbered(mine, list(weights), names)["state"] if _is_adamw(mine, weights) else {}
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


def _new_schedule() -> dict[str, Any]:
    """What PyTorch saves of a LambdaLR; its function is an object, as in the original."""
    optimizer = torch.optim.AdamW([torch.zeros(1)])
    state: dict[str, Any] = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(max, 1.0)).state_dict()
    return state
