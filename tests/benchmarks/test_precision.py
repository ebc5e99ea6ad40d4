"""Split bf16 weights learn as fp32 weights do where plain bf16 AdamW does not learn."""

from __future__ import annotations

import pytest

from savant_ray.benchmarks.precision import loss_decrease


def test_at_the_default_learning_rate_only_plain_bf16_does_not_learn() -> None:
    full, split, mixed, plain = (
        loss_decrease(each, 2e-5, 0, steps=12) for each in ("fp32", "bf16", "bf16-mixed", "plain bf16")
    )
    assert full > 0.01
    assert split == pytest.approx(full, rel=0.1) and mixed == pytest.approx(full, rel=0.1)
    assert plain < 0.3 * full
