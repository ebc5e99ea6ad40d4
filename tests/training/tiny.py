"""A two-loop model and sequences without files: sequence p is a function of p."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from savant_ray.config import Config
from savant_ray.data.order import rank_slice
from savant_ray.events import Event, StepDone
from savant_ray.model import loss
from savant_ray.model.loss import next_token_targets
from savant_ray.training.host_copies import HostCopy
from savant_ray.training.loop import train
from savant_ray.training.state import TrainingState, new_state
from savant_ray.training.step import MicroBatch

LENGTH, VOCABULARY = 16, 50
MODEL = dict(
    vocab_size=VOCABULARY,
    dim=16,
    n_heads=2,
    n_loops=2,
    max_seq_len=LENGTH,
    window_size=4,
    global_every=2,
    soft_cap=50.0,
)
CPU = torch.device("cpu")


def tiny_config(**training: Any) -> Config:
    settings = dict(
        max_steps=6,
        batch_size=4,
        accumulation=3,
        learning_rate=1e-2,
        warmup_fraction=0.2,
        precision="fp32",
        compile=False,
    )
    return Config.from_dict(
        {
            "model": MODEL,
            "training": settings | training,
            "validation": {"every_steps": 1000},
            "checkpoint": {"every_steps": 1000},
        }
    )


def tiny_state(config: Config) -> TrainingState:
    return new_state(config, CPU)


def micro_batch(positions: np.ndarray | list[int], index: int = 0) -> MicroBatch:
    tokens, documents = zip(*(_sequence(int(p)) for p in positions), strict=True)
    return unmasked(torch.stack(tokens), torch.stack(documents), tuple(int(p) for p in positions), index)


def unmasked(
    tokens: torch.Tensor, documents: torch.Tensor, positions: tuple[int, ...] = (), index: int = 0
) -> MicroBatch:
    """Return a micro-batch that trains on all tokens."""
    return MicroBatch(tokens, documents, torch.ones_like(tokens, dtype=torch.bool), positions, index=index)


def rank_micro_batches(
    first: int, effective_batch: int, rank: int, world_size: int, batch_size: int
) -> list[MicroBatch]:
    """Return the micro-batches of a rank, which are not divided among ranks."""
    mine = rank_slice(effective_batch, rank, world_size, batch_size)
    starts = range(mine.start, mine.stop, batch_size)
    return [
        micro_batch(first + np.arange(start, min(start + batch_size, mine.stop)), start // batch_size)
        for start in starts
    ]


def local_batches(
    state: TrainingState, config: Config, rank: int = 0, world_size: int = 1
) -> Iterator[list[MicroBatch]]:
    settings = config.training
    first = state.position
    for step in range(settings.max_steps - state.step):
        start = first + step * settings.effective_batch
        yield rank_micro_batches(start, settings.effective_batch, rank, world_size, settings.batch_size)


def weights(state: TrainingState) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state.master_weights().items()}


def never() -> None:
    """Return None: no stop is requested."""


class Code:
    """Creates a folder when unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


class RecordingHost:
    """A `Host` that records calls; a stop is requested in step `stop_at`, or in the validation after it."""

    def __init__(
        self, rank: int = 0, stop_at: int | None = None, in_validation: bool = False, grace: float = 60
    ) -> None:
        self.rank, self.stop_at, self.in_validation, self.grace = rank, stop_at, in_validation, grace
        self.step, self.storage_refuses = 0, False
        self.events: list[Event] = []
        self.saved: list[tuple[int, str]] = []
        self.validated: list[int] = []
        self.rank_figures: list[tuple[float, float]] = []
        self.files: dict[str, bytes] = {}
        self.checkpoint: dict[str, Any] = {}
        self._host_copy = HostCopy()
        self._begun: tuple[int, str, dict[str, Any]] | None = None

    def emit(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, StepDone):
            self.step = event.step

    def observe_rank(self, data_wait_seconds: float, memory_gb: float) -> None:
        self.rank_figures.append((data_wait_seconds, memory_gb))

    def grace_left(self) -> float | None:
        return self.grace if not self.in_validation and self.step + 1 == self.stop_at else None

    def save(self, state: TrainingState, reason: str) -> None:
        self.finish_saving()
        self._begun = (state.step, reason, self._host_copy.update(state))

    def finish_saving(self) -> bool:
        """Finish the pending save, or fail it if the storage refuses."""
        kept = self._begun is None or not self.storage_refuses
        if self._begun is not None and kept:
            step, reason, self.checkpoint = self._begun
            self.saved.append((step, reason))
        self._begun = None
        return kept

    def restore(self, state: TrainingState) -> None:
        self.finish_saving()
        if self.checkpoint:
            state.load_checkpoint(self.checkpoint)

    def local_batches(self, state: TrainingState) -> Iterator[list[MicroBatch]]:
        raise AssertionError("no test without spikes reads again")

    def store_file(self, file: Path, name: str) -> str:
        self.files[name] = file.read_bytes()
        return name

    def validate(self, state: TrainingState) -> bool:
        stop = self.in_validation and state.step == self.stop_at
        if not stop:
            self.validated.append(state.step)
        return stop


def trained(
    config: Config, checkpoint: dict[str, Any] | None = None, stop_at: int | None = None
) -> tuple[TrainingState, RecordingHost]:
    """Train from the beginning or a checkpoint to the end, or until a stop at a step."""
    state, host = tiny_state(config), RecordingHost(stop_at=stop_at)
    if checkpoint is not None:
        assert state.load_checkpoint(checkpoint) == []
        host.step = state.step
    train(state, config, local_batches(state, config), host)
    return state, host


def assert_equal_weights(one: TrainingState, other: TrainingState) -> None:
    assert all(torch.equal(weight, weights(other)[name]) for name, weight in weights(one).items())


def with_bad_losses(bad: list[MicroBatch], value: float = math.nan) -> Callable[..., torch.Tensor]:
    """Return `training.step.cross_entropy_sum` with losses multiplied by `value` for these micro-batches."""
    bad_targets = [next_token_targets(b.tokens_BT, b.document_ids_BT) for b in bad]

    def cross_entropy_sum(x: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, *others: Any) -> torch.Tensor:
        is_bad = any(torch.equal(targets, other) for other in bad_targets)
        return loss.cross_entropy_sum(x, head, targets, *others) * (value if is_bad else 1.0)

    return cross_entropy_sum


def _sequence(position: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two documents and some padding, with lengths that depend on the position."""
    generator = torch.Generator().manual_seed(position)
    first = 3 + position % 5
    documents = torch.tensor([0] * first + [1] * (LENGTH - first - position % 3) + [-1] * (position % 3))
    tokens = torch.randint(1, VOCABULARY, (LENGTH,), generator=generator)
    return torch.where(documents >= 0, tokens, 0), documents


def tiny_tokenizer() -> Any:
    """A tokenizer that encodes every prompt as `[3, 4]` and decodes ids as their list."""
    return SimpleNamespace(
        vocab_size=50,
        end_of_document=50,
        never_sampled=frozenset(),
        encode_prompts=lambda texts: [[3, 4] for _ in texts],
        decode_continuation=lambda prompt, ids: str(ids),
    )
