"""Rotary position embeddings (RoFormer, arXiv 2104.09864): attention scores depend on the distance of query and key.

Off by default (`model.positions: none`).

Shapes: B batch, H heads, T time, D head_dim, F = D / 2 frequencies.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROPE_BASE = 10_000.0  # about the distance in tokens over which the slowest frequency turns by one radian


class RotaryEmbedding(NamedTuple):
    """Cosines and sines of the rotation angles of consecutive positions; shared by all loops.

    `[T, F]`, or `[B, 1, T, F]` if each row has its own positions.
    """

    cos_TF: Tensor
    sin_TF: Tensor


def rotary_embedding(first: int | Tensor, length: int, head_dim: int, device: torch.device) -> RotaryEmbedding:
    """Return the embedding of positions `first` … `first + length - 1`, in fp32; `first` may be a tensor `[B, 1, 1]`."""
    positions_T1 = (first + torch.arange(length, device=device))[..., None].float()
    frequencies_F = ROPE_BASE ** -(torch.arange(head_dim // 2, device=device, dtype=torch.float32) / (head_dim // 2))
    angles_TF = positions_T1 * frequencies_F
    return RotaryEmbedding(angles_TF.cos(), angles_TF.sin())


def apply_rotary(x_BHTD: Tensor, rope: RotaryEmbedding) -> Tensor:
    """Rotate queries or keys `[B, H, T, D]`; computes in fp32 and returns the input's dtype."""
    left, right = x_BHTD.float().chunk(2, dim=-1)
    rotated = torch.cat([left * rope.cos_TF - right * rope.sin_TF, left * rope.sin_TF + right * rope.cos_TF], dim=-1)
    return rotated.to(x_BHTD.dtype)
