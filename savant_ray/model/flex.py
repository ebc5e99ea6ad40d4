"""Soft-capped attention for CUDA: PyTorch's `flex_attention` with block masks (causal, window and document).

One compiled kernel computes scores, soft cap, mask and softmax in fp32 tile by tile (FlashAttention, arXiv 2205.14135) and
skips tiles that are masked entirely. It needs Triton and a GPU that Triton supports; on a CPU it has no backward pass
(torch 2.13).

Shapes: B batch, H heads, T queries and keys, D head_dim, N blocks of queries, M blocks of keys.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

MIN_CAPABILITY = (8, 0)  # compute capability; the first with bf16 tensor cores
TRITON_CAPABILITY = (7, 0)  # compute capability; for older GPUs PyTorch's compiler raises an error
MIN_HEAD_DIM = 16  # PyTorch raises an error below it
# PyTorch's tiles for wider heads need more shared memory than an H100 has (263 of 232 kB, NVIDIA-NeMo/Automodel#3064).
MAX_HEAD_DIM = 256
# Those for heads wider than 128 need more than the 101 kB of a GeForce or RTX card (pytorch#180278, pytorch#198224).
NARROW_HEAD_DIM, SHARED_BYTES_FOR_WIDE_HEADS = 128, 160 * 1024
BLOCK = 128  # queries or keys in a block; every tile size that PyTorch may choose divides 128; some do not divide 64
KERNEL_OPTIONS: Any = None  # `FlexKernelOptions`: tile sizes, warps, stages; None = PyTorch's choice for this GPU
MAX_SIGMOID_CAP = 100.0  # above it the error of a score could exceed 1e-4
MAX_COMPILED_SHAPES = 64  # PyTorch falls back to eager execution beyond it, which computes all scores at once


@functools.cache
def has_flex(device: torch.device, head_dim: int) -> bool:
    """Return whether `flex_attention` can be compiled for the device and a head dimension."""
    if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM or not builds_triton_kernels(device):
        return False
    if head_dim <= NARROW_HEAD_DIM:
        return True
    properties: Any = torch.cuda.get_device_properties(device)  # PyTorch's annotations lack the attribute
    return bool(properties.shared_memory_per_block_optin >= SHARED_BYTES_FOR_WIDE_HEADS)


def builds_triton_kernels(device: torch.device) -> bool:
    """Return whether kernels can be compiled for the device; Triton builds their launchers with a C compiler."""
    if not has_triton(device) or not has_python_headers():
        return False
    if not any(shutil.which(compiler) for compiler in ("gcc", "clang", "cc")):
        return False
    return has_bf16_instructions(device)


def has_bf16_instructions(device: torch.device) -> bool:
    """Return whether a GPU has tensor cores for bf16; PyTorch's compiler refuses bf16 for others."""
    return torch.cuda.get_device_capability(device) >= MIN_CAPABILITY


