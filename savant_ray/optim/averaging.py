"""Exponential moving average (EMA) of the weights, which has less noise than the weights of a single step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from savant_ray.optim.adamw import MasterWeightOptimizer


class WeightAverage:
    """EMA of an optimizer's fp32 weights: `weights` by name, in fp32, 4 bytes a weight.

    Update k (from 1) sets `average = d * average + (1 - d) * weight`, with `d = min(decay, (1 + k) / (10 + k))` as in
    `tf.train.ExponentialMovingAverage`, so that the initial weights are soon forgotten.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], optimizer: MasterWeightOptimizer, decay: float) -> None:
        self._parameters, self._optimizer, self._decay = parameters, optimizer, decay
        self.weights = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
        self.n_updates = 0

    def restart(self) -> None:
        """Begin the average again with the current weights."""
        self.load({name: self._optimizer.master(p) for name, p in self._parameters.items()}, n_updates=0)

    def load(self, weights: Mapping[str, Tensor], n_updates: int) -> None:
        """Set the average of `n_updates` updates, fp32 weights by name."""
        for name, average in self.weights.items():
            average.copy_(weights[name])
        self.n_updates = n_updates

    @torch.no_grad()
    def update(self) -> None:
        """Include the current weights; called after each update of the optimizer."""
        self.n_updates += 1
        decay = min(self._decay, (1 + self.n_updates) / (10 + self.n_updates))
        for name, parameter in self._parameters.items():
            self.weights[name].lerp_(self._optimizer.master(parameter), 1 - decay)

    def exchange(self) -> None:
        """Exchange average and weights, bit for bit; a second call restores both."""
        for name, parameter in self._parameters.items():
            weight = self._optimizer.master(parameter).clone()
            self._optimizer.set_master(parameter, self.weights[name])
            self.weights[name].copy_(weight)
