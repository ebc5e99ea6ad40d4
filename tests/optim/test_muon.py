"""Muon: orthogonal updates of AdamW's size, equal for bf16 weights; a reloaded optimizer continues bit for bit."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from savant_ray.errors import CheckpointError
from savant_ray.optim.adamw import AdamW
from savant_ray.optim.muon import Muon, orthogonalized

SETTINGS = dict(lr=1e-3, weight_decay=0.01)
SHAPES = ((40, 30), (30, 70), (50,))


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    torch.manual_seed(3)
    made = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    for parameter in made:
        parameter.grad_dtype = torch.float32
    return made


def muon(dtype: torch.dtype = torch.float32) -> tuple[Muon, list[nn.Parameter]]:
    params = parameters(dtype)
    optimizer = Muon(params[:2], params[2:], **SETTINGS)
    for p, full in zip(params, parameters(torch.float32), strict=True):
        optimizer.set_master(p, full.detach())
    return optimizer, params


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_the_singular_values_of_a_direction_are_about_one(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape)
    direction = orthogonalized(matrix)
    values = torch.linalg.svdvals(direction)
    assert direction.shape == matrix.shape and values.min() > 0.6 and values.max() < 1.3
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    assert (direction * (u @ vh)).sum() / (direction.norm() * (u @ vh).norm()) > 0.95


def test_an_update_has_the_size_of_adamws_and_vectors_are_updated_by_adamw() -> None:
    optimizer, params = muon()
    before = [p.detach().clone() for p in params]
    adamw_param = nn.Parameter(before[2].clone())
    adamw = AdamW([adamw_param], **SETTINGS)
    train(optimizer, params, range(1))
    adamw_param.grad = params[2].grad
    adamw.step()
    for p, old in zip(params[:2], before, strict=False):
        moved = (p.detach() - old * (1 - SETTINGS["lr"] * SETTINGS["weight_decay"])) / SETTINGS["lr"]
        assert moved.square().mean().sqrt() == pytest.approx(0.2, abs=0.05)
    assert torch.equal(params[2], adamw_param)


def test_bf16_weights_take_the_updates_of_fp32_weights() -> None:
    (full, full_params), (split, split_params) = muon(), muon(torch.bfloat16)
    for optimizer, params in ((full, full_params), (split, split_params)):
        train(optimizer, params, range(10))
    for p, q in zip(full_params, split_params, strict=True):
        assert q.dtype == torch.bfloat16 and torch.equal(p.data, split.master(q))


def test_a_reloaded_optimizer_continues_bit_for_bit() -> None:
    straight, straight_params = muon(torch.bfloat16)
    train(straight, straight_params, range(6))
    first, first_params = muon(torch.bfloat16)
    train(first, first_params, range(3))
    file = io.BytesIO()
    torch.save((first.state_dict(), [first.master(p) for p in first_params]), file)
    file.seek(0)
    state, weights = torch.load(file, weights_only=True)
    second, second_params = muon(torch.bfloat16)
    second.load_state_dict(state)
    for p, full in zip(second_params, weights, strict=True):
        second.set_master(p, full)
    train(second, second_params, range(3, 6))
    for p, q in zip(straight_params, second_params, strict=True):
        assert torch.equal(straight.master(p), second.master(q))


def test_the_state_of_another_optimizer_is_refused() -> None:
    optimizer, params = muon()
    with pytest.raises(CheckpointError, match="groups"):
        optimizer.load_state_dict(AdamW(params, **SETTINGS).state_dict())


def test_rows_that_never_had_a_gradient_are_reported() -> None:
    optimizer, params = muon()
    for p in params:
        p.grad = torch.ones_like(p)
        p.grad[:5] = 0
    optimizer.step()
    for p in params:
        assert optimizer.had_gradient(p).tolist() == [False] * 5 + [True] * (len(p) - 5)
