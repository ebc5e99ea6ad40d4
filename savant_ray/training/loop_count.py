"""How many loops a training step has: a function of settings, seed and step, so equal on all ranks and after a resume."""

from __future__ import annotations

import random

from savant_ray.config import Config
from savant_ray.training.seeds import derived_seed


def loops_of_step(config: Config, step: int) -> int:
    """Return the number of loops of update `step`, from 1.

    The first `training.half_loops_steps` updates have half of `model.n_loops`, rounded up. Each of the others has twice
    `model.n_loops` with the probability `training.double_loops_fraction`.
    """
    n_loops, settings = config.model.n_loops, config.training
    if step <= settings.half_loops_steps:
        return (n_loops + 1) // 2
    is_double = random.Random(derived_seed(config.run.seed, step, "loops")).random() < settings.double_loops_fraction
    return 2 * n_loops if is_double else n_loops


def most_loops(config: Config) -> int:
    """Return the largest number of loops that a step can have."""
    return config.model.n_loops * (2 if config.training.double_loops_fraction else 1)
