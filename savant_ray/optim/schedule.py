"""Learning-rate schedule: linear warm-up, then cosine decay to zero."""

from __future__ import annotations

import math


def learning_rate(step: int, peak: float, warmup_steps: int, max_steps: int) -> float:
    """Return the learning rate of update `step` (from 1): `peak` at the end of the warm-up, 0 from `max_steps` on."""
    if step <= warmup_steps:
        return peak * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
