"""Sequences that go through the device together.

Shapes: B sequences, T time, N sequences of a rank's share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from savant_ray.config import Config
from savant_ray.data.token_cache import Sequences
from savant_ray.training.efficiency import document_lengths, useful_flops
from savant_ray.training.fitting import unless_out_of_memory


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that go through one forward and backward pass."""

    tokens_BT: Tensor
    document_ids_BT: Tensor
    positions: tuple[int, ...]  # in the global order
    useful_flops: float = 0.0  # of its forward and backward pass, for the share of peak

    def parts(self, rows: int) -> Iterator[MicroBatch]:
        """The same sequences, at most `rows` at once."""
        for start in range(0, len(self.tokens_BT), rows):
            part = slice(start, start + rows)
            yield MicroBatch(self.tokens_BT[part], self.document_ids_BT[part], self.positions[part])

    def to(self, device: torch.device) -> MicroBatch:
        """The same there; from pinned memory a GPU fetches it by itself."""
        tokens_BT = self.tokens_BT.to(device, non_blocking=True)
        document_ids_BT = self.document_ids_BT.to(device, non_blocking=True)
        return replace(self, tokens_BT=tokens_BT, document_ids_BT=document_ids_BT)


def micro_batches(sequences: Sequences, positions: np.ndarray, config: Config, pinned: bool) -> list[MicroBatch]:
    """Copies of sequences `[N, T]`, at most `training.batch_size` each, in memory that a GPU can fetch them from."""
    size = config.training.batch_size
    parts = [slice(start, start + size) for start in range(0, len(positions), size)]
    return [
        MicroBatch(
            tokens_BT=_copy(sequences.tokens[part], pinned),
            document_ids_BT=_copy(sequences.document_ids[part], pinned),
            positions=tuple(int(p) for p in positions[part]),
            useful_flops=useful_flops(config.model, document_lengths(sequences.document_ids[part])),
        )
        for part in parts
    ]


def as_far_as_they_fit(parts: Sequence[MicroBatch], device: torch.device) -> list[MicroBatch]:
    """The same there, from the first that has no room on where they were: before their turn another step is running."""
    there: list[MicroBatch] = []
    for part in parts:
        moved = unless_out_of_memory(partial(part.to, device), device)
        if moved is None:
            break
        there.append(moved)
    return [*there, *parts[len(there) :]]


def _copy(array: np.ndarray, pinned: bool) -> Tensor:
    tensor = torch.from_numpy(array.copy())
    return tensor.pin_memory() if pinned else tensor
