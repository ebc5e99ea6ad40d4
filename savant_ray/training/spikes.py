"""Finds steps whose loss or gradient norm is far above those of recent steps, before the weights are updated.

As in OLMo-core's SkipStepOptimizer: a step is a spike if its loss or its gradient norm is more than `SIGMAS` standard
deviations above the mean of the last `WINDOW` steps. Both numbers are those of the whole step, equal on all ranks, so all
ranks decide the same. The window is part of the checkpoint, so a resumed run decides as an uninterrupted one.

Values far below the mean are not spikes. Differences from OLMo-core:

- A loss must also be above `LOSS_RATIO` times the mean, and a gradient norm above `NORM_RATIO` times the mean. Norms have
  heavy tails: of 97,000 steps of runs in which no loss was above its limit, 90 had a norm more than 6 standard deviations
  above the mean, at most 7.2 times the mean (docs/LOG.md).
- Spikes do not count in mean and deviation, because a large one would raise the limits so far that smaller ones would not be
  found in the next `WINDOW` steps. If more than `MAX_SPIKES` of the last `WINDOW` steps are spikes, they do count: the
  change is taken as permanent, and such steps soon no longer count as spikes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

WINDOW = 128  # steps
MIN_STEPS = WINDOW // 2  # in the window; with fewer, no step is a spike
MAX_SPIKES = WINDOW // 8
SIGMAS = 6.0
LOSS_RATIO = 1.01  # smallest limit relative to the mean, so that rounding is not a spike if losses are nearly equal
NORM_RATIO = 8.0  # smallest limit relative to the mean


@dataclass(frozen=True)
class Spike:
    """A step whose loss or gradient norm is above its limit."""

    loss: float  # nats per target token
    loss_limit: float
    grad_norm: float  # before clipping
    grad_norm_limit: float


class _Step(NamedTuple):
    loss: float
    grad_norm: float
    is_spike: bool


class SpikeWindow:
    """The last `WINDOW` steps with finite loss and gradient norm, each of `effective_batch` sequences."""

    def __init__(self, effective_batch: int) -> None:
        self._effective_batch = effective_batch  # the gradient norm depends on it
        self._steps: deque[_Step] = deque(maxlen=WINDOW)

    def find(self, loss: float, grad_norm: float) -> Spike | None:
        """Return a `Spike` if a step with this finite loss and gradient norm is one, else None."""
        if len(self._steps) < MIN_STEPS:
            return None
        reference = [step for step in self._steps if not step.is_spike]
        if len(self._steps) - len(reference) > MAX_SPIKES:
            reference = list(self._steps)
        loss_limit = limit([step.loss for step in reference], LOSS_RATIO)
        grad_norm_limit = limit([step.grad_norm for step in reference], NORM_RATIO)
        is_spike = loss > loss_limit or grad_norm > grad_norm_limit
        return Spike(loss, loss_limit, grad_norm, grad_norm_limit) if is_spike else None

    def add(self, loss: float, grad_norm: float) -> None:
        """Add a step; one without finite values is ignored."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self._steps.append(_Step(loss, grad_norm, self.find(loss, grad_norm) is not None))

    def to_record(self) -> dict[str, Any]:
        """Return the window as plain values for a checkpoint."""
        return {"effective_batch": self._effective_batch, "steps": [list(step) for step in self._steps]}

    def restored(self, record: dict[str, Any] | None) -> SpikeWindow:
        """Return the window of a checkpoint; an empty one without `record`, or if its steps had another effective batch."""
        window = SpikeWindow(self._effective_batch)
        if record and record["effective_batch"] == self._effective_batch:
            window._steps.extend(_Step(*step) for step in record["steps"])
        return window


def limit(values: Sequence[float], min_ratio: float) -> float:
    """Return the limit for a value that follows these, all positive; it is at least `min_ratio` times their mean."""
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return max(mean + SIGMAS * deviation, min_ratio * mean)
