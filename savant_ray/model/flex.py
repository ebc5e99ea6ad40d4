"""Soft-capped attention for CUDA: PyTorch's `flex_attention` under block masks of causal x window x document.

One compiled kernel computes scores, cap, mask and softmax in fp32 tile by tile (FlashAttention, arXiv 2205.14135), and
leaves out the tiles in which no query sees a key. Needs Triton and a GPU that it supports; there is no backward pass on
a CPU (torch 2.13).

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

OLDEST_CAPABILITY = (8, 0)  # the first with bf16 tensor cores
SMALLEST_HEAD_DIM = 16  # of the kernels; below it PyTorch raises
SHAPES = 64  # micro-batch sizes that may be compiled before PyTorch falls back to eager, which holds all scores

Visible = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@functools.cache
def has_flex(device: torch.device, head_dim: int) -> bool:
    """Whether this device compiles `flex_attention`; Triton builds the launchers of its kernels with a C compiler."""
    if device.type != "cuda" or head_dim < SMALLEST_HEAD_DIM or importlib.util.find_spec("triton") is None:
        return False
    if not has_python_headers() or not any(shutil.which(compiler) for compiler in ("gcc", "clang", "cc")):
        return False
    return torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY


def has_python_headers() -> bool:
    """Whether extensions of this Python can be compiled, as Triton's and Inductor's are (package python3-dev)."""
    return (Path(sysconfig.get_paths()["include"]) / "Python.h").exists()


def block_mask(document_ids_BT: Tensor, window_size: int | None) -> BlockMask:
    """Which tiles of the scores `[B, 1, T, T]` hold anything: causal, in one document, `window_size` back and itself."""
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
    """softmax(soft_cap * tanh(q k^T / sqrt(D) / soft_cap)) v under the mask, `[B, H, T, D]`."""

    def capped(score: Tensor, _row: Tensor, _head: Tensor, _query: Tensor, _key: Tensor) -> Tensor:
        return soft_cap * torch.tanh(score / soft_cap)

    if torch.compiler.is_compiling() or not q_BHTD.is_cuda:
        return flex_attention(q_BHTD, k_BHTD, v_BHTD, score_mod=capped, block_mask=mask)
    return _compiled()(q_BHTD, k_BHTD, v_BHTD, score_mod=capped, block_mask=mask)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """For a model that is not compiled: uncompiled, `flex_attention` would hold all scores at once."""
    torch._dynamo.config.recompile_limit = SHAPES
    return torch.compile(flex_attention, dynamic=False)
