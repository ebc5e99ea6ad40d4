"""A checkpoint for other programs: safetensors with settings and tokenizer."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from savant_ray.config import Config
from savant_ray.errors import SavantError, SettingsError
from savant_ray.training.checkpoint import (
    find_checkpoint,
    model_weights,
    read_checkpoint,
    read_settings,
    sync,
    tokenizer_files,
)

WEIGHTS = "model.safetensors"
ARCHITECTURE = "UniversalTransformer"


def export_safetensors(checkpoint: Path, output: Path, raw_weights: bool = False) -> None:
    """Write a checkpoint as the folder `output`; for the folder of a run, its newest checkpoint.

    The output holds `model.safetensors` (fp32), `config.json`, `tokenizer.json` and the files of its chat template. The
    weights are averaged ones with `training.ema_decay`, unless `raw_weights`.

    Raises:
        CheckpointError: there is no complete checkpoint, or it has no tokenizer.
        SavantError: `output` exists already, or cannot be written.
    """
    refuse_existing_output(output)
    folder = find_checkpoint(checkpoint)
    content = read_checkpoint(folder)
    description = json.dumps(_description(read_settings(folder), content["step"]), indent=2) + "\n"
    texts = {"config.json": description.encode(), **{path.name: path.read_bytes() for path in tokenizer_files(folder)}}
    with new_folder(output) as temporary:
        write_weights(model_weights(content, raw_weights), temporary / WEIGHTS)
        for name, text in texts.items():
            (temporary / name).write_bytes(text)


def refuse_existing_output(output: Path) -> None:
    """Check that `output` does not exist.

    Raises:
        SettingsError: it exists already.
    """
    if output.exists() or output.is_symlink():  # a symbolic link to nothing does not exist
        raise SettingsError(f"--output {output}: exists already; name another, or move it away")


@contextmanager
def output_errors_explained(output: Path) -> Iterator[None]:
    """Name `output` in errors of the storage; only the block that writes it should be enclosed.

    Raises:
        SavantError: instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise SavantError(f"--output {output}: {error.strerror or error}") from error


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `output` when the block ends; if the block raises an error, it is removed.

    The folders above `output` are created.

    Raises:
        SavantError: it cannot be written.
    """
    temporary = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.tmp")
    with output_errors_explained(output):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            for path in [*temporary.rglob("*"), temporary]:
                sync(path)
            temporary.rename(output)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sync(output.parent)


def write_weights(weights: dict[str, Tensor], path: Path) -> None:
    """Write tensors as a new safetensors file.

    Raises:
        OSError: the storage fails.
    """
    path.touch()
    mode = path.stat().st_mode  # by the umask; that of safetensors' file is 0600
    try:
        save_file(weights, path, metadata={"format": "pt"})
        path.chmod(mode)
    except SafetensorError as error:  # raised by its writer if the disk is full
        raise OSError(str(error)) from error


def _description(config: Config, step: int) -> dict[str, Any]:
    """Return the model's settings under their names in savant_ray, and whether special tokens are added to a text."""
    return {
        "architectures": [ARCHITECTURE],
        "torch_dtype": "float32",
        **config.model.model_dump(),
        "add_special_tokens": config.data.add_special_tokens,
        "step": step,
    }
