"""AdamW over fp32 or split bf16 weights, with fp32 moments; the arithmetic is PyTorch's (`torch.optim.adamw`, fused)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from savant_ray.optim.master_weights import MasterWeightOptimizer

BETAS = (0.9, 0.999)
EPS = 1e-8
MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW(MasterWeightOptimizer):
    """Decoupled weight decay (arXiv 1711.05101) on every parameter."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__([adamw_group(params, lr, weight_decay)])

    def new_state(self, parameter: nn.Parameter, group: dict[str, Any]) -> dict[str, Tensor]:
        """Step count and two moments."""
        return {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            **{name: torch.zeros_like(parameter, dtype=torch.float32) for name in MOMENTS},
        }

    def update(self, full: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """One step of one weight."""
        beta1, beta2 = group["betas"]
        average, average_square = ([state[name]] for name in MOMENTS)
        adamw(
            [full], [gradient], average, average_square, [], [state["step"]], fused=True, amsgrad=False, maximize=False,
            beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
        )  # fmt: skip

    def had_gradient(self, parameter: nn.Parameter) -> Tensor:
        """Where the second moment is not zero."""
        average_square: Tensor = self.state[parameter][MOMENTS[1]]
        return average_square.reshape(len(parameter), -1).any(dim=1)


def adamw_group(params: Iterable[nn.Parameter], lr: float, weight_decay: float) -> dict[str, Any]:
    """A group of parameters with the constants of AdamW."""
    return {"params": list(params), "lr": lr, "betas": BETAS, "eps": EPS, "weight_decay": weight_decay}
