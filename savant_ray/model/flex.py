"""Soft-capped attention for CUDA: PyTorch's `flex_attention` with block masks (causal, window and document).

One compiled kernel computes scores, soft cap, mask and softmax in fp32 tile by tile (FlashAttention, arXiv 2205.14135) and
skips tiles that are masked entirely. It needs Triton and a GPU that Triton supports; on a CPU it has no backward pass
(torch 2.13).

Shapes: B batch, H heads, T queries and keys, D head_dim.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

MIN_CAPABILITY = (8, 0)  # compute capability; the first with bf16 tensor cores
MIN_HEAD_DIM = 16  # PyTorch raises an error below it
MAX_COMPILED_SHAPES = 64  # PyTorch falls back to eager execution beyond it, which computes all scores at once

Visible = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@functools.cache
def has_flex(device: torch.device, head_dim: int) -> bool:
    """Return whether `flex_attention` can be compiled; Triton builds the launchers of its kernels with a C compiler."""
    if device.type != "cuda" or head_dim < MIN_HEAD_DIM or importlib.util.find_spec("triton") is None:
        return False
    if not has_python_headers() or not any(shutil.which(compiler) for compiler in ("gcc", "clang", "cc")):
        return False
    return torch.cuda.get_device_capability(device) >= MIN_CAPABILITY


def has_python_headers() -> bool:
    """Return whether the headers are installed that Triton and Inductor compile against (package python3-dev)."""
    return (Path(sysconfig.get_paths()["include"]) / "Python.h").exists()


def block_mask(document_ids_BT: Tensor, window_size: int | None) -> BlockMask:
    """Return the block mask of scores `[B, 1, T, T]`: causal, within one document, at most `window_size` tokens back."""
    n_rows, length = document_ids_BT.shape
    visible = _in_document(document_ids_BT) if window_size is None else _in_window(document_ids_BT, window_size)
    return create_block_mask(visible, n_rows, None, length, length, device=str(document_ids_BT.device))


def _in_document(document_ids_BT: Tensor) -> Visible:
    def visible(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (document_ids_BT[row, query] == document_ids_BT[row, key])

    return visible


def _in_window(document_ids_BT: Tensor, window_size: int) -> Visible:
    def visible(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same_document = document_ids_BT[row, query] == document_ids_BT[row, key]
        return (key <= query) & (key >= query - window_size) & same_document

    return visible


def flex(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, mask: BlockMask, soft_cap: float) -> Tensor:
    """Return softmax(soft_cap * tanh(q k^T / sqrt(D) / soft_cap)) v under the mask, `[B, H, T, D]`."""

    def capped(score: Tensor, _row: Tensor, _head: Tensor, _query: Tensor, _key: Tensor) -> Tensor:
        return soft_cap * torch.tanh(score / soft_cap)

    if torch.compiler.is_compiling() or not q_BHTD.is_cuda:
        return flex_attention(q_BHTD, k_BHTD, v_BHTD, score_mod=capped, block_mask=mask)
    return _compiled()(q_BHTD, k_BHTD, v_BHTD, score_mod=capped, block_mask=mask)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """Return `flex_attention` compiled, for a model that is not: uncompiled, it would compute all scores at once."""
    torch._dynamo.config.recompile_limit = MAX_COMPILED_SHAPES
    return torch.compile(flex_attention, dynamic=False)
