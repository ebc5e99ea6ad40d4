"""The sparkline of the loss."""

from __future__ import annotations

import pytest

from savant_ray.reporting.console import SPARKLINE_LEVELS, SPARKLINE_WIDTH, Sparkline


def trend(values: list[float], per_character: int = 1) -> str:
    kept = Sparkline(per_character)
    for value in values:
        kept.add(value)
    return str(kept)


def test_a_trend_goes_from_its_lowest_to_its_highest_value() -> None:
    assert trend([7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0]) == SPARKLINE_LEVELS[::-1]
    assert trend([1.0, 1.0, 1.0]) == SPARKLINE_LEVELS[0] * 3


@pytest.mark.parametrize("values", [[], [5.0], [float("nan"), 5.0]])
def test_one_value_is_no_trend(values: list[float]) -> None:
    assert trend(values) == ""


def test_only_the_recent_values_count_and_each_character_is_the_mean_of_as_many() -> None:
    assert len(trend([float(i) for i in range(1000)], per_character=8)) == SPARKLINE_WIDTH
    assert (
        trend([1000.0, *[float(i % 2) for i in range(SPARKLINE_WIDTH * 8)]], per_character=8)
        == SPARKLINE_LEVELS[0] * SPARKLINE_WIDTH
    )
