"""Soft-capped attention for CPUs, in chunks of queries; each chunk uses the range of keys that its queries can see.

PyTorch's `flex_attention` has no backward pass on a CPU, and autograd through whole score matrices keeps several of them
per loop and reads main memory for each elementwise operation. Here the scores of a chunk stay in the CPU's cache, the
forward pass saves one number per query (the logsumexp of its scores, as in FlashAttention, arXiv 2205.14135), and the
backward pass recomputes the scores. The result is exact for any causal mask; scores are fp32.

`torch.compile` sees a custom operator, which it does not trace into. Uncompiled code uses a plain autograd function instead,
because a custom operator imports the compiler at its first call (1.9 s).

Shapes: B batch, H heads, T queries, S keys, D head_dim, N chunks of queries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK = 128  # queries


def first_keys(visible_B1TS: Tensor) -> Tensor:
    """Return `[N]` int64: the first key that any query of each chunk sees, over the whole batch."""
    visible_TS = visible_B1TS.flatten(0, 1).any(dim=0)
    return torch.stack([chunk.any(dim=0).int().argmax() for chunk in visible_TS.split(CHUNK)])


def cpu_attention(q: Tensor, k: Tensor, v: Tensor, masked_B1TS: Tensor, first_key_N: Tensor, soft_cap: float) -> Tensor:
    """Return causal attention `[B, H, T, D]` of q, k, v `[B, H, T, D]`.

    `masked` is True where a query does not see a key. Each query sees at least itself and no key after its chunk.
    """
    out: Tensor
    if torch.compiler.is_compiling():
        out, _ = _forward_operator(q, k, v, masked_B1TS, first_key_N, soft_cap)
    else:
        out = _Attention.apply(q, k, v, masked_B1TS, first_key_N, soft_cap)  # type: ignore[no-untyped-call]
    return out


def _forward(
    q: Tensor, k: Tensor, v: Tensor, masked_B1TS: Tensor, first_key_N: Tensor, soft_cap: float
) -> tuple[Tensor, Tensor]:
    """Return the output and the logsumexp of each query's scores, `[B, H, T, 1]`."""
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), _empty_per_query(q)
    for rows, keys in _chunks(q.shape[2], first_key_N):
        scores = _tanh_scores(q[:, :, rows], k[:, :, keys], soft_cap).mul_(soft_cap)
        scores.masked_fill_(masked_B1TS[:, :, rows, keys], float("-inf"))
        row_max = scores.amax(dim=-1, keepdim=True)
        weights = scores.sub_(row_max).exp_()
        total = weights.sum(dim=-1, keepdim=True)
        out[:, :, rows] = (weights.to(v.dtype) @ v[:, :, keys]).div_(total)
        lse[:, :, rows] = total.log_().add_(row_max)
    return out, lse


def _backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, masked_B1TS: Tensor,
    first_key_N: Tensor, soft_cap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k and v; those of k and v are accumulated over the chunks in fp32."""
    scale = 1.0 / math.sqrt(q.shape[-1])
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    grad_k, grad_v = (torch.zeros(x.shape, dtype=torch.float32) for x in (k, v))
    delta = (grad_out.float() * out.float()).sum(dim=-1, keepdim=True)
    for rows, keys in _chunks(q.shape[2], first_key_N):
        tanh_scores = _tanh_scores(q[:, :, rows], k[:, :, keys], soft_cap)
        probabilities = (tanh_scores * soft_cap).sub_(lse[:, :, rows]).exp_()
        probabilities.masked_fill_(masked_B1TS[:, :, rows, keys], 0.0)
        grad_v[:, :, keys] += probabilities.to(v.dtype).mT @ grad_out[:, :, rows]
        grad_scores = fp32_product(grad_out[:, :, rows], v[:, :, keys])
        grad_scores.sub_(delta[:, :, rows]).mul_(probabilities)
        grad_scores.addcmul_(grad_scores, tanh_scores.square_(), value=-1)  # the derivative of tanh is 1 - tanh²
        grad_product = grad_scores.mul_(scale).to(q.dtype)
        grad_q[:, :, rows] = grad_product @ k[:, :, keys]
        grad_k[:, :, keys] += grad_product.mT @ q[:, :, rows]
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def _chunks(n_queries: int, first_key_N: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield the slices of queries and of keys of each chunk."""
    for chunk, first in enumerate(first_key_N.tolist()):
        end = min((chunk + 1) * CHUNK, n_queries)
        yield slice(chunk * CHUNK, end), slice(first, end)


def _tanh_scores(q: Tensor, k: Tensor, soft_cap: float) -> Tensor:
    """Return tanh(q k^T / sqrt(D) / soft_cap) in fp32, the soft-capped scores in units of `soft_cap`."""
    return fp32_product(q, k).mul_(1.0 / (math.sqrt(q.shape[-1]) * soft_cap)).tanh_()


def fp32_product(q: Tensor, k: Tensor) -> Tensor:
    """Return q k^T over the last two dimensions in fp32; autocast or a bf16 product would round it to bf16."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        return (q.to(dtype) @ k.to(dtype).mT).float()


def _empty_per_query(q: Tensor) -> Tensor:
    return q.new_empty((*q.shape[:3], 1), dtype=torch.float32)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _forward(*inputs)
        _save_for_backward(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        inputs: tuple[Any, ...] = (grad_out, *ctx.saved_tensors, ctx.soft_cap)
        return (*_backward(*inputs), None, None, None)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, masked_B1TS, first_key_N, ctx.soft_cap = inputs
    ctx.save_for_backward(q, k, v, *output, masked_B1TS, first_key_N)


_forward_operator = torch.library.custom_op("savant::cpu_attention", _forward, mutates_args=())
_backward_operator = torch.library.custom_op("savant::cpu_attention_backward", _backward, mutates_args=())


@_forward_operator.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, masked_B1TS: Tensor, first_key_N: Tensor, soft_cap: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q, memory_format=torch.contiguous_format), _empty_per_query(q)


@_backward_operator.register_fake
def _(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, masked_B1TS: Tensor,
    first_key_N: Tensor, soft_cap: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _operator_backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward_operator(grad_out, *ctx.saved_tensors, ctx.soft_cap), None, None, None)


_forward_operator.register_autograd(_operator_backward, setup_context=_save_for_backward)
