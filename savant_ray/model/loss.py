"""Next-token cross entropy without the full logits.

With 32,000 entries the logits of a micro-batch are the largest tensor of a step (1.5 GB in fp32 at 12 x 1024).
Here rows without a target are dropped, the others go through the head in chunks, and each chunk's gradient is taken
while its logits still exist, so that the backward pass only scales what is there (the idea of Liger Kernel's fused
linear cross entropy, arXiv 2410.10989). The gradient of the head adds up in fp32. Under autocast the rows and the head are
cast once, and not anew for each chunk.

Shapes: B batch, T time, D dim, V vocabulary, N rows with a target, C rows of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # no target here, as in torch.nn.functional.cross_entropy
CHUNK_ROWS = 512


def next_token_targets(tokens_BT: Tensor, document_ids_BT: Tensor) -> Tensor:
    """[B, T] int64: the following token of the same document; IGNORED at its last token and in padding (-1)."""
    targets = torch.full_like(tokens_BT, IGNORED, dtype=torch.int64)
    follows = (document_ids_BT[:, 1:] == document_ids_BT[:, :-1]) & (document_ids_BT[:, :-1] >= 0)
    targets[:, :-1] = torch.where(follows, tokens_BT[:, 1:].long(), IGNORED)
    return targets


def cross_entropy_sum(x_BTD: Tensor, head_VD: Tensor, targets_BT: Tensor, chunk_rows: int = CHUNK_ROWS) -> Tensor:
    """Sum of the token losses in nats, an fp32 scalar, of `x @ head.T` against the targets that are not IGNORED."""
    rows_N = (targets_BT != IGNORED).flatten().nonzero().squeeze(1)  # waits for a GPU, as their number is needed
    x_ND, targets_N = x_BTD.flatten(0, 1).index_select(0, rows_N), targets_BT.flatten().index_select(0, rows_N)
    wants_gradient = torch.is_grad_enabled() and (x_BTD.requires_grad or head_VD.requires_grad)
    inputs = (x_ND, head_VD, targets_N, chunk_rows, wants_gradient)
    loss: Tensor = _ChunkedCrossEntropy.apply(*inputs)  # type: ignore[no-untyped-call]  # PyTorch's
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, head_VD: Tensor, targets_N: Tensor, chunk_rows: int, wants_gradient: bool
    ) -> Tensor:
        device, dtype = x_ND.device.type, x_ND.dtype
        if torch.is_autocast_enabled(device):
            x_ND, head_VD = (each.to(torch.get_autocast_dtype(device)) for each in (x_ND, head_VD))
        loss = torch.zeros((), dtype=torch.float32, device=x_ND.device)
        grad_x = torch.empty_like(x_ND, dtype=dtype) if wants_gradient else None
        grad_head = torch.zeros_like(head_VD, dtype=torch.float32) if wants_gradient else None
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
    """The chunk's loss sum; writes its gradients into `grad_x` and onto `grad_head`."""
    logits_CV = (x_CD @ head_VD.mT).float()
    of_target_C = logits_CV.gather(1, targets_C[:, None])
    largest_C = logits_CV.amax(dim=1, keepdim=True)
    weights_CV = logits_CV.sub_(largest_C).exp_()  # one pass of exp for the loss and its gradient
    total_C = weights_CV.sum(dim=1, keepdim=True)
    loss = (total_C.log() + largest_C - of_target_C).sum()
    if grad_x is None or grad_head is None:
        return loss
    grad_logits = weights_CV.div_(total_C)
    grad_logits.scatter_add_(1, targets_C[:, None], grad_logits.new_full((len(targets_C), 1), -1.0))
    grad_logits = grad_logits.to(x_CD.dtype)
    grad_x.copy_(grad_logits @ head_VD)
    if grad_logits.dtype == grad_head.dtype:
        grad_head.addmm_(grad_logits.mT, x_CD)
    else:
        grad_head.add_(grad_logits.mT @ x_CD)
    return loss
