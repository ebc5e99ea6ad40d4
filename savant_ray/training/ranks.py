"""Ranks decide together: a sum over all of them, or what rank 0 decides."""

from __future__ import annotations

from collections.abc import Callable

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


def agree(decide: Callable[[], str | None]) -> str | None:
    """What rank 0 decides, on every rank; collective."""
    if not dist.is_initialized():
        return decide()
    shared = [decide() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]
