"""The cap: arithmetic here, the device itself in test_gpu.py."""

from __future__ import annotations

import pytest
import torch

from savant_ray.training.memory import MARGIN_GB, allocator_fraction, cap_memory, memory_used_gb
from tests.training.tiny import CPU


@pytest.mark.parametrize(
    ("limit", "total", "outside", "expected"),
    [(10, 80, 0.5, 9.4), (10, 10, 0.4, 9.5), (24, 10, 0.4, 9.5), (1, 10, 2.0, 0.0)],
)
def test_what_lies_outside_the_allocator_counts(limit: float, total: float, outside: float, expected: float) -> None:
    assert MARGIN_GB == 0.1
    assert allocator_fraction(limit, total, outside) * total == pytest.approx(expected)


def test_a_cpu_has_nothing_to_cap_and_tells_its_resident_size() -> None:
    assert "nothing to cap" in (cap_memory(CPU, 10.0) or "")
    before = memory_used_gb(CPU)
    kept = torch.ones(100 << 20, dtype=torch.uint8)
    assert memory_used_gb(CPU) - before > 0.08 and kept.numel()
