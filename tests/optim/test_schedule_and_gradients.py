"""The schedule as numbers; the flat buffer as the place where gradients really add up."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from savant_ray.optim.gradients import GradientBuffer
from savant_ray.optim.schedule import learning_rate


def test_the_guides_schedule_warms_up_over_4000_steps_and_ends_at_zero() -> None:
    rates = [learning_rate(step, 2e-5, 4_000, 80_000) for step in (1, 2_000, 4_000, 42_000, 80_000)]
    assert rates == pytest.approx([5e-9, 1e-5, 2e-5, 1e-5, 0.0], abs=1e-12)


def test_the_schedule_rises_then_falls_and_never_jumps() -> None:
    rates = [learning_rate(step, 1.0, 10, 100) for step in range(1, 101)]
    assert rates[:10] == sorted(rates[:10]) and rates[9:] == sorted(rates[9:], reverse=True)
    assert max(abs(a - b) for a, b in itertools.pairwise(rates)) <= 0.1 + 1e-12


def test_with_a_decay_at_the_end_the_rate_is_constant_after_the_warm_up_and_then_falls_linearly_to_zero() -> None:
    rates = [learning_rate(step, 2.0, 4, 20, decay_steps=5) for step in range(1, 21)]
    assert rates == pytest.approx([0.5, 1, 1.5, *[2] * 12, 1.6, 1.2, 0.8, 0.4, 0])


def test_before_the_decay_the_rates_do_not_depend_on_the_number_of_steps() -> None:
    short, long = ([learning_rate(step, 2.0, 4, n, decay_steps=n // 4) for step in range(1, 16)] for n in (20, 400))
    assert short == long
    assert learning_rate(3, 1.0, 4, 4, decay_steps=4) == 0.25, "where warm-up and decay overlap, the lower one counts"
    assert learning_rate(1, 1.0, 0, 4, decay_steps=2) == 1 and learning_rate(9, 1.0, 0, 4, decay_steps=2) == 0


def test_without_warm_up_the_first_step_has_nearly_the_full_rate() -> None:
    assert learning_rate(1, 1.0, 0, 100) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_add_up_in_fp32_inside_the_one_buffer(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.ones(4, 3, dtype=dtype))
    buffer = GradientBuffer([parameter], n_sums=2)
    for _ in range(1000):
        (parameter * 0.001).sum().backward()
    expected = 1000 * torch.tensor(0.001, dtype=dtype).float()
    torch.testing.assert_close(buffer.gradients, expected.expand(12), rtol=1e-4, atol=0)
    assert parameter.grad.dtype == torch.float32 and not buffer.sums.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twelve_uses_of_a_weight_in_one_backward_pass_add_up_in_fp32(dtype: torch.dtype) -> None:
    """As the model's loops use each weight; in bf16 1 + 2**-9 is 1, so all but the first gradient would be lost."""
    parameter = nn.Parameter(torch.ones(4, 3, dtype=dtype))
    buffer = GradientBuffer([parameter], n_sums=0)
    factors = [1.0, *[2**-9] * 11]
    sum((parameter * factor).sum() for factor in factors).backward()
    assert torch.equal(buffer.gradients, torch.full((12,), 1 + 11 * 2**-9))
