"""Export of a checkpoint as a file with which the original script can continue training."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from savant_ray.config import ModelConfig, TrainingConfig
from savant_ray.errors import CheckpointError
from savant_ray.optim.adamw import BETAS, EPS, MOMENTS
from savant_ray.optim.schedule import scheduled_rate
from savant_ray.original.conversion import find_original, in_order
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
from savant_ray.original.names import is_original_name, original_files, original_step
from savant_ray.training.checkpoint import AVERAGE, find_checkpoint, read_checkpoint, read_settings
from savant_ray.training.safetensors_export import output_errors_explained, refuse_existing_output

CODE_LITERALS = ("global_every", "soft_cap")  # literals in the original's code, where a user can edit them
NO_OPTIMIZER_KNOWN = (
    "written for PyTorch's AdamW. If the original uses bitsandbytes, it fails at its first update with this file "
    "(KeyError: 'state1'); export with --optimizer adamw8bit instead"
)
NO_AVERAGE = (
    "the file holds the weights of the last step, not their average (training.ema_decay), because the original continues "
    "training with them; --format safetensors exports the average"
)
OTHER_SCHEDULE = (
    "trained with training.schedule: wsd, but the original's learning rate falls as a cosine; unless its code is changed, "
    "it continues with other learning rates"
)
OTHER_LOOPS = (
    "trained with twice the loops in some steps (training.double_loops_fraction), but the original always continues with "
    "model.n_loops"
)
NO_MOMENTS = (
    "the optimizer's state has no AdamW moments, so the file has none and the original starts a fresh optimizer"
)
PARAMETER_ORDER = (  # of the original, unless a file of the original in the run folder has another order
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
)


def export_original(checkpoint: Path, output: Path, optimizer: OptimizerName | None = None) -> list[str]:
    """Write a checkpoint as a file of the original; return warnings.

    `checkpoint` is a run folder, a step folder or a file of the original. A run folder stands for its newest checkpoint or,
    if it has none, its newest file of the original. `optimizer` is the one that the original will use. If the run folder
    contains files of the original, the newest intact one determines the parameter order and the default of `optimizer`.

    Raises:
        CheckpointError: there is no intact checkpoint, or its model has a setting without a counterpart in the original.
        SavantError: `output` exists already, or cannot be written.
    """
    refuse_existing_output(output)
    warnings: list[str] = []
    if source := find_original(checkpoint, warnings.append):
        return warnings + _export_file(source, output, optimizer)
    return warnings + _export_checkpoint(find_checkpoint(checkpoint), output, optimizer)


def _export_file(source: Path, output: Path, optimizer: OptimizerName | None) -> list[str]:
    """Copy a file of the original, with the optimizer state in the format of `optimizer`; return warnings."""
    content = read_file(source)
    warnings = [] if has_moments(content) else [NO_MOMENTS]
    if warnings:
        content["optimizer_state_dict"]["state"] = {}
    target = optimizer or optimizer_of(content)
    content = for_optimizer(content, target) if target else content
    with output_errors_explained(output):
        write_original(output, content)
    return warnings + _wrong_name(output, content["step"])


def _export_checkpoint(folder: Path, output: Path, optimizer: OptimizerName | None) -> list[str]:
    """Write a savant_ray checkpoint as a file of the original; return warnings."""
    warnings: list[str] = []
    config = read_settings(folder)
    _refuse_unsupported_model(folder, config.model)
    content = read_checkpoint(folder)
    reference = newest_intact(reversed(original_files(folder.parent)), warnings.append)
    reference_content = read_file(reference) if reference else None
    target = optimizer or (optimizer_of(reference_content) if reference_content else None)
    original, warnings_of_conversion = to_original(
        content, config.training, config.model, target or "adamw", reference_content
    )
    with output_errors_explained(output):
        write_original(output, original)
    warnings += warnings_of_conversion
    warnings += [NO_AVERAGE] if AVERAGE in content else []
    warnings += [OTHER_SCHEDULE] if config.training.schedule == "wsd" else []
    warnings += [OTHER_LOOPS] if config.training.double_loops_fraction else []
    if target is None and NO_MOMENTS not in warnings:  # any optimizer of the original can load a file without moments
        warnings.append(NO_OPTIMIZER_KNOWN)
    warnings += _differences(config.model, original["model_state_dict"], reference, reference_content)
    return warnings + _wrong_name(output, content["step"])


def _wrong_name(output: Path, step: int) -> list[str]:
    """Return a warning if the name of the file has another step than its content."""
    if not is_original_name(output.name) or original_step(output.name) == step:
        return []
    return [f"{output} contains step {step}: rename it to step_{step}.pt, otherwise savant refuses to read it"]


def _refuse_unsupported_model(folder: Path, model: ModelConfig) -> None:
    """Refuse a model that the original cannot compute.

    Raises:
        CheckpointError: settings without a counterpart in the original are not at their defaults; all are listed.
    """
    defaults = ModelConfig()
    unsupported = [
        f"model.{name}: {getattr(model, name)}"
        for name in ModelConfig.model_fields
        if name not in (*CONSTANTS, *CODE_LITERALS) and getattr(model, name) != getattr(defaults, name)
    ]
    if unsupported:
        raise CheckpointError(
            f"{folder}: trained with {', '.join(unsupported)}, which the original does not support; it would compute "
            "different results with the same weights. --format safetensors can store this model."
        )


def _differences(
    model: ModelConfig,
    written: Mapping[str, Tensor],
    reference: Path | None,
    reference_content: Mapping[str, Any] | None,
) -> list[str]:
    """Return warnings about constants to change in the original so that it computes the same as `model`.

    Constants are compared with those of `reference`, a file of the original in the run folder; if there is none, with the
    published constants of the original, which are the defaults of our settings.
    """
    defaults = ModelConfig()
    warnings = []
    for name in CODE_LITERALS:
        value, original_value = getattr(model, name), getattr(defaults, name)
        if value != original_value and not (
            name == "global_every"
            and global_loops(model.model_dump(), value) == global_loops(model.model_dump(), original_value)
        ):
            warnings.append(
                f"trained with model.{name}: {value}, but the original's code has {original_value}; unless it is changed, "
                "the original computes different results with these weights"
            )
    if reference_content is not None and reference is not None:
        weights = reference_content["model_state_dict"]
        differences = [
            f"{name} is {list(weights[name].shape)} instead of {list(tensor.shape)}"
            for name, tensor in written.items()
            if name in weights and weights[name].shape != tensor.shape
        ]
        differences += [
            f"{name} does not match model.max_seq_len {model.max_seq_len} and model.window_size {model.window_size}"
            for name, mask in attention_masks(model).items()
            if name in weights and not torch.equal(visible_keys(weights[name]), visible_keys(mask))
        ]
        if differences:
            warnings.append(f"{reference.name} in the run folder has another model: {'; '.join(differences)}")
        return warnings
    differences = [
        f"{name} {getattr(model, name)} ({getattr(defaults, name)})"
        for name in CONSTANTS
        if getattr(model, name) != getattr(defaults, name)
    ]
    if differences:
        warnings.append(
            f"set these constants in the original (now: the values in parentheses): {', '.join(differences)}"
        )
    return warnings


def to_original(
    content: Mapping[str, Any],
    training: TrainingConfig,
    model: ModelConfig,
    optimizer: OptimizerName = "adamw",
    reference: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Convert the content of a savant_ray checkpoint to the original's four keys; return them and warnings.

    `reference` is the content of a file of the original (see `read_file`), whose parameter order and masks are used so
    that the script that wrote it can load the new file. Learning rates are those of the next update.
    """
    weights, state = content["model_state_dict"], content["optimizer_state_dict"]
    reference_weights = reference["model_state_dict"] if reference else {}
    masks = {name: mask for name, mask in reference_weights.items() if name in MASKS} or attention_masks(model)
    names = in_order(weights, reference_weights or PARAMETER_ORDER)
    moments = renumbered(state, list(weights), names)["state"] if _is_adamw(state, weights) else {}
    last_epoch = content["step"] + 1 + content["savant"].get("schedule_offset", 0)
    rate = scheduled_rate(last_epoch, training)
    hyperparameters = {"lr": rate, "betas": BETAS, "eps": EPS, "weight_decay": training.weight_decay}
    group = {**hyperparameters, "initial_lr": training.learning_rate, "params": list(range(len(names)))}
    schedule = {
        "base_lrs": [training.learning_rate],
        "last_epoch": last_epoch,
        "_step_count": last_epoch + 1,
        "_last_lr": [rate],
    }
    original = {
        "step": content["step"],
        "model_state_dict": masks | {name: weights[name].float() for name in names},
        "optimizer_state_dict": {"state": moments, "param_groups": [group]},
        SCHEDULER: {**_new_schedule(), **(reference or {}).get(SCHEDULER, {}), **schedule},
    }
    return for_optimizer(original, optimizer), [] if moments else [NO_MOMENTS]


def _is_adamw(optimizer: Mapping[str, Any], weights: Mapping[str, Tensor]) -> bool:
    """Return whether an optimizer state has a step and both moments for each weight."""
    state = optimizer["state"]
    return len(optimizer["param_groups"]) == 1 and all(
        set(entry := state.get(number, {})) == {"step", *MOMENTS}
        and all(entry[name].shape == weight.shape for name in MOMENTS)
        for number, weight in enumerate(weights.values())
    )


def _new_schedule() -> dict[str, Any]:
    """Return the state dict of a LambdaLR whose function is a callable object, as in the original.

    PyTorch stores an entry of attributes for such an object and None for a plain function. The function itself is
    not stored, so any callable object can be used here.
    """
    optimizer = torch.optim.AdamW([torch.zeros(1)])
    state: dict[str, Any] = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(max, 1.0)).state_dict()
    return state
