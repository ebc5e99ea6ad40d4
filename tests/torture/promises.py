"""Comparison of two runs that must be equal."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from savant_ray.training.checkpoint import newest_checkpoint, read_checkpoint
from tests.cluster.conftest import losses, records


def assert_same_run(uninterrupted: Path, interrupted: Path) -> None:
    """Compare losses, validations, samples, weights, moments and position bit for bit."""
    assert losses(interrupted) == losses(uninterrupted)
    for event, figure in (("step", "grad_norm"), ("validation", "validation_loss"), ("sample", "text")):
        assert figures(interrupted, event, figure) == figures(uninterrupted, event, figure), f"{figure} of {event}"
    assert_equal(final_state(uninterrupted), final_state(interrupted), "checkpoint")


def figures(run: Path, event: str, figure: str) -> list[tuple[int, Any]]:
    return [(line["step"], line[figure]) for line in records(run, event)]


def final_state(run: Path) -> dict[str, Any]:
    newest = newest_checkpoint(run)
    assert newest is not None
    return read_checkpoint(newest)


def assert_equal(a: Any, b: Any, where: str) -> None:
    """Compare nested dicts of tensors and plain values; NaN equals NaN."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b)), where
