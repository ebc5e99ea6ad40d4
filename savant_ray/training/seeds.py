"""Random choices of a run as functions of (seed, step, purpose), so that all ranks and resumed runs agree."""

from __future__ import annotations

import hashlib
import random

from savant_ray.config import Config


def derived_seed(seed: int, step: int, purpose: str) -> int:
    """Return a 63-bit seed that is different for each purpose and step of a run."""
    digest = hashlib.blake2b(f"{seed}/{step}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def loops_of_step(config: Config, step: int) -> int:
    """Return the number of loops of a training step; steps count from 1.

    It is twice `model.n_loops` with the probability `training.double_loops_fraction`, otherwise `model.n_loops`.
    """
    generator = random.Random(derived_seed(config.run.seed, step, "loops"))
    is_double = generator.random() < config.training.double_loops_fraction
    return config.model.n_loops * (2 if is_double else 1)


def max_loops(config: Config) -> int:
    """Return the largest number of loops that a step can have."""
    return config.model.n_loops * (2 if config.training.double_loops_fraction else 1)
