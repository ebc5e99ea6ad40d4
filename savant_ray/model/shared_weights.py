"""Weights that all loops share, laid out for fast products, with gradients that are summed in fp32 inside the products.

All loops use the same weights. Each weight is therefore cast to the dtype of the products and laid out once, before the
first loop: matrices with the same input can become one matrix, and a dimension can be padded with zeros to a multiple for
which a GPU has fast kernels. The parameters keep their names and shapes.

Autograd would compute the gradient of a weight for each loop and add it in another pass over memory. Here the backward pass
of each product adds the gradient to an fp32 sum, in the same matrix product where the device can (as in Megatron-LM's
gradient accumulation fusion). When the gradient has reached the input of the first loop, all loops have added theirs, and
`with_summed_gradients` returns the sums to autograd as the gradients of the parameters.

Shapes: N rows (batch and time), O outputs, I inputs of a product.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class SharedWeight(NamedTuple):
    """A matrix `[O, I]` or a bias `[O]` as the products use it."""

    value: Tensor
    gradient: Tensor | None = None  # sum over the loops, of the value's shape; None: autograd computes the gradient

    def for_loop(self) -> SharedWeight:
        """Return the weight for one loop: the same memory, but the gradient has a version counter of its own.

        A compiled loop may save the gradient as autograd saves tensors (PyTorch before pytorch/pytorch#171353), and
        autograd refuses saved tensors whose version has changed; each loop changes the gradient.
        """
        return self if self.gradient is None else SharedWeight(self.value, self.gradient.data)


class Layout(NamedTuple):
    """Where parameters are in one matrix; the rest of it is zero."""

    parameters: tuple[Tensor, ...]
    shape: tuple[int, ...]
    # Takes the matrix and returns, for each parameter in order, the view that holds its elements.
    views: Callable[[Tensor], Sequence[Tensor]]


def plain_layout(parameter: Tensor) -> Layout:
    """Return the layout of a parameter as it is."""
    return Layout((parameter,), tuple(parameter.shape), lambda matrix: (matrix,))


def shared_weights(layouts: Sequence[Layout], dtype: torch.dtype) -> list[SharedWeight]:
    """Return the weight of each layout in `dtype`; if autograd is on, with a zero gradient in fp32 (in fp64 for fp64)."""
    gradient_dtype = torch.promote_types(dtype, torch.float32)
    weights = []
    for layout in layouts:
        value = _laid_out(layout, dtype)
        needs_gradient = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in layout.parameters)
        # One allocation for each: the compiler would have to assume that parts of one tensor overlap.
        weights.append(SharedWeight(value, torch.zeros_like(value, dtype=gradient_dtype) if needs_gradient else None))
    return weights


@torch.no_grad()
def _laid_out(layout: Layout, dtype: torch.dtype) -> Tensor:
    first = layout.parameters[0]
    if layout.shape == first.shape:
        return first.detach().to(dtype)
    value = torch.zeros(layout.shape, dtype=dtype, device=first.device)
    for parameter, view in zip(layout.parameters, layout.views(value), strict=True):
        view.copy_(parameter.view(view.shape))
    return value


def with_summed_gradients(x: Tensor, layouts: Sequence[Layout], weights: Sequence[SharedWeight]) -> Tensor:
    """Return x, whose backward pass returns the gradients in `weights` as those of the parameters.

    Everything that uses the weights depends on x, so autograd computes the gradient of x after all of them. The gradients
    are correct for one backward pass through the graph only: a second one would add to the sums of the first.
    """
    if all(weight.gradient is None for weight in weights):
        return x
    parameters = [parameter for layout in layouts for parameter in layout.parameters]
    with_gradients: Tensor = _SummedGradients.apply(x, layouts, weights, *parameters)  # type: ignore[no-untyped-call]
    return with_gradients


class _SummedGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layouts: Sequence[Layout], weights: Sequence[SharedWeight], *_: Tensor) -> Tensor:
        ctx.layouts, ctx.weights = layouts, weights
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None] = []
        for layout, weight in zip(ctx.layouts, ctx.weights, strict=True):
            views = layout.views(weight.gradient) if weight.gradient is not None else [None] * len(layout.parameters)
            gradients += [
                None if view is None else view.reshape(parameter.shape)
                for view, parameter in zip(views, layout.parameters, strict=True)
            ]
        return grad_x, None, None, *gradients


def linear(x: Tensor, weight: SharedWeight, bias: SharedWeight | None = None) -> Tensor:
    """Return `x @ weight.T + bias`, `[..., O]`; the backward pass adds to the gradients in `weight` and `bias`."""
    if weight.gradient is None and (bias is None or bias.gradient is None):
        return F.linear(x, weight.value, None if bias is None else bias.value)
    inputs = (x.to(weight.value.dtype), *weight, *(bias or (None, None)))
    out: Tensor = _Linear.apply(*inputs)  # type: ignore[no-untyped-call]
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        weight_gradient: Tensor | None,
        bias: Tensor | None,
        bias_gradient: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        # Not by `save_for_backward`: autograd raises an error for saved tensors that have changed since, and the backward
        # pass of each loop changes the gradients.
        ctx.weight_gradient, ctx.bias_gradient = weight_gradient, bias_gradient
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_NO = grad_out.flatten(0, -2)  # once, since it copies a gradient whose heads are transposed
        if ctx.weight_gradient is not None:
            torch.ops.savant.add_product_(ctx.weight_gradient, grad_NO, x.flatten(0, -2))
        if ctx.bias_gradient is not None:
            ctx.bias_gradient.add_(grad_NO.sum(0, dtype=ctx.bias_gradient.dtype))
        return (grad_NO @ weight).view_as(x), None, None, None, None


def add_product(total_OI: Tensor, left_NO: Tensor, right_NI: Tensor) -> None:
    """Add `left.T @ right` to an fp32 matrix in place.

    The product of bf16 factors is rounded to bf16 first unless `adds_bf16_products_to_fp32` is true for the GPU.
    """
    if left_NO.dtype == total_OI.dtype:
        total_OI.addmm_(left_NO.mT, right_NI)
    elif left_NO.is_cuda and adds_bf16_products_to_fp32(left_NO.device):
        _add_bf16_product(total_OI, left_NO, right_NI)
    else:
        total_OI.add_(left_NO.mT @ right_NI)


def _add_bf16_product(total_OI: Tensor, left_NO: Tensor, right_NI: Tensor) -> None:
    torch.addmm(total_OI, left_NO.mT, right_NI, out_dtype=torch.float32, out=total_OI)


@functools.cache
def adds_bf16_products_to_fp32(device: torch.device) -> bool:
    """Return whether this PyTorch adds the product of two bf16 matrices to an fp32 matrix on the GPU; warn if not."""
    factor = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    total = torch.full((16, 16), 2.0**-9, device=device)  # lost if the sum is rounded to bf16
    try:
        _add_bf16_product(total, factor, factor)
    except (RuntimeError, TypeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error):
            raise  # does not show whether the device supports it
        total.zero_()  # not supported: the check below fails
    if bool((total == 16 + 2.0**-9).all()):
        return True
    warnings.warn(
        f"PyTorch {torch.__version__} cannot add a bf16 product to an fp32 matrix on {device}: gradients are added in a "
        "pass of their own (slower, rounded to bf16 before the addition)",
        stacklevel=2,
    )
    return False


# A plain operator instead of `torch.library.custom_op`, which imports the compiler at its first call (1.9 s). The compiler
# sees one call that changes its first argument, and copies nothing.
_library = torch.library.Library("savant", "FRAGMENT")
_library.define("add_product_(Tensor(a!) total, Tensor left, Tensor right) -> ()")
_library.impl("add_product_", add_product, "CompositeExplicitAutograd")
_library.impl("add_product_", lambda total, left, right: None, "Meta")
