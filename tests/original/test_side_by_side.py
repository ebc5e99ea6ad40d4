"""A run of the original and one of savant_ray, update by update (docs/from_the_original.md shows the tables)."""

from __future__ import annotations

import pytest

from tests.original.fixtures import rate
from tests.original.program import AdamW8bit, adamw
from tests.original.side_by_side import UPDATES, Figures, fresh, taken_over


def assert_agree(savant: Figures, original: Figures, loss: float, moments: float) -> None:
    assert savant.rate == pytest.approx(original.rate, rel=1e-12)
    assert savant.loss == pytest.approx(original.loss, rel=loss)
    assert savant.first_moment == pytest.approx(original.first_moment, rel=moments)
    assert savant.second_moment == pytest.approx(original.second_moment, rel=moments)


def test_a_continued_run_has_the_losses_rates_and_moments_of_the_original() -> None:
    updates = taken_over(adamw)
    assert [update.number for update in updates] == list(range(5, 5 + UPDATES))
    for update in updates:
        assert_agree(update.savant, update.original, loss=1e-6, moments=1e-5)


def test_a_run_continued_from_8_bit_moments_differs_only_by_their_rounding() -> None:
    first, *others = taken_over(AdamW8bit)
    assert first.savant.loss == pytest.approx(first.original.loss, rel=1e-6)
    for update in (first, *others):
        assert_agree(update.savant, update.original, loss=1e-3, moments=1e-2)


def test_a_fresh_run_differs_from_the_original_only_by_one_update_of_the_schedule() -> None:
    updates = fresh()
    assert updates[0].original.rate == 0
    assert [update.savant.rate for update in updates[:-1]] == pytest.approx([u.original.rate for u in updates[1:]])
    for update in fresh(schedule=lambda done: rate(done + 1)):
        assert_agree(update.savant, update.original, loss=1e-6, moments=1e-5)
