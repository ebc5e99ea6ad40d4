"""Muon for the matrices of the block, AdamW for embedding, head, norms and biases, under one learning rate.

The momentum of a matrix is made (nearly) orthogonal before it is applied, by five Newton-Schulz steps (K. Jordan, 2024),
and scaled to the size that AdamW's updates have (Moonlight, arXiv 2502.16982), so that one rate suits both. PyTorch's
`torch.optim.Muon` computes the steps in bf16, which takes a CPU without bf16 instructions a hundred times longer; here
they are fp32 on CPUs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from savant_ray.optim.adamw import AdamW, adamw_group
from savant_ray.optim.master_weights import MasterWeightOptimizer

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic: any singular value ends between 0.7 and 1.2
STEPS = 5
MATCH_ADAMW = 0.2  # the root mean square of AdamW's updates, in learning rates
BUFFER = "momentum_buffer"


class Muon(AdamW):
    """`matrices` have two dimensions; `others` are AdamW's."""

    def __init__(
        self, matrices: Iterable[nn.Parameter], others: Iterable[nn.Parameter], lr: float, weight_decay: float
    ) -> None:
        group = {"params": list(matrices), "lr": lr, "momentum": MOMENTUM, "weight_decay": weight_decay}
        MasterWeightOptimizer.__init__(self, [group, adamw_group(others, lr, weight_decay)])

    def new_state(self, parameter: nn.Parameter, group: dict[str, Any]) -> dict[str, Tensor]:
        """A matrix has a momentum only."""
        if "momentum" not in group:
            return super().new_state(parameter, group)
        return {BUFFER: torch.zeros_like(parameter, dtype=torch.float32)}

    def update(self, full: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """One step of one weight; Nesterov's momentum."""
        if "momentum" not in group:
            super().update(full, gradient, state, group)
            return
        momentum = state[BUFFER].lerp_(gradient, 1 - group["momentum"])
        direction = orthogonalized(gradient.lerp(momentum, group["momentum"]))
        full.mul_(1 - group["lr"] * group["weight_decay"])
        full.add_(direction, alpha=-group["lr"] * MATCH_ADAMW * math.sqrt(max(full.shape)))

    def had_gradient(self, parameter: nn.Parameter) -> Tensor:
        """Where there is momentum."""
        state = self.state[parameter]
        return state[BUFFER].any(dim=1) if BUFFER in state else super().had_gradient(parameter)


def orthogonalized(matrix: Tensor) -> Tensor:
    """The nearest matrix, nearly, whose singular values are all 1; of the same shape, fp32."""
    a, b, c = COEFFICIENTS
    x: Tensor = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    x = x.to(torch.bfloat16 if x.is_cuda else torch.float32)
    x = x / (x.norm() + 1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if matrix.shape[0] <= matrix.shape[1] else x.mT).float()
