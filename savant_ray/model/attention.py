"""Soft-capped causal attention, global and windowed, document-aware.

Two exact ways to the same numbers. Dense: all T x S scores under a mask; it serves global loops and cached decoding.
Banded: the sequence is cut into chunks of `window_size`, and a chunk of queries meets its own and the previous chunk
of keys, which is all that a window can reach; so the work grows with T x window_size instead of T x T.

`torch.nn.functional.scaled_dot_product_attention` has no soft cap (Gemma 2, arXiv 2408.00118), so neither uses it.

Shapes: B batch, H heads, T queries, S keys, D head_dim, N chunks, C chunk length = window_size, K = 2 C.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NO_DOCUMENT = -2  # differs from every document id and from padding (-1)


@dataclass(frozen=True)
class Masks:
    """What may see what (True = visible), built once per forward pass and shared by all loops."""

    global_B1TS: Tensor
    windowed: Tensor  # [B, 1, T, S] dense, or [B, 1, N, C, K] banded

    def for_loop(self, is_global: bool) -> Tensor:
        """The mask of a global or of a windowed loop."""
        return self.global_B1TS if is_global else self.windowed


def build_masks(document_ids_BT: Tensor, window_size: int) -> Masks:
    """Masks of whole sequences: causal, inside one document, and at most `window_size` back in windowed loops.

    Padding (-1) counts as a document of its own, so that no row of scores is empty and no output is NaN.
    """
    sequence_length = document_ids_BT.shape[1]
    same_document = document_ids_BT[:, None, :, None] == document_ids_BT[:, None, None, :]
    visible = same_document & causal_mask(sequence_length, sequence_length, None, document_ids_BT.device)
    if window_size >= sequence_length:
        return Masks(visible, visible)
    return Masks(visible, _banded_mask(document_ids_BT, window_size))


def causal_mask(n_queries: int, n_keys: int, window_size: int | None, device: torch.device) -> Tensor:
    """[T, S] visibility where the last query stands at the last key; `window_size` keys back and itself."""
    query = torch.arange(n_keys - n_queries, n_keys, device=device)[:, None]
    key = torch.arange(n_keys, device=device)[None, :]
    visible = key <= query
    return visible if window_size is None else visible & (key >= query - window_size)


def attend(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask: Tensor, soft_cap: float) -> Tensor:
    """Attention output [B, H, T, D]; a five-dimensional mask asks for the banded way."""
    if mask.dim() == 5:
        return _banded(q_BHTD, k_BHSD, v_BHSD, mask, soft_cap)
    return _soft_capped(q_BHTD, k_BHSD, v_BHSD, mask, soft_cap)


def _soft_capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, soft_cap: float) -> Tensor:
    """softmax(soft_cap * tanh(q k^T / sqrt(D) / soft_cap)) v over the last two dimensions; the cap works in fp32."""
    scores = (q @ k.mT).float() * (1.0 / (math.sqrt(q.shape[-1]) * soft_cap))
    capped = (soft_cap * torch.tanh(scores)).masked_fill(~mask, float("-inf"))
    return torch.softmax(capped, dim=-1).to(v.dtype) @ v


def _banded(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, mask_B1NCK: Tensor, soft_cap: float) -> Tensor:
    n_chunks, chunk = mask_B1NCK.shape[2:4]
    sequence_length = q_BHTD.shape[2]
    q, k, v = (_chunks(x, n_chunks, chunk) for x in (q_BHTD, k_BHTD, v_BHTD))
    out = _soft_capped(q, _with_previous(k), _with_previous(v), mask_B1NCK, soft_cap)
    return out.flatten(2, 3)[:, :, :sequence_length]


def _chunks(x_BHTD: Tensor, n_chunks: int, chunk: int) -> Tensor:
    """[B, H, N, C, D], padded with zeros at the end."""
    padding = n_chunks * chunk - x_BHTD.shape[2]
    return F.pad(x_BHTD, (0, 0, 0, padding)).unflatten(2, (n_chunks, chunk))


def _with_previous(x_BHNCD: Tensor) -> Tensor:
    """[B, H, N, K, D]: each chunk behind the chunk before it (zeros before the first)."""
    previous = F.pad(x_BHNCD, (0, 0, 0, 0, 1, 0))[:, :, :-1]
    return torch.cat((previous, x_BHNCD), dim=3)


def _banded_mask(document_ids_BT: Tensor, chunk: int) -> Tensor:
    """[B, 1, N, C, K]: key j of a double chunk is within reach of query i when i <= j <= i + C."""
    n_chunks = -(-document_ids_BT.shape[1] // chunk)
    padding = n_chunks * chunk - document_ids_BT.shape[1]
    query_BNC = F.pad(document_ids_BT, (0, padding), value=-1).unflatten(1, (n_chunks, chunk))
    previous_BNC = F.pad(query_BNC, (0, 0, 1, 0), value=NO_DOCUMENT)[:, :-1]
    key_BNK = torch.cat((previous_BNC, query_BNC), dim=2)
    query = torch.arange(chunk, device=document_ids_BT.device)[:, None]
    key = torch.arange(2 * chunk, device=document_ids_BT.device)[None, :]
    within_reach = (key >= query) & (key <= query + chunk)
    return (within_reach & (query_BNC[..., None] == key_BNK[:, :, None, :]))[:, None]
