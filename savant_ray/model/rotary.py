"""Rotary positions: queries and keys are turned by angles that grow with their place, so scores tell distances.

From RoFormer (arXiv 2104.09864). The guide's model has none (`model.positions`).

Shapes: B batch, H heads, T time, D head_dim, F = D / 2 frequencies.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LONGEST = 10_000.0  # about the distance, in tokens, after which the slowest pair has turned by one radian


class Rotation(NamedTuple):
    """Of a stretch of tokens; shared by all loops."""

    cos_TF: Tensor
    sin_TF: Tensor


def rotation(first: int, length: int, head_dim: int, device: torch.device) -> Rotation:
    """Of the tokens at places `first` … `first + length - 1`."""
    places_T1 = torch.arange(first, first + length, device=device, dtype=torch.float32)[:, None]
    frequencies_F = LONGEST ** -(torch.arange(head_dim // 2, device=device, dtype=torch.float32) / (head_dim // 2))
    angles_TF = places_T1 * frequencies_F
    return Rotation(angles_TF.cos(), angles_TF.sin())


def rotate(x_BHTD: Tensor, by: Rotation | None) -> Tensor:
    """Queries or keys, turned in fp32; as they are without a rotation."""
    if by is None:
        return x_BHTD
    left, right = x_BHTD.float().chunk(2, dim=-1)
    turned = torch.cat([left * by.cos_TF - right * by.sin_TF, left * by.sin_TF + right * by.cos_TF], dim=-1)
    return turned.to(x_BHTD.dtype)
