"""A checkpoint for other programs: a file of the original script, or safetensors with settings and tokenizer."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import save_file

from savant_ray.config import Config
from savant_ray.errors import CheckpointError, SavantError, SettingsError
from savant_ray.training.checkpoint import MANIFEST, TOKENIZER, find_checkpoint, read_checkpoint, read_settings, sync
from savant_ray.training.original import as_original, four_keys, newest_original, write_original

Format = Literal["original", "safetensors"]

WEIGHTS = "model.safetensors"
ARCHITECTURE = "UniversalTransformer"


def export(checkpoint: Path, format: Format, output: Path) -> list[str]:
    """Writes a run's newest checkpoint, a step folder's or a file of the original; returns what was lost, in sentences.

    `original` gives one file, in the order of the original's files in the run folder if there are any, `safetensors` a
    folder with `model.safetensors` (fp32), `config.json`, `tokenizer.json`.

    Raises:
        CheckpointError: there is no whole checkpoint, or it has no tokenizer to go into the folder.
        SavantError: `output` exists already, or cannot be written.
    """
    if output.exists():
        raise SettingsError(f"--output {output}: exists already; name another, or move it away")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if format == "original":
            return _export_original(checkpoint, output)
        _export_safetensors(checkpoint, output)
    except OSError as error:
        raise SavantError(f"--output {output}: {error.strerror or error}") from error
    return []


def _export_original(checkpoint: Path, output: Path) -> list[str]:
    if _is_original(checkpoint):
        write_original(output, four_keys(checkpoint))
        return []
    folder = _folder(checkpoint)
    warnings: list[str] = []
    neighbour = newest_original(folder.parent, -1, warnings.append)
    like = four_keys(neighbour)["model_state_dict"] if neighbour else None
    four, lost = as_original(read_checkpoint(folder), read_settings(folder).training.learning_rate, like)
    write_original(output, four)
    return warnings + lost


def _export_safetensors(checkpoint: Path, output: Path) -> None:
    if _is_original(checkpoint):
        raise CheckpointError(
            f"{checkpoint}: a file of the original has neither settings nor tokenizer. Put it into a run folder and "
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


def _is_original(checkpoint: Path) -> bool:
    return checkpoint.is_file() and not (checkpoint.parent / MANIFEST).is_file()


def _folder(checkpoint: Path) -> Path:
    """The checkpoint folder that is meant, also by the file in it."""
    return find_checkpoint(checkpoint.parent if checkpoint.is_file() else checkpoint)


def _description(config: Config, step: int) -> dict[str, Any]:
    """The model's settings, under the names that they have here."""
    return {"architectures": [ARCHITECTURE], "torch_dtype": "float32", **config.model.model_dump(), "step": step}
