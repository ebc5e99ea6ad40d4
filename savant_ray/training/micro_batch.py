"""Sequences that go through the device together.

Shapes: B sequences, T time, N sequences of a rank's share.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from savant_ray.config import Config
from savant_ray.data.token_cache import Sequences
from savant_ray.training.efficiency import document_lengths, useful_flops


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
        """The same micro-batch on `device`; the copy from pinned memory to a GPU is asynchronous."""
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


def _copy(array: np.ndarray, pinned: bool) -> Tensor:
    tensor = torch.from_numpy(array.copy())
    return tensor.pin_memory() if pinned else tensor
