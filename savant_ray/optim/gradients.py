"""All gradients of a model in one flat fp32 buffer, followed by the sums of losses and token counts.

Each parameter's `.grad` is a view of the buffer, so accumulation needs no copy, and one reduction carries gradients, loss
and token count. Ranks that did different work therefore make the same number of collective calls; a DDP hook that runs on
some ranks only would desynchronize the others without an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from savant_ray.optim.tree_sum import TreeSum


class GradientBuffer:
    """Gradient storage, 4 bytes a parameter: `flat` holds `gradients` followed by `sums`, all fp32.

    With `training.deterministic`, the contents of `flat` are added to `tree` after each micro-batch.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], n_sums: int) -> None:
        self._parameters = list(parameters)
        n_weights = sum(p.numel() for p in self._parameters)
        self.flat = torch.zeros(n_weights + n_sums, dtype=torch.float32, device=self._parameters[0].device)
        self.gradients, self.sums = self.flat[:n_weights], self.flat[n_weights:]
        self.tree = TreeSum()
        parts = self.gradients.split([p.numel() for p in self._parameters])
        self._views = [part.view_as(p) for part, p in zip(parts, self._parameters, strict=True)]
        for parameter in self._parameters:
            parameter.grad_dtype = torch.float32  # sums of 12 gradients in bf16 have an error of 0.4 %
        self._attach()

    def _attach(self) -> None:
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.grad = view

    @contextmanager
    def detached(self) -> Iterator[None]:
        """Set `.grad` to None during a forward pass.

        Dynamo breaks the graph at a bf16 weight with an fp32 `.grad` (torch 2.13).
        """
        for parameter in self._parameters:
            parameter.grad = None
        try:
            yield
        finally:
            self._attach()