def has_triton(device: torch.device) -> bool:
    """Return whether the device is a GPU for which Triton, the compiler of kernels, is installed."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= TRITON_CAPABILITY


def has_python_headers() -> bool:
    """Return whether the headers are installed that Triton and Inductor compile against (package python3-dev)."""
    return (Path(sysconfig.get_paths()["include"]) / "Python.h").exists()


def block_mask(document_ids_BT: Tensor, window_size: int | None) -> BlockMask:
    """Return the block mask of scores `[B, 1, T, T]`: causal, within one document, at most `window_size` tokens back.

    The tokens of a document are contiguous, so query t sees the keys from `first_key_BT[:, t]` to t, and the blocks that a
    block of queries needs follow from its first and its last query. `create_block_mask` evaluates all T x T pairs instead
    (11.6 ms of processor time for the two masks of 12 x 1024 tokens on an H100's host).
    """
    length = document_ids_BT.shape[1]
    first_key_BT = _first_keys(document_ids_BT, window_size)
    begin_N = torch.arange(0, length, BLOCK, device=document_ids_BT.device)
    last_N = (begin_N + BLOCK - 1).clamp(max=length - 1)
    is_causal_NM = begin_N[:, None] >= begin_N[None, :]  # M blocks of keys
    is_needed_BNM = is_causal_NM & (last_N >= first_key_BT[:, begin_N, None])
    is_full_BNM = (begin_N[:, None] > begin_N) & (begin_N >= first_key_BT[:, last_N, None])
    is_full_BNM &= (begin_N + BLOCK <= length)[:, None]  # a block beyond the end is partial, as in `create_block_mask`

    def visible(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= first_key_BT[row, query])

    partial, full = (blocks[:, None] for blocks in (is_needed_BNM & ~is_full_BNM, is_full_BNM))
    (n_partial, partial_keys), (n_full, full_keys) = _block_lists(partial), _block_lists(full)
    (n_partial_t, partial_queries), (n_full_t, full_queries) = _block_lists(partial.mT), _block_lists(full.mT)
    return BlockMask(
        seq_lengths=(length, length),
        kv_num_blocks=n_partial,
        kv_indices=partial_keys,
        full_kv_num_blocks=n_full,
        full_kv_indices=full_keys,
        q_num_blocks=n_partial_t,
        q_indices=partial_queries,
        full_q_num_blocks=n_full_t,
        full_q_indices=full_queries,
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=visible,
    )


def _first_keys(document_ids_BT: Tensor, window_size: int | None) -> Tensor:
    """Return the first visible key of each query, `[B, T]`; it never decreases from one query to the next."""
    position_T = torch.arange(document_ids_BT.shape[1], device=document_ids_BT.device)
    is_first_BT = torch.ones_like(document_ids_BT, dtype=torch.bool)
    is_first_BT[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    first_key_BT = torch.where(is_first_BT, position_T, 0).cummax(1).values
    return first_key_BT if window_size is None else first_key_BT.maximum(position_T - window_size)


def _block_lists(blocks_B1NM: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of true blocks in each row, and their columns followed by the other columns; int32."""
    columns = blocks_B1NM.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks_B1NM.sum(-1, dtype=torch.int32), columns.to(torch.int32, memory_format=torch.contiguous_format)


def flex(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, mask: BlockMask, soft_cap: float) -> Tensor:
    """Return softmax(soft_cap * tanh(q k^T / sqrt(D) / soft_cap)) v under the mask, `[B, H, T, D]`."""

    def capped(score: Tensor, _row: Tensor, _head: Tensor, _query: Tensor, _key: Tensor) -> Tensor:
        return capped_score(score, soft_cap)

    attention: Any = flex_attention if torch.compiler.is_compiling() or not q_BHTD.is_cuda else _compiled()
    out: Tensor = attention(q_BHTD, k_BHTD, v_BHTD, score_mod=capped, block_mask=mask, kernel_options=KERNEL_OPTIONS)
    return out


def capped_score(score: Tensor, soft_cap: float) -> Tensor:
    """Return `soft_cap * tanh(score / soft_cap)`, through the sigmoid if `soft_cap` is small enough.

    A GPU has instructions for the exponential and the reciprocal in a sigmoid; its tanh needs a polynomial and a selection
    as well. Near 0 the difference of two large numbers loses relative accuracy, but the softmax needs absolute accuracy: in
    fp32 the error is 2.5e-7 of the cap, with a GPU's approximate division 8e-7 (4e-5 at a cap of 50). PTX's
    `tanh.approx.f32` has an error of 5e-4 of the score (0.025 at a score of 50), which for large scores exceeds the rounding
    of bf16 several times.
    """
    if soft_cap > MAX_SIGMOID_CAP:
        return soft_cap * torch.tanh(score / soft_cap)
    return 2 * soft_cap * torch.sigmoid(score * (2 / soft_cap)) - soft_cap


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """Return compiled `flex_attention` for an uncompiled model: eager `flex_attention` computes all scores at once."""
    torch._dynamo.config.recompile_limit = MAX_COMPILED_SHAPES
    return torch.compile(flex_attention, dynamic=False)
