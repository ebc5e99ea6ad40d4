"""Next-token cross entropy without the full logits.

With a vocabulary of 32,000 the logits of a micro-batch would be the largest tensor of a step (1.5 GB in fp32 at 12 x
1024). Here rows without a target are dropped, and the others pass through the head in chunks. Each chunk's gradient is
computed in the forward pass while its logits exist, and the backward pass only scales it (as in Liger Kernel's fused linear
cross entropy, arXiv 2410.10989). The gradient of the head is accumulated in fp32. Under autocast, rows and head are cast
once rather than for each chunk.

Shapes: B batch, T time, D dim, V vocabulary, N rows with a target, C rows of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # marks a position without a target, as in torch.nn.functional.cross_entropy
CHUNK_ROWS = 512


def next_token_targets(tokens_BT: Tensor, document_ids_BT: Tensor) -> Tensor:
    """Return `[B, T]` int64: the next token of the same document; IGNORED at its last token and in padding (-1)."""
    targets = torch.full_like(tokens_BT, IGNORED, dtype=torch.int64)
    follows = (document_ids_BT[:, 1:] == document_ids_BT[:, :-1]) & (document_ids_BT[:, :-1] >= 0)
    targets[:, :-1] = torch.where(follows, tokens_BT[:, 1:].long(), IGNORED)
    return targets


def cross_entropy_sum(x_BTD: Tensor, head_VD: Tensor, targets_BT: Tensor, chunk_rows: int = CHUNK_ROWS) -> Tensor:
    """Return the cross entropy of logits `x @ head.T` summed over the targets that are not IGNORED: nats, fp32 scalar."""
    rows_N = (
        (targets_BT != IGNORED).flatten().nonzero().squeeze(1)
    )  # synchronizes with a GPU, which has to report their number
    x_ND, targets_N = x_BTD.flatten(0, 1).index_select(0, rows_N), targets_BT.flatten().index_select(0, rows_N)
    needs_gradient = torch.is_grad_enabled() and (x_BTD.requires_grad or head_VD.requires_grad)
    inputs = (x_ND, head_VD, targets_N, chunk_rows, needs_gradient)
    loss: Tensor = _ChunkedCrossEntropy.apply(*inputs)  # type: ignore[no-untyped-call]  # PyTorch's
    return loss


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
    logits_CV = (x_CD @ head_VD.mT).float()
    target_logits_C = logits_CV.gather(1, targets_C[:, None])
    max_C = logits_CV.amax(dim=1, keepdim=True)
    exp_CV = logits_CV.sub_(max_C).exp_()  # computed once for the loss and its gradient
    total_C = exp_CV.sum(dim=1, keepdim=True)
    loss = (total_C.log() + max_C - target_logits_C).sum()
    if grad_x is None or grad_head is None:
        return loss
    grad_logits = exp_CV.div_(total_C)
    grad_logits.scatter_add_(1, targets_C[:, None], grad_logits.new_full((len(targets_C), 1), -1.0))
    grad_logits = grad_logits.to(x_CD.dtype)
    grad_x.copy_(grad_logits @ head_VD)
    if grad_logits.dtype == grad_head.dtype:
        grad_head.addmm_(grad_logits.mT, x_CD)
    else:
        grad_head.add_(grad_logits.mT @ x_CD)
    return loss
