"""Soft-capped causal attention, global and windowed, document-aware: one interface, three exact ways.

Whole sequences: `flex.py` on a GPU that has it, `cpu_attention.py` on a CPU; the mask, built once per micro-batch for all
loops, carries the choice. Cached decoding, and other devices: all T x S scores under a dense mask.

`torch.nn.functional.scaled_dot_product_attention` has no soft cap (Gemma 2, arXiv 2408.00118), so none uses it.

Shapes: B batch, H heads, T queries, S keys, D head_dim, N chunks of queries.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from savant_ray.model.cpu_attention import cpu_attention, first_keys, fp32_product
from savant_ray.model.flex import block_mask, flex, has_flex


class Mask(NamedTuple):
    """What may not be seen, and how it is best computed."""

    hidden: Tensor | None  # [B, 1, T, S] or [T, S]; True = not seen; None = all is seen
    first_key_N: Tensor | None = None  # of each chunk, for `cpu_attention`
    blocks: BlockMask | None = None  # for `flex`


class Masks(NamedTuple):
    """Built once per forward pass and shared by all loops."""

    of_global: Mask
    of_windowed: Mask

    def for_loop(self, is_global: bool) -> Mask:
        """The mask of a global or of a windowed loop."""
        return self.of_global if is_global else self.of_windowed


def build_masks(document_ids_BT: Tensor, window_size: int, head_dim: int) -> Masks:
    """Masks of whole sequences: causal, inside one document, and at most `window_size` back in windowed loops.

    Padding (-1) counts as a document of its own, so that no row of scores is empty and no output is NaN.
    """
    length, device = document_ids_BT.shape[1], document_ids_BT.device
    if has_flex(device, head_dim):
        return Masks(*(Mask(None, blocks=block_mask(document_ids_BT, window)) for window in (None, window_size)))
    same_document = document_ids_BT[:, None, :, None] == document_ids_BT[:, None, None, :]
    visible = same_document & causal_mask(length, length, None, device)
    in_window = visible & causal_mask(length, length, window_size, device)
    if device.type == "cpu":
        return Masks(*(Mask(~each, first_keys(each)) for each in (visible, in_window)))
    return Masks(Mask(~visible), Mask(~in_window))


def cached_masks(n_new: int, n_before: int, window_size: int, padding_B: Tensor | None, device: torch.device) -> Masks:
    """Masks of `n_new` tokens behind `n_before` in a cache that returns what they can reach.

    The first `padding_B` of all tokens of a row are padding, which sees and is seen by padding only.
    """
    return Masks(*(_cached_mask(n_new, n_before, window, padding_B, device) for window in (None, window_size)))


def _cached_mask(
    n_new: int, n_before: int, window_size: int | None, padding_B: Tensor | None, device: torch.device
) -> Mask:
    if n_new == 1 and padding_B is None:
        return Mask(None)
    reach = n_before if window_size is None else min(n_before, window_size)
    visible = causal_mask(n_new, reach + n_new, window_size, device)
    if padding_B is not None:
        is_padding_BS = torch.arange(n_before - reach, n_before + n_new, device=device) < padding_B[:, None]
        visible = visible & (is_padding_BS[:, None, -n_new:, None] == is_padding_BS[:, None, None, :])
    return Mask(~visible)


def causal_mask(n_queries: int, n_keys: int, window_size: int | None, device: torch.device) -> Tensor:
    """[T, S] visibility where the last query stands at the last key; `window_size` keys back and itself."""
    query = torch.arange(n_keys - n_queries, n_keys, device=device)[:, None]
    key = torch.arange(n_keys, device=device)[None, :]
    visible = key <= query
    return visible if window_size is None else visible & (key >= query - window_size)


def attend(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask: Mask, soft_cap: float) -> Tensor:
    """Attention output [B, H, T, D]."""
    if mask.blocks is not None:
        return flex(q_BHTD, k_BHSD, v_BHSD, mask.blocks, soft_cap)
    if mask.hidden is not None and mask.first_key_N is not None:
        return cpu_attention(q_BHTD, k_BHSD, v_BHSD, mask.hidden, mask.first_key_N, soft_cap)
    return _soft_capped(q_BHTD, k_BHSD, v_BHSD, mask.hidden, soft_cap)


def _soft_capped(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, soft_cap: float) -> Tensor:
    """softmax(soft_cap * tanh(q k^T / sqrt(D) / soft_cap)) v over the last two dimensions; scores are fp32."""
    scores = fp32_product(q, k) * (1.0 / (math.sqrt(q.shape[-1]) * soft_cap))
    capped = soft_cap * torch.tanh(scores)
    if hidden is not None:
        capped = capped.masked_fill(hidden, float("-inf"))
    return torch.softmax(capped, dim=-1).to(v.dtype) @ v
