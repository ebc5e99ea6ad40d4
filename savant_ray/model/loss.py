"""Next-token cross entropy without the full logits.

With a vocabulary of 32,000 the logits of a micro-batch would be the largest tensor of a step (1.5 GiB in fp32 at 12 x
1024). Here the rows pass through the head in chunks. Each chunk's gradient is computed in the forward pass while its logits
exist, and the backward pass only scales it (as in Liger Kernel's fused linear cross entropy, arXiv 2410.10989). The gradient
of the head is accumulated in fp32. Under autocast, rows and head are cast once rather than for each chunk.

A CPU drops the rows without a target. On a GPU their number would be known only after a wait for all queued kernels, so
these rows are set to zero instead and have zero gradients. There the elementwise part of a chunk is compiled into one
kernel, and products of bf16 matrices are written and accumulated in fp32.

Shapes: B batch, T time, D dim, V vocabulary, N rows, C rows of a chunk.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from savant_ray.model.flex import MAX_COMPILED_SHAPES, builds_triton_kernels
from savant_ray.model.shared_weights import add_product, adds_bf16_products_to_fp32

IGNORED = -100  # marks a position without a target, as in torch.nn.functional.cross_entropy
CPU_CHUNK_ROWS = 512
GPU_CHUNK_GIB = 0.5  # fp32 logits of a chunk: 4,096 rows of a vocabulary of 32,000
GPU_CHUNK_FRACTION = 1 / 20  # of the memory limit, where that is less
ROW_MULTIPLE = 128  # rows of a chunk on a GPU, for aligned products


def next_token_targets(tokens_BT: Tensor, document_ids_BT: Tensor, is_trained_BT: Tensor | None = None) -> Tensor:
    """Return `[B, T]` int64: the next token of the same document if it is trained on.

    IGNORED before a token that is not trained on (`is_trained_BT` is false; None: all are trained on), at the last token of
    a document, and in padding (-1).
    """
    targets = torch.full_like(tokens_BT, IGNORED, dtype=torch.int64)
    is_target = (document_ids_BT[:, 1:] == document_ids_BT[:, :-1]) & (document_ids_BT[:, :-1] >= 0)
    if is_trained_BT is not None:
        is_target &= is_trained_BT[:, 1:]
    targets[:, :-1] = torch.where(is_target, tokens_BT[:, 1:].long(), IGNORED)
    return targets


def cross_entropy_sum(
    x_BTD: Tensor,
    head_VD: Tensor,
    targets_BT: Tensor,
    memory_limit_gb: float = 10.0,
    chunk_rows: int | None = None,
    drops_rows: bool | None = None,
) -> Tensor:
    """Return the cross entropy of logits `x @ head.T` summed over the targets that are not IGNORED: nats, fp32 scalar.

    `memory_limit_gb` (GiB, of the whole process) bounds the rows that a GPU computes at a time. `chunk_rows` replaces the
    number of rows that is chosen for the device, and `drops_rows` whether rows without a target are dropped, as on a CPU,
    or set to zero, as on a GPU.
    """
    x_ND, targets_N = x_BTD.flatten(0, 1), targets_BT.flatten()
    if drops_rows if drops_rows is not None else x_BTD.device.type == "cpu":
        chunk_rows = chunk_rows or CPU_CHUNK_ROWS
        rows = (targets_N != IGNORED).nonzero().squeeze(1)
        x_ND, targets_N = x_ND.index_select(0, rows), targets_N.index_select(0, rows)
    else:
        chunk_rows = chunk_rows or gpu_chunk_rows(len(targets_N), len(head_VD), memory_limit_gb)
        x_ND, targets_N = _rows_for_whole_chunks(x_ND, targets_N, chunk_rows)
    needs_gradient = torch.is_grad_enabled() and (x_BTD.requires_grad or head_VD.requires_grad)
    inputs = (x_ND, head_VD, targets_N, chunk_rows, needs_gradient)
    loss: Tensor = _ChunkedCrossEntropy.apply(*inputs)  # type: ignore[no-untyped-call]  # PyTorch's
    return loss


def gpu_chunk_rows(n_rows: int, vocab_size: int, memory_limit_gb: float) -> int:
    """Return how many rows a GPU computes at a time.

    It depends on settings and shapes only, so that a resumed run computes the same bits. The chunks of a micro-batch have
    the same size, since each size is compiled by itself.
    """
    limit_bytes = min(GPU_CHUNK_GIB, memory_limit_gb * GPU_CHUNK_FRACTION) * 2**30
    max_rows = max(1, int(limit_bytes / (4 * vocab_size)) // ROW_MULTIPLE) * ROW_MULTIPLE
    n_chunks = max(1, math.ceil(n_rows / max_rows))
    return max(1, math.ceil(n_rows / n_chunks / ROW_MULTIPLE)) * ROW_MULTIPLE


def _rows_for_whole_chunks(x_ND: Tensor, targets_N: Tensor, chunk_rows: int) -> tuple[Tensor, Tensor]:
    """Return all rows, those without a target set to zero, extended by such rows to a multiple of `chunk_rows`."""
    n_added = -len(targets_N) % chunk_rows
    x_ND = x_ND.masked_fill((targets_N == IGNORED)[:, None], 0)
    if n_added:  # `pad` copies also if it adds nothing
        x_ND, targets_N = F.pad(x_ND, (0, 0, 0, n_added)), F.pad(targets_N, (0, n_added), value=IGNORED)
    return x_ND, targets_N


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, head_VD: Tensor, targets_N: Tensor, chunk_rows: int, needs_gradient: bool
    ) -> Tensor:
        device, dtype = x_ND.device.type, x_ND.dtype
        if torch.is_autocast_enabled(device):
            x_ND, head_VD = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (x_ND, head_VD))
        loss = torch.zeros((), dtype=torch.float32, device=x_ND.device)
        grad_x = torch.empty_like(x_ND, dtype=dtype) if needs_gradient else None
        grad_head = torch.zeros_like(head_VD, dtype=torch.float32) if needs_gradient else None
        with torch.autocast(device, enabled=False):
            for start in range(0, x_ND.shape[0], chunk_rows):
                part = slice(start, start + chunk_rows)
                loss += _chunk(
                    x_ND[part], head_VD, targets_N[part], None if grad_x is None else grad_x[part], grad_head
                )
        ctx.save_for_backward(grad_x, grad_head)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_head = ctx.saved_tensors
        return grad_x * grad_loss.to(grad_x.dtype), grad_head * grad_loss, None, None, None


def _chunk(x_CD: Tensor, head_VD: Tensor, targets_C: Tensor, grad_x: Tensor | None, grad_head: Tensor | None) -> Tensor:
    """Return the chunk's loss sum; write its gradient to `grad_x` and add it to `grad_head` unless they are None."""
    logits_CV = _fp32_logits(x_CD, head_VD)
    if grad_x is None or grad_head is None:
        return _loss_and_exp(logits_CV, targets_C)[0]
    loss, grad_logits = _loss_and_gradient_function(x_CD.device)(logits_CV, targets_C, x_CD.dtype)
    grad_x.copy_(grad_logits @ head_VD)
    add_product(grad_head, grad_logits, x_CD)
    return loss


