"""All gradients of a model in one flat fp32 buffer, with room for the sums that travel with them.

Each parameter's `.grad` is a view of the buffer, so accumulation needs no copy, and ONE all-reduce carries gradients,
loss, token count, skipped count and stop flag: ranks that did different work still do the same number of
collectives (a DDP hook that one rank skips desynchronises the others silently).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class GradientBuffer:
    """`flat` is `gradients` followed by `sums`; 4 bytes a parameter."""

    def __init__(self, parameters: Iterable[nn.Parameter], n_sums: int) -> None:
        self._parameters = list(parameters)
        n_weights = sum(p.numel() for p in self._parameters)
        self.flat = torch.zeros(n_weights + n_sums, dtype=torch.float32, device=self._parameters[0].device)
        self.gradients, self.sums = self.flat[:n_weights], self.flat[n_weights:]
        parts = self.gradients.split([p.numel() for p in self._parameters])
        self._views = [part.view_as(p) for part, p in zip(parts, self._parameters, strict=True)]
        for parameter in self._parameters:
            parameter.grad_dtype = torch.float32  # bf16 gradients of 12 loops added up in bf16 are off by 0.4 %
        self._attach()

    def _attach(self) -> None:
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.grad = view

    @contextmanager
    def detached(self) -> Iterator[None]:
        """For a forward pass: Dynamo breaks a graph at each bf16 weight whose `.grad` is fp32 (torch 2.13)."""
        for parameter in self._parameters:
            parameter.grad = None
        try:
            yield
        finally:
            self._attach()

    def zero(self) -> None:
        """Empties gradients and sums."""
        self.flat.zero_()


def clip_to_mean(gradients: Tensor, n_tokens: float, max_norm: float) -> Tensor:
    """Turns summed gradients into their mean, clipped to `max_norm`, in place; the mean's norm before clipping (0-d)."""
    norm: Tensor = torch.linalg.vector_norm(gradients) / n_tokens
    gradients.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0) / n_tokens)
    return norm
