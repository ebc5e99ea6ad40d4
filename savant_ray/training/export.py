"""A checkpoint for other programs: a file of the original script, or safetensors with settings and tokenizer."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from savant_ray.config import Config, ModelConfig
from savant_ray.errors import CheckpointError, SavantError, SettingsError
from savant_ray.training.checkpoint import (
    MANIFEST,
    TOKENIZER,
    find_checkpoint,
    newest_checkpoint,
    read_checkpoint,
    read_settings,
    sync,
)
from savant_ray.training.original import (
    NO_MOMENTS,
    OptimizerName,
    as_original,
    attention_masks,
    for_optimizer,
    four_keys,
    has_moments,
    newest_original,
    optimizer_of,
    original_files,
    whole_files,
    write_original,
)

Format = Literal["original", "safetensors"]

WEIGHTS = "model.safetensors"
ARCHITECTURE = "UniversalTransformer"
CONSTANTS = ("vocab_size", "dim", "n_heads", "n_loops", "max_seq_len", "window_size")  # that the original's user sets
IN_ITS_CODE = ("global_every", "soft_cap")
NO_OPTIMIZER_KNOWN = (
    "written for PyTorch's AdamW. Where the original runs with bitsandbytes it would fail at its first update "
    "(KeyError: 'state1'): export with --optimizer adamw8bit for it"
)


def export(checkpoint: Path, format: Format, output: Path, optimizer: OptimizerName | None = None) -> list[str]:
    """Write a run's newest checkpoint, that of a step folder or a file of the original; return warnings, in sentences.

    A run folder that holds only files of the original stands for the newest of them.

    `original` gives one file, in the order of the original's files in the run folder if there are any, `safetensors` a
    folder with `model.safetensors` (fp32), `config.json`, `tokenizer.json`. `optimizer` is the one that the original
    goes on with; without it, that of its newest file.

    Raises:
        CheckpointError: there is no whole checkpoint, it has no tokenizer to go into the folder, or its model has a
            setting without a counterpart in the original.
        SavantError: `output` exists already, or cannot be written.
    """
    if output.exists():
        raise SettingsError(f"--output {output}: exists already; name another, or move it away")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if format == "original":
            return _export_original(checkpoint, output, optimizer)
        _export_safetensors(checkpoint, output)
    except OSError as error:
        raise SavantError(f"--output {output}: {error.strerror or error}") from error
    return []


def _export_original(checkpoint: Path, output: Path, optimizer: OptimizerName | None) -> list[str]:
    warnings: list[str] = []
    if source := _original(checkpoint, warnings.append):
        four = four_keys(source)
        if not has_moments(four):
            four["optimizer_state_dict"]["state"] = {}
            warnings.append(NO_MOMENTS)
        target = optimizer or optimizer_of(four)
        write_original(output, for_optimizer(four, target) if target else four)
        return warnings
    folder = _folder(checkpoint)
    config = read_settings(folder)
    _refuse_unknown_to_the_original(folder, config.model)
    content = read_checkpoint(folder)
    neighbour = next(whole_files(original_files(folder.parent), warnings.append), None)
    like = four_keys(neighbour) if neighbour else None
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
            name == "global_every" and _global_loops(model, mine) == _global_loops(model, theirs)
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
            if name in theirs and not torch.equal(_visible(theirs[name]), _visible(mask))
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


def _visible(mask: Tensor) -> Tensor:
    """[T, T] bool: which keys a query sees; each sees itself."""
    return mask.squeeze() == mask.flatten()[:1]


def _global_loops(model: ModelConfig, global_every: int) -> list[bool]:
    """Which loops see the whole sequence."""
    covers_all = model.window_size >= model.max_seq_len - 1
    return [covers_all or (loop + 1) % global_every == 0 for loop in range(model.n_loops)]


def _export_safetensors(checkpoint: Path, output: Path) -> None:
    if source := _original(checkpoint, lambda _: None):
        raise CheckpointError(
            f"{source}: a file of the original has neither settings nor tokenizer. Put it into a run folder and "
            "train on from it; the checkpoints of that run have both."
        )
    folder = _folder(checkpoint)
    content = read_checkpoint(folder)
    aside = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        aside.mkdir()
        save_file(content["model_state_dict"], aside / WEIGHTS, metadata={"format": "pt"})
        description = json.dumps(_description(read_settings(folder), content["step"]), indent=2)
        (aside / "config.json").write_text(description + "\n", encoding="utf-8")
        shutil.copyfile(folder / TOKENIZER, aside / TOKENIZER)
        for path in [*aside.iterdir(), aside]:
            sync(path)
        aside.rename(output)
    except SafetensorError as error:  # what its writer makes of a full disk
        raise OSError(str(error)) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    sync(output.parent)


def _original(checkpoint: Path, warn: Callable[[str], None]) -> Path | None:
    """The original's file that is meant: itself, or the newest of a folder without checkpoints of ours.

    Raises:
        CheckpointError: the folder has only damaged ones.
    """
    if checkpoint.is_dir():
        is_ours = (checkpoint / MANIFEST).is_file() or newest_checkpoint(checkpoint) is not None
        return None if is_ours else newest_original(checkpoint, -1, warn)
    return checkpoint if checkpoint.is_file() and not (checkpoint.parent / MANIFEST).is_file() else None


def _folder(checkpoint: Path) -> Path:
    """The checkpoint folder that is meant, also by the file in it."""
    return find_checkpoint(checkpoint.parent if checkpoint.is_file() else checkpoint)


def _description(config: Config, step: int) -> dict[str, Any]:
    """The model's settings, under the names that they have here."""
    return {"architectures": [ARCHITECTURE], "torch_dtype": "float32", **config.model.model_dump(), "step": step}
