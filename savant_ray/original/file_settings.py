"""Settings for a file of the original, which stores none: inferred from weights and masks, or given by the user."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from savant_ray.config import Config, ModelConfig
from savant_ray.model.transformer import UniversalTransformer
from savant_ray.original.file import MASKS
from savant_ray.training.state import reshaped_weights

# Model settings that are constants at the top of the original script; its code fixes the others.
CONSTANTS = ("vocab_size", "dim", "n_heads", "n_loops", "max_seq_len", "window_size")


@dataclass(frozen=True)
class FileSettings:
    """Complete settings for a file of the original, and messages about how they were determined."""

    config: Config
    """Settings whose model section matches the file."""
    contradictions: tuple[str, ...]
    """Explicit settings that contradict the file."""
    mismatches: tuple[str, ...]
    """Weights that are missing, unknown or of another shape than in a model of these sizes."""
    not_inferred: tuple[str, ...]
    """Model settings that cannot be inferred from the file, with their explicit or default value: `model.n_heads 16`."""
    assumed: tuple[str, ...]
    """Those of `not_inferred` that have the default value because no explicit one was given."""

    @property
    def problems(self) -> tuple[str, ...]:
        """Return all reasons not to use the file with these settings."""
        return self.contradictions + self.mismatches


def complete_settings(weights: Mapping[str, Tensor], explicit: Mapping[str, Mapping[str, Any]]) -> FileSettings:
    """Combine the settings inferred from a file with explicit ones (nested by section, as in YAML) and defaults.

    `weights` is the file's `model_state_dict` with its masks. If an explicit setting contradicts the file, the value of
    the file is used.

    Raises:
        SettingsError: an explicit setting is invalid.
    """
    explicit_model, sizes = dict(explicit.get("model", {})), inferred_sizes(weights)
    heads, dim = explicit_model.get("n_heads", ModelConfig().n_heads), sizes.get("dim")
    contradictions = []
    if dim is not None and type(heads) is int and heads > 0 and dim % heads:
        advice = "" if "n_heads" in explicit_model else "; give model.n_heads"
        contradictions.append(f"model.n_heads: {heads} does not divide the file's model.dim, {dim}{advice}")
        heads = 1  # so that the other settings can be compared
    config = Config.from_dict({**explicit, "model": {**explicit_model, **sizes, "n_heads": heads}})
    file_model = _original_settings(config.model, explicit_model)
    for name, value in file_model.items():
        if name in explicit_model and name != "n_heads" and explicit_model[name] != value:
            source = "the file" if name in CONSTANTS else "the original"
            contradictions.append(f"model.{name}: {explicit_model[name]}, but {source} has {value}")
    config = Config.from_dict({**config.to_dict(), "model": file_model})
    not_inferred = {name: f"model.{name} {file_model[name]}" for name in CONSTANTS if name not in sizes}
    assumed = tuple(text for name, text in not_inferred.items() if name not in explicit_model)
    mismatches = tuple(_mismatches(weights, config.model))
    return FileSettings(config, tuple(contradictions), mismatches, tuple(not_inferred.values()), assumed)


def inferred_sizes(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Infer model settings from weights and masks; `max_seq_len` and `window_size` are inferred from the masks only."""
    sizes: dict[str, int] = {}
    embedding = weights.get("embed.weight")
    if embedding is not None and embedding.dim() == 2 and embedding.numel():
        sizes |= dict(zip(("vocab_size", "dim"), embedding.shape, strict=True))
    for name in sorted(name for name in MASKS & weights.keys() if weights[name].numel()):
        visible = visible_keys(weights[name])
        if visible.dim() == 2 and len(visible) == visible.shape[1] >= 2:
            sizes["max_seq_len"] = len(visible)
            if name == "local_mask" and (n_keys := int(visible[-1].sum())) > 1:
                sizes["window_size"] = n_keys - 1  # the last query attends to itself and to the window before it
    return sizes


def _original_settings(completed: ModelConfig, explicit: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model settings, with the original's values for those that are not constants of the script.

    An explicit value that has the same effect is kept: a window longer than the sequence, or a `global_every` with which
    the same loops are global.
    """
    defaults, model = ModelConfig(), completed.model_dump()
    window = explicit.get("window_size")
    # The mask of a window that covers the whole sequence does not show how much longer than the sequence the window is.
    if type(window) is int and window > model["window_size"] == model["max_seq_len"] - 1:
        model["window_size"] = window
    global_every = defaults.global_every
    if global_loops(model, completed.global_every) == global_loops(model, global_every):
        global_every = completed.global_every
    fixed = {name: getattr(defaults, name) for name in ModelConfig.model_fields if name not in CONSTANTS}
    return model | fixed | {"global_every": global_every}


def visible_keys(mask: Tensor) -> Tensor:
    """Convert a mask of the original to bool, [T, T]: which keys (columns) each query (row) attends to."""
    # A visible key has the value 0 or, in older files, 1. The first entry shows which: query 0 always attends to key 0.
    return mask.squeeze() == mask.flatten()[:1]


def global_loops(model: Mapping[str, Any], global_every: int) -> list[bool]:
    """Return for each loop whether it attends to the whole sequence."""
    covers_all = model["window_size"] >= model["max_seq_len"] - 1
    return [covers_all or (loop + 1) % global_every == 0 for loop in range(model["n_loops"])]


def attention_masks(model: ModelConfig) -> dict[str, Tensor]:
    """Return the original's two masks [T, T]: 0 where a query (row) attends to a key (column), else -inf."""
    masked = torch.full((model.max_seq_len, model.max_seq_len), -torch.inf)
    future = masked.triu(1)
    return {"global_mask": future, "local_mask": future + masked.tril(-model.window_size - 1)}


def parameter_shapes(model: ModelConfig) -> dict[str, Tensor]:
    """Return the parameters of a model by name, in savant_ray's order, as tensors on the meta device."""
    with torch.device("meta"):
        return dict(UniversalTransformer(model).named_parameters())


def _mismatches(weights: Mapping[str, Tensor], model: ModelConfig) -> list[str]:
    """Return a message for each weight that is missing, unknown or of another shape than in the model."""
    parameters = parameter_shapes(model)
    missing = [f"{name} is missing" for name in parameters if name not in weights]
    unknown = [f"{name} is unknown" for name in weights if name not in parameters and name not in MASKS]
    return [*missing, *unknown, *reshaped_weights(parameters, weights).values()]
