"""Ranks decide together: the one collective that everything but the step's own all-reduce needs."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def add_up(values: Tensor) -> Tensor:
    """The sum over all ranks, in place; collective."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def any_rank(here: bool, device: torch.device) -> bool:
    """Whether it is so on some rank; collective."""
    return bool(add_up(torch.tensor(float(here), device=device)))
