"""Muon for the matrices of the recurrent block, AdamW for embedding, head, norms and biases, with one learning rate.

Muon orthogonalizes (approximately) the momentum of a matrix with five Newton-Schulz iterations before applying it (K.
Jordan, 2024). The update is scaled to the root mean square of AdamW's updates (Moonlight, arXiv 2502.16982), so that one
learning rate suits both. PyTorch's `torch.optim.Muon` iterates in bf16, which is a hundred times slower on a CPU without
bf16 instructions; here the iterations are fp32 on CPUs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from savant_ray.optim.adamw import AdamWRule, MasterWeightOptimizer, adamw_group

MOMENTUM = 0.95
# a, b, c of the polynomial a·s + b·s³ + c·s⁵, which each iteration applies to every singular value s. After five iterations,
# values that were above 0.0015 of the Frobenius norm are between 0.68 and 1.21, smaller ones lower.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
ADAMW_RMS = 0.2  # root mean square of AdamW's updates, in multiples of the learning rate
BUFFER = "momentum_buffer"


class MuonRule:
    """Orthogonalized Nesterov momentum for a matrix."""

    def new_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return a zero momentum buffer."""
        return {BUFFER: torch.zeros_like(parameter, dtype=torch.float32)}

    def update(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """Update one matrix."""
        momentum = state[BUFFER].lerp_(gradient, 1 - group["momentum"])
        direction = orthogonalized(gradient.lerp(momentum, group["momentum"]))
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(direction, alpha=-group["lr"] * ADAMW_RMS * math.sqrt(max(weight.shape)))

    def had_gradient(self, state: dict[str, Tensor]) -> Tensor:
        """Return the rows whose momentum is not zero."""
        return state[BUFFER].any(dim=1)


class Muon(MasterWeightOptimizer):
    """Muon for `matrices` (two-dimensional parameters), AdamW for `others`."""

    def __init__(
        self, matrices: Iterable[nn.Parameter], others: Iterable[nn.Parameter], lr: float, weight_decay: float
    ) -> None:
        muon_group = {"params": list(matrices), "lr": lr, "momentum": MOMENTUM, "weight_decay": weight_decay}
        super().__init__([muon_group, adamw_group(others, lr, weight_decay)], [MuonRule(), AdamWRule()])


def orthogonalized(matrix: Tensor) -> Tensor:
    """Return approximately the nearest matrix whose singular values are all 1, of the same shape, in fp32."""
    a, b, c = COEFFICIENTS
    x: Tensor = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    x = x.to(torch.bfloat16 if x.is_cuda else torch.float32)
    x = x / (x.norm() + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if matrix.shape[0] <= matrix.shape[1] else x.mT).float()
