"""Everything that a step changes, and its way into a checkpoint and back.

A checkpoint holds fp32 weights whatever the precision (a bf16 weight joined with its lower half), so that a run can go
on in another precision and an export loses nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from savant_ray.config import Config
from savant_ray.errors import CheckpointError
from savant_ray.model.transformer import UniversalTransformer
from savant_ray.optim.adamw import AdamW
from savant_ray.optim.gradients import GradientBuffer
from savant_ray.training.precision import weights_dtype

FORMAT_VERSION = 1
N_SUMS = 4  # loss, tokens, skipped micro-batches, stop


@dataclass
class TrainingState:
    """`step` updates are done, and `position` sequences of the global order are used up."""

    model: UniversalTransformer
    optimizer: AdamW
    gradients: GradientBuffer
    precision: str
    device: torch.device
    step: int = 0
    position: int = 0
    tokens_seen: int = 0
    skipped_micro_batches: int = 0
    skipped_in_a_row: int = 0  # steps without an update
    data_fingerprint: str = ""
    _seen_weights: dict[str, Tensor] = field(default_factory=dict)

    def master_weights(self) -> dict[str, Tensor]:
        """fp32 weights by name."""
        return {name: self.optimizer.master(p) for name, p in self.model.named_parameters()}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Takes over fp32 weights by name.

        Raises:
            CheckpointError: names or shapes differ from the model's; all differences are listed.
        """
        parameters = dict(self.model.named_parameters())
        if differences := weight_differences(parameters, weights):
            raise CheckpointError("the weights do not fit the model: " + "; ".join(differences))
        for name, parameter in parameters.items():
            self.optimizer.set_master(parameter, weights[name].to(self.device, torch.float32))

    def weights_moved(self) -> float | None:
        """Share of the fp32 weights that changed since the last call, of rows that ever had a gradient.

        None at the first call, which only remembers (in host memory, 4 bytes a weight).
        """
        moved = total = 0
        for name, parameter in self.model.named_parameters():
            now = self.optimizer.master(parameter).cpu()
            rows = self.optimizer.state[parameter]["exp_avg_sq"].reshape(len(parameter), -1).any(dim=1).cpu()
            if name in self._seen_weights:
                moved += int((now != self._seen_weights[name]).reshape(len(now), -1)[rows].sum())
                total += int(rows.sum()) * (now.numel() // len(now))
            self._seen_weights[name] = now.clone()
        return moved / total if total else None

    def to_checkpoint(self) -> dict[str, Any]:
        """The original's four keys, and `savant` with what else a resumed run needs."""
        return {
            "step": self.step,
            "model_state_dict": self.master_weights(),
            "optimizer_state_dict": self.optimizer.state_dict(),
            "scheduler_state_dict": {"last_epoch": self.step},
            "savant": {
                "format_version": FORMAT_VERSION,
                "position": self.position,
                "tokens_seen": self.tokens_seen,
                "skipped_micro_batches": self.skipped_micro_batches,
                "skipped_in_a_row": self.skipped_in_a_row,
                "data_fingerprint": self.data_fingerprint,
                "torch_rng_state": torch.get_rng_state(),
            },
        }

    def load_checkpoint(self, content: dict[str, Any]) -> None:
        """Goes on where `to_checkpoint` was called."""
        extra = content["savant"]
        self.load_weights(content["model_state_dict"])
        self.optimizer.load_state_dict(content["optimizer_state_dict"])
        torch.set_rng_state(extra["torch_rng_state"].cpu())
        self.step = content["step"]
        self.position = extra["position"]
        self.tokens_seen = extra["tokens_seen"]
        self.skipped_micro_batches = extra["skipped_micro_batches"]
        self.skipped_in_a_row = extra["skipped_in_a_row"]


def new_state(config: Config, device: torch.device, precision: str | None = None) -> TrainingState:
    """A model in PyTorch's default initialisation, drawn on the CPU from `run.seed`, and an optimizer without past.

    `precision` is the setting's unless the device needs another.
    """
    precision = precision or config.training.precision
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        model = UniversalTransformer(config.model)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.to(device, weights_dtype(precision))
    optimizer = AdamW(model.parameters(), config.training.learning_rate, config.training.weight_decay)
    gradients = GradientBuffer(model.parameters(), N_SUMS)
    state = TrainingState(model, optimizer, gradients, precision, device)
    state.load_weights(weights)
    return state


def weight_differences(parameters: dict[str, Tensor], weights: dict[str, Tensor]) -> list[str]:
    """What keeps `weights` from fitting, a phrase each."""
    missing = [f"{name} is missing" for name in parameters.keys() - weights.keys()]
    left_over = [f"{name} is unknown" for name in weights.keys() - parameters.keys()]
    reshaped = [
        f"{name} is {list(weights[name].shape)}, the model's {list(parameters[name].shape)}"
        for name in parameters.keys() & weights.keys()
        if weights[name].shape != parameters[name].shape
    ]
    return sorted(missing + left_over + reshaped)
