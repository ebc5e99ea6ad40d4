"""Finds steps whose loss or gradient norm is far above those of recent steps, before the weights are updated.

As in OLMo-core's SkipStepOptimizer: a step is a spike if its loss or its gradient norm is more than `SIGMAS` standard
deviations above the mean of the last `WINDOW` steps. Both numbers are those of the whole step, equal on all ranks, so all
ranks decide the same. The window is part of the checkpoint, so a resumed run decides as an uninterrupted one.

Three differences, each for a reason:

- Only values above the mean count, and only if they are at least `MIN_LOSS_RATIO` or `MIN_NORM_RATIO` times the mean.
  Gradient norms have heavy tails: of 55,000 steps of quiet runs, in which the loss had no spike, 26 had a norm more than 6
  standard deviations above the mean, up to 3.9 times the mean (docs/LOG.md).
- A spike enters the window as its limit, not as its value. A single spike of 100 standard deviations would otherwise hide
  all smaller ones for the next `WINDOW` steps. If the loss stays high, the limit still rises with each step, so that a
  lasting change is not reported forever.
- Values that are not finite are left to the rules for them and do not enter the window.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

WINDOW = 128  # steps
MIN_STEPS = WINDOW // 2  # before that nothing is a spike
SIGMAS = 6.0
MIN_LOSS_RATIO = 1.01  # to the mean; where all losses are nearly equal, rounding is no spike
MIN_NORM_RATIO = 5.0


@dataclass(frozen=True)
class Spike:
    """A step whose loss or gradient norm is above its limit."""

    loss: float  # nats per target token
    loss_limit: float
    grad_norm: float  # before clipping
    grad_norm_limit: float


class SpikeWindow:
    """Losses and gradient norms of the last `WINDOW` steps with finite ones, of `effective_batch` sequences each."""

    def __init__(self, effective_batch: int) -> None:
        self._effective_batch = effective_batch  # smaller batches have other norms
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._grad_norms: deque[float] = deque(maxlen=WINDOW)

    def find(self, loss: float, grad_norm: float) -> Spike | None:
        """Return the step with this loss and gradient norm, both finite, if it is a spike."""
        spike = Spike(loss, self._loss_limit(), grad_norm, self._norm_limit())
        return spike if loss > spike.loss_limit or grad_norm > spike.grad_norm_limit else None

    def add(self, loss: float, grad_norm: float) -> None:
        """Add a step; a value above its limit counts as the limit, and a step without finite values is ignored."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self._losses.append(min(loss, self._loss_limit()))
            self._grad_norms.append(min(grad_norm, self._norm_limit()))

    def _loss_limit(self) -> float:
        return limit(self._losses, MIN_LOSS_RATIO)

    def _norm_limit(self) -> float:
        return limit(self._grad_norms, MIN_NORM_RATIO)

    def to_record(self) -> dict[str, Any]:
        """Return the window as plain values for a checkpoint."""
        return {
            "effective_batch": self._effective_batch,
            "losses": list(self._losses),
            "grad_norms": list(self._grad_norms),
        }

    def restored(self, record: dict[str, Any] | None) -> SpikeWindow:
        """Return the window of a checkpoint; an empty one without `record`, or if its steps had another effective batch."""
        window = SpikeWindow(self._effective_batch)
        if record and record["effective_batch"] == self._effective_batch:
            window._losses.extend(record["losses"])
            window._grad_norms.extend(record["grad_norms"])
        return window


def limit(values: Collection[float], min_ratio: float) -> float:
    """Return the largest value after positive `values` that is no spike; infinity if they are fewer than `MIN_STEPS`.

    It is at least `min_ratio` times their mean.
    """
    if len(values) < MIN_STEPS:
        return math.inf
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return max(mean + SIGMAS * deviation, min_ratio * mean)
