"""What the loops do: how much each still changes the stream, and how alike the tokens have become.

Recurrent blocks can collapse: the stream stops moving, or all tokens end up at one point (arXiv 2605.18797).

Shapes: B batch, T time, D dim, N tokens that are no padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from savant_ray.model.transformer import UniversalTransformer

COLLAPSED = 0.95  # mean cosine between tokens


@dataclass(frozen=True)
class LoopStatistics:
    """One number a loop."""

    residuals: tuple[float, ...]  # |s_k+1 - s_k| / |s_k|, mean over tokens
    cosines: tuple[float, ...]  # between the streams of two different tokens of a row, mean over pairs

    @property
    def has_collapsed(self) -> bool:
        """Whether the tokens are nearly alike after the last loop."""
        return bool(self.cosines) and self.cosines[-1] > COLLAPSED


@torch.no_grad()
def loop_statistics(
    model: UniversalTransformer, tokens_BT: Tensor, document_ids_BT: Tensor, n_loops: int | None = None
) -> LoopStatistics:
    """Of one forward pass; padding (document id -1) is left out."""
    residuals, cosines = [], []
    is_token_BT = document_ids_BT >= 0
    before_BTD: Tensor | None = None
    for x_BTD in map(Tensor.float, model.loop_states(tokens_BT, document_ids_BT, n_loops)):
        if before_BTD is not None:
            moved_BT = (x_BTD - before_BTD).norm(dim=-1) / before_BTD.norm(dim=-1)
            residuals.append(moved_BT[is_token_BT].mean().item())
            cosines.append(mean_cosine(x_BTD, is_token_BT))
        before_BTD = x_BTD
    return LoopStatistics(tuple(residuals), tuple(cosines))


def mean_cosine(x_BTD: Tensor, is_token_BT: Tensor) -> float:
    """Mean cosine between two different tokens of a row, over the rows with at least two; 0 without any."""
    units_BTD = F.normalize(x_BTD, dim=-1) * is_token_BT[..., None]
    n_B = is_token_BT.sum(dim=1).double()
    pairs_B = n_B * (n_B - 1)
    of_pairs_B = units_BTD.sum(dim=1).double().square().sum(dim=-1) - n_B  # all pairs, less each token with itself
    rows_B = pairs_B > 0
    return (of_pairs_B[rows_B] / pairs_B[rows_B]).mean().item() if rows_B.any() else 0.0