def _fp32_logits(x_CD: Tensor, head_VD: Tensor) -> Tensor:
    """Return the logits in fp32, on a GPU that can write them so without rounding them to bf16 first."""
    if x_CD.is_cuda and x_CD.dtype == torch.bfloat16 and adds_bf16_products_to_fp32(x_CD.device):
        return torch.mm(x_CD, head_VD.mT, out_dtype=torch.float32)
    return (x_CD @ head_VD.mT).float()


@functools.cache
def _loss_and_gradient_function(device: torch.device) -> Callable[[Tensor, Tensor, torch.dtype], tuple[Tensor, Tensor]]:
    """Return `loss_and_gradient`, compiled if the device allows; eager kernels read and write the logits seven times."""
    if not builds_triton_kernels(device):
        return loss_and_gradient
    torch._dynamo.config.recompile_limit = MAX_COMPILED_SHAPES
    return torch.compile(loss_and_gradient, dynamic=False)


def loss_and_gradient(logits_CV: Tensor, targets_C: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the sum of the cross entropies and its gradient `[C, V]` in `dtype`, zero in rows that are IGNORED.

    The logits are fp32, and finite in rows that are IGNORED. Eager code overwrites them.
    """
    loss, exp_CV, total_C1 = _loss_and_exp(logits_CV, targets_C)
    probabilities_CV = exp_CV.div_(total_C1.masked_fill((targets_C == IGNORED)[:, None], math.inf))
    if torch.compiler.is_compiling():
        # One kernel. An indexed assignment would be another one, and with deterministic kernels PyTorch's own, which sorts.
        is_target_CV = torch.arange(logits_CV.shape[1], device=targets_C.device) == targets_C[:, None]
        return loss, (probabilities_CV - is_target_CV.float()).to(dtype)
    rows_C, index_C = torch.arange(len(targets_C), device=targets_C.device), targets_C.clamp(min=0)
    target_gradient_C = torch.where(targets_C != IGNORED, probabilities_CV[rows_C, index_C] - 1, 0)
    grad_logits_CV = probabilities_CV.to(dtype)
    grad_logits_CV[rows_C, index_C] = target_gradient_C.to(dtype)  # `scatter_` copies a bf16 matrix twice on a CPU
    return loss, grad_logits_CV


def _loss_and_exp(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum of the cross entropies, `exp(logits - max)` and its sum over each row."""
    target_logits_C1 = logits_CV.gather(1, targets_C.clamp(min=0)[:, None])
    max_C1 = logits_CV.amax(dim=1, keepdim=True)
    # Eager code reuses the memory of the logits. A compiled kernel would write its changes of an input back to memory.
    exp_CV = logits_CV - max_C1 if torch.compiler.is_compiling() else logits_CV.sub_(max_C1)
    exp_CV = exp_CV.exp_()
    total_C1 = exp_CV.sum(dim=1, keepdim=True)
    losses_C1 = total_C1.log() + max_C1 - target_logits_C1
    return torch.where((targets_C != IGNORED)[:, None], losses_C1, 0).sum(), exp_CV, total_C1
