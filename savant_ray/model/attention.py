"""Soft-capped causal attention within documents, global or windowed: one interface, three exact implementations.

For whole sequences: `flex.py` on a GPU that supports it, `cpu_attention.py` on a CPU. For cached decoding and other devices:
all T x S scores under a dense mask. The mask, built once per micro-batch for all loops, selects the implementation.

`torch.nn.functional.scaled_dot_product_attention` has no soft cap (Gemma 2, arXiv 2408.00118) and cannot be used.

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
    """Masked positions in the form that the implementation needs."""

    masked: Tensor | None  # [B, 1, T, S] or [T, S]; True = masked; None = nothing is masked, or see `blocks`
    first_key_N: Tensor | None = None  # first visible key of each chunk of queries, for `cpu_attention`
    blocks: BlockMask | None = None  # for `flex`


class Masks(NamedTuple):
    """Masks of a forward pass, shared by all loops."""

    full: Mask
    windowed: Mask

    def for_loop(self, is_global: bool) -> Mask:
        """Return the mask of a global or of a windowed loop."""
        return self.full if is_global else self.windowed


def build_masks(document_ids_BT: Tensor, window_size: int, head_dim: int) -> Masks:
    """Return masks of whole sequences: causal, within a document, and in windowed loops at most `window_size` back.

    Padding (-1) counts as one document, so that no row of scores is masked entirely and no output is NaN.
    """
    length, device = document_ids_BT.shape[1], document_ids_BT.device
    if has_flex(device, head_dim):
        return Masks(*(Mask(None, blocks=block_mask(document_ids_BT, window)) for window in (None, window_size)))
    same_document = document_ids_BT[:, None, :, None] == document_ids_BT[:, None, None, :]
    visible = same_document & causal_mask(length, length, None, device)
    in_window = visible & causal_mask(length, length, window_size, device)
    if device.type == "cpu":
        return Masks(*(Mask(~mask, first_keys(mask)) for mask in (visible, in_window)))
    return Masks(Mask(~visible), Mask(~in_window))


def cached_masks(n_new: int, n_before: int, window_size: int, device: torch.device) -> Masks:
    """Return masks of `n_new` tokens that follow `n_before` cached ones, over the keys that the cache returns."""
    return Masks(*(_cached_mask(n_new, n_before, window, device) for window in (None, window_size)))


def _cached_mask(n_new: int, n_before: int, window_size: int | None, device: torch.device) -> Mask:
    if n_new == 1:
        return Mask(None)
    n_cached = n_before if window_size is None else min(n_before, window_size)
    return Mask(~causal_mask(n_new, n_cached + n_new, window_size, device))


def slot_mask(position_B: Tensor, n_visible: int) -> Mask:
    """Return the mask of one new token of each row over the first slots of a ring buffer that already contains it.

    A slot is in use if its index is not above the position of the new token; once the buffer has wrapped around, all are.
    Shapes and host values do not depend on the positions.
    """
    slots_S = torch.arange(n_visible, device=position_B.device)
    return Mask((slots_S > position_B[:, None])[:, None, None, :])


def causal_mask(n_queries: int, n_keys: int, window_size: int | None, device: torch.device) -> Tensor:
    """Return visibility `[T, S]`, with the last query at the last key: each sees itself and `window_size` keys back."""
    query = torch.arange(n_keys - n_queries, n_keys, device=device)[:, None]
    key = torch.arange(n_keys, device=device)[None, :]
    visible = key <= query
    return visible if window_size is None else visible & (key >= query - window_size)


def attend(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask: Mask, soft_cap: float) -> Tensor:
    """Return the attention output `[B, H, T, D]`."""
    if mask.blocks is not None:
        return flex(q_BHTD, k_BHSD, v_BHSD, mask.blocks, soft_cap)
    if mask.masked is not None and mask.first_key_N is not None:
        return cpu_attention(q_BHTD, k_BHSD, v_BHSD, mask.masked, mask.first_key_N, soft_cap)
    return _dense_attention(q_BHTD, k_BHSD, v_BHSD, mask.masked, soft_cap)


def _dense_attention(q: Tensor, k: Tensor, v: Tensor, masked: Tensor | None, soft_cap: float) -> Tensor:
    """Return softmax(soft_cap * tanh(q k^T / sqrt(D) / soft_cap)) v over the last two dimensions; scores are fp32."""
    scores = _fp32_scores(q, k) * (1.0 / (math.sqrt(q.shape[-1]) * soft_cap))
    capped = soft_cap * torch.tanh(scores)
    if masked is not None:
        capped = capped.masked_fill(masked, float("-inf"))
    return torch.softmax(capped, dim=-1).to(v.dtype) @ v


def _fp32_scores(q: Tensor, k: Tensor) -> Tensor:
    """Return q k^T over the last two dimensions in fp32."""
    if not q.is_cuda or q.dtype != torch.bfloat16 or torch.is_grad_enabled():
        return fp32_product(q, k)
    with torch.autocast(q.device.type, enabled=False):
        # This avoids an fp32 copy of all cached keys for each token. PyTorch has no gradient for `out_dtype`.
        products = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT, out_dtype=torch.float32)
    scores: Tensor = products.unflatten(0, q.shape[:2])
    return scores
