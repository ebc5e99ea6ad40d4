"""Learning-rate schedules: linear warm-up, then a cosine decay to zero, or a constant rate and a linear decay at the end."""

from __future__ import annotations

import math

from savant_ray.config import TrainingConfig


def scheduled_rate(step: int, settings: TrainingConfig) -> float:
    """Return the learning rate of update `step` (from 1) with these settings."""
    return learning_rate(
        step, settings.learning_rate, settings.n_warmup_steps, settings.max_steps, settings.n_decay_steps
    )


def learning_rate(step: int, peak: float, warmup_steps: int, max_steps: int, decay_steps: int | None = None) -> float:
    """Return the learning rate of update `step` (from 1): `peak` at the end of the warm-up, 0 from `max_steps` on.

    With `decay_steps` it stays at `peak` up to update `max_steps - decay_steps`, and then falls linearly (warm-up, stable,
    decay; arXiv 2404.06395), so that only the decay depends on `max_steps`. If warm-up and decay overlap, the lower rate
    counts. Without `decay_steps` it falls as a cosine from the end of the warm-up on.
    """
    if decay_steps is not None:
        warmup = step / warmup_steps if step < warmup_steps else 1.0
        return peak * min(warmup, 1.0, max(0, max_steps - step) / decay_steps)
    if step <= warmup_steps:
        return peak * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
