"""Statistics of the loops of the recurrent block, to detect a collapse.

A recurrent block can collapse: the residual stream stops changing, or all tokens become alike (arXiv 2605.18797).

Shapes: B batch, T time, D dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from savant_ray.model.transformer import UniversalTransformer

COLLAPSE_COSINE = 0.95  # mean cosine between tokens


@dataclass(frozen=True)
class LoopStatistics:
    """One number per loop k, computed from the residual stream s_k after it; s_0 is the embedding."""

    residuals: tuple[float, ...]  # |s_k - s_(k-1)| / |s_(k-1)|, mean over tokens
    cosines: tuple[float, ...]  # between two different tokens of a row, mean over pairs, then over rows

    @property
    def has_collapsed(self) -> bool:
        """Return whether the tokens are nearly alike after the last loop."""
        return bool(self.cosines) and self.cosines[-1] > COLLAPSE_COSINE


@torch.no_grad()
def loop_statistics(
    model: UniversalTransformer,
    tokens_BT: Tensor,
    document_ids_BT: Tensor,
    n_loops: int | None = None,
    training_graph: bool = False,
) -> LoopStatistics:
    """Return the statistics of one forward pass over tokens `[B, T]`; padding (document id -1) is left out.

    `training_graph` is that of `UniversalTransformer.loop_states`.
    """
    residuals, cosines = [], []
    is_token_BT = document_ids_BT >= 0
    previous_BTD: Tensor | None = None
    for x_BTD in map(Tensor.float, model.loop_states(tokens_BT, document_ids_BT, n_loops, training_graph)):
        if previous_BTD is not None:
            residual_BT = (x_BTD - previous_BTD).norm(dim=-1) / previous_BTD.norm(dim=-1)
            residuals.append(residual_BT[is_token_BT].mean().item())
            cosines.append(mean_cosine(x_BTD, is_token_BT))
        previous_BTD = x_BTD
    return LoopStatistics(tuple(residuals), tuple(cosines))


def mean_cosine(x_BTD: Tensor, is_token_BT: Tensor) -> float:
    """Return the mean over rows of the mean cosine between two different tokens; rows with fewer than two are left out.

    If no row has two tokens, return 0.
    """
    units_BTD = F.normalize(x_BTD, dim=-1) * is_token_BT[..., None]
    n_B = is_token_BT.sum(dim=1).double()
    pairs_B = n_B * (n_B - 1)
    # The squared norm of the sum is the sum over all pairs; a token with itself contributes 1.
    cosine_sums_B = units_BTD.sum(dim=1).double().square().sum(dim=-1) - n_B
    has_pairs_B = pairs_B > 0
    return (cosine_sums_B[has_pairs_B] / pairs_B[has_pairs_B]).mean().item() if has_pairs_B.any() else 0.0
