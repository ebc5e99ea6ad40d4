"""Split bf16 weights receive the updates of fp32 weights, and a reloaded optimizer continues bit for bit."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from savant_ray.errors import CheckpointError
from savant_ray.optim.adamw import AdamW, join, split

SETTINGS = dict(lr=2e-5, weight_decay=0.01)


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    torch.manual_seed(3)
    full = [torch.randn(40, 30), torch.randn(30)]
    made = [nn.Parameter(x.to(dtype)) for x in full]
    for parameter in made:
        parameter.grad_dtype = torch.float32
    return made


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def split_optimizer() -> tuple[AdamW, list[nn.Parameter]]:
    params = parameters(torch.bfloat16)
    optimizer = AdamW(params, **SETTINGS)
    for p, full in zip(params, parameters(torch.float32), strict=True):
        optimizer.set_master(p, full.detach())
    return optimizer, params


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_a_split_weight_joins_to_the_same_bits(values: list[float]) -> None:
    full = torch.tensor(values, dtype=torch.float32)
    full = full[full.abs() < 3.38e38]  # beyond, the nearest bf16 is infinite
    assert torch.equal(join(*split(full)).view(torch.int32), full.view(torch.int32))


def test_the_upper_half_is_the_nearest_bf16() -> None:
    full = torch.randn(100_000)
    upper, _ = split(full)
    assert ((upper.float() - full).abs() <= (full.bfloat16().float() - full).abs()).all()


@pytest.mark.parametrize("learning_rate", [2e-5, 1e-3])
def test_split_bf16_weights_take_the_updates_of_torch_adamw_in_fp32(learning_rate: float) -> None:
    params = parameters(torch.float32)
    reference = torch.optim.AdamW(params, lr=learning_rate, weight_decay=0.01, fused=True)
    optimizer, bf16_params = split_optimizer()
    optimizer.param_groups[0]["lr"] = learning_rate
    train(reference, params, range(50))
    train(optimizer, bf16_params, range(50))
    for full, p in zip(params, bf16_params, strict=True):
        assert torch.equal(optimizer.master(p), full)
        assert torch.equal(p, split(full.detach())[0])


def test_at_2e_5_split_weights_change_and_plain_bf16_weights_hardly_do() -> None:
    optimizer, params = split_optimizer()
    before = [optimizer.master(p).clone() for p in params]
    train(optimizer, params, range(100))
    moved = [(optimizer.master(p) != b).float().mean() for p, b in zip(params, before, strict=True)]
    assert min(moved) >= 0.95

    plain = [nn.Parameter(p.detach().bfloat16()) for p in parameters(torch.float32)]
    plain_before = [p.detach().clone() for p in plain]
    plain_optimizer = torch.optim.AdamW(plain, **SETTINGS)
    for step in range(100):
        generator = torch.Generator().manual_seed(step)
        for p in plain:
            p.grad = torch.randn(p.shape, generator=generator).bfloat16()
        plain_optimizer.step()
    assert max((p != b).float().mean() for p, b in zip(plain, plain_before, strict=True)) < 0.2


def test_a_reloaded_optimizer_continues_bit_for_bit() -> None:
    straight, straight_params = split_optimizer()
    train(straight, straight_params, range(20))

    first, first_params = split_optimizer()
    train(first, first_params, range(10))
    file = io.BytesIO()
    torch.save((first.state_dict(), [first.master(p) for p in first_params]), file)
    file.seek(0)
    state, masters = torch.load(file, weights_only=True)
    second, second_params = split_optimizer()
    second.load_state_dict(state)
    for p, master in zip(second_params, masters, strict=True):
        second.set_master(p, master)
    train(second, second_params, range(10, 20))
    for a, b in zip(straight_params, second_params, strict=True):
        assert torch.equal(straight.master(a), second.master(b))
        for name in ("exp_avg", "exp_avg_sq"):
            assert straight.state[a][name].dtype == torch.float32
            assert torch.equal(straight.state[a][name], second.state[b][name])


def test_a_moment_of_another_shape_is_refused() -> None:
    optimizer, _ = split_optimizer()
    other = AdamW([nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(30))], **SETTINGS)
    with pytest.raises(CheckpointError, match="exp_avg of parameter 0 has another shape"):
        optimizer.load_state_dict(other.state_dict())
