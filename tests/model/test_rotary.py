"""Rotary embeddings: scores depend on the distance only, and vector lengths do not change."""

from __future__ import annotations

import pytest
import torch

from savant_ray.model.rotary import apply_rotary, rotary_embedding

CPU = torch.device("cpu")


def test_a_score_depends_on_the_distance_and_on_nothing_else() -> None:
    q, k = torch.randn(2, 1, 1, 1, 16)
    scores = [
        (
            apply_rotary(q, rotary_embedding(first + distance, 1, 16, CPU))
            * apply_rotary(k, rotary_embedding(first, 1, 16, CPU))
        ).sum()
        for distance in (0, 3)
        for first in (0, 5, 70)
    ]
    for group in (scores[:3], scores[3:]):
        torch.testing.assert_close(torch.stack(group), group[0].expand(3), rtol=1e-4, atol=1e-4)
    assert scores[0] == pytest.approx(float((q * k).sum()), rel=1e-5) and abs(scores[0] - scores[3]) > 1e-3


def test_the_pairs_turn_as_complex_numbers_do() -> None:
    x = torch.randn(1, 2, 7, 8)
    as_complex = torch.complex(*x.chunk(2, dim=-1))
    angles = torch.arange(3.0, 10.0)[:, None] * 10_000.0 ** -(torch.arange(4) / 4)
    turned = as_complex * torch.polar(torch.ones(7, 4), angles)
    torch.testing.assert_close(
        apply_rotary(x, rotary_embedding(3, 7, 8, CPU)), torch.cat([turned.real, turned.imag], dim=-1)
    )


def test_a_rotation_keeps_the_dtype() -> None:
    x = torch.randn(1, 2, 7, 8)
    assert apply_rotary(x.bfloat16(), rotary_embedding(0, 7, 8, CPU)).dtype == torch.bfloat16
