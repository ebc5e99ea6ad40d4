"""The sparkline of the loss."""

from __future__ import annotations

import pytest

from savant_ray.reporting.console import SPARKLINE_LEVELS, SPARKLINE_WIDTH, Sparkline


def trend(values: list[float], per_character: int = 1) -> str:
    kept = Sparkline(per_character)
    for value in values:
        kept.add(value)
    return str(kept)


def test_a_sparkline_is_scaled_from_the_lowest_to_the_highest_value() -> None:
    assert trend([7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0]) == SPARKLINE_LEVELS[::-1]
    assert trend([1.0, 1.0, 1.0]) == SPARKLINE_LEVELS[0] * 3


@pytest.mark.parametrize("values", [[], [5.0], [float("nan"), 5.0]])
def test_a_sparkline_of_fewer_than_two_values_is_empty(values: list[float]) -> None:
    assert trend(values) == ""


def test_a_sparkline_shows_means_of_recent_values_only() -> None:
    assert len(trend([float(i) for i in range(1000)], per_character=8)) == SPARKLINE_WIDTH
    assert (
        trend([1000.0, *[float(i % 2) for i in range(SPARKLINE_WIDTH * 8)]], per_character=8)
        == SPARKLINE_LEVELS[0] * SPARKLINE_WIDTH
    )
