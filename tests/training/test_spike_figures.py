"""Figures of the rule for spikes on a real text: no false alarm in 20,000 quiet steps, 50 of 50 injected spikes found."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import savant_ray.training.step as module
from savant_ray.config import Config
from savant_ray.events import SpikeFound
from savant_ray.training.loop import train
from savant_ray.training.spikes import WINDOW
from savant_ray.training.step import MicroBatch
from tests.training.tiny import RecordingHost, tiny_state, unmasked

pytestmark = pytest.mark.rare
ROOT = Path(__file__).parents[2]
LENGTH, BATCH = 64, 8
MODEL = dict(vocab_size=256, dim=32, n_heads=2, n_loops=2, max_seq_len=LENGTH, window_size=16, global_every=2)
QUIET_STEPS = 20_000
INJECTED = 50


def config_of(max_steps: int, on_spike: str) -> Config:
    training = dict(max_steps=max_steps, batch_size=BATCH, accumulation=1, learning_rate=3e-3, on_spike=on_spike)
    fast = dict(warmup_fraction=0.02, precision="fp32", compile=False)
    rare = {"every_steps": 10 * QUIET_STEPS}
    return Config.from_dict(
        {"model": MODEL, "training": training | fast, "validation": rare, "checkpoint": rare},
    )


def text() -> Tensor:
    """Return the bytes of this project's sources and pages in sequences `[N, LENGTH]`, in random order."""
    files = sorted([*ROOT.glob("savant_ray/**/*.py"), *ROOT.glob("tests/**/*.py"), *ROOT.glob("docs/**/*.md")])
    content = np.frombuffer(b"\0".join(file.read_bytes() for file in files), dtype=np.uint8)
    sequences = content[: len(content) // LENGTH * LENGTH].reshape(-1, LENGTH)
    return torch.from_numpy(np.random.default_rng(0).permutation(sequences).astype(np.int64))


def local_batches(sequences: Tensor, n_steps: int) -> Iterator[list[MicroBatch]]:
    for step in range(n_steps):
        rows = torch.arange(step * BATCH, (step + 1) * BATCH) % len(sequences)
        yield [unmasked(sequences[rows], torch.zeros(BATCH, LENGTH, dtype=torch.int64), tuple(rows.tolist()))]


def spikes(host: RecordingHost) -> list[int]:
    return [event.step for event in host.events if isinstance(event, SpikeFound)]


def test_20_000_steps_on_real_text_have_no_spike() -> None:
    config, host = config_of(QUIET_STEPS, "warn"), RecordingHost()
    train(tiny_state(config), config, local_batches(text(), QUIET_STEPS), host)
    assert host.step == QUIET_STEPS and spikes(host) == []


def scaled_loss(factor: float) -> Callable[..., Tensor]:
    """Return a loss whose value and gradient are multiplied."""
    loss = module.cross_entropy_sum
    return lambda *inputs: loss(*inputs) * factor


def scaled_gradient(factor: float) -> Callable[..., Tensor]:
    """Return a loss whose gradient only is multiplied."""
    loss = module.cross_entropy_sum

    def scaled(*inputs: Tensor) -> Tensor:
        value = loss(*inputs)
        return value * factor - (value * (factor - 1)).detach()

    return scaled


def test_50_of_50_spikes_that_are_injected_into_a_training_are_found_and_no_other_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Losses times 1.5 to 100, gradients times 16 to 1,000, and text of random bytes; each is skipped."""
    draw, true_loss = random.Random(0), module.cross_entropy_sum
    n_steps = WINDOW + 20 * INJECTED
    injected = dict(zip(sorted(draw.sample(range(WINDOW + 1, n_steps + 1), INJECTED)), range(INJECTED), strict=True))

    def with_injections() -> Iterator[list[MicroBatch]]:
        for step, local_batch in enumerate(local_batches(text(), n_steps), 1):
            monkeypatch.setattr(module, "cross_entropy_sum", true_loss)
            kind = injected[step] % 3 if step in injected else None
            if kind == 0:
                monkeypatch.setattr(module, "cross_entropy_sum", scaled_loss(10 ** draw.uniform(0.18, 2)))
            elif kind == 1:
                monkeypatch.setattr(module, "cross_entropy_sum", scaled_gradient(10 ** draw.uniform(1.2, 3)))
            elif kind == 2:
                generator = torch.Generator().manual_seed(step)
                noise = torch.randint(0, 256, (BATCH, LENGTH), generator=generator)
                local_batch[0] = unmasked(noise, torch.zeros_like(noise))
            yield local_batch

    config, host = config_of(n_steps, "skip"), RecordingHost()
    train(tiny_state(config), config, with_injections(), host)
    assert spikes(host) == sorted(injected)
