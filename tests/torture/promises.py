"""What two runs must have in common to be the same run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from savant_ray.training.checkpoint import newest_checkpoint, read_checkpoint
from tests.cluster.conftest import losses, records


def expect_the_same_run(straight: Path, other: Path) -> None:
    """Every loss, every validation, every sample, every weight and moment, and the position: bit for bit."""
    assert losses(other) == losses(straight)
    for event, figure in (("step", "grad_norm"), ("validation", "validation_loss"), ("sample", "text")):
        assert figures(other, event, figure) == figures(straight, event, figure), f"{figure} of {event}"
    expect_equal(final_state(straight), final_state(other), "checkpoint")


def figures(run: Path, event: str, figure: str) -> list[tuple[int, Any]]:
    return [(line["step"], line[figure]) for line in records(run, event)]


def final_state(run: Path) -> dict[str, Any]:
    newest = newest_checkpoint(run)
    assert newest is not None
    return read_checkpoint(newest)


def expect_equal(a: Any, b: Any, where: str) -> None:
    """Nested dicts and lists of tensors and plain values."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            expect_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b)), where
