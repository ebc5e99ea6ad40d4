"""Comparison of weights and optimizer state between ranks.

All ranks apply the same update to the same weights, so they have the same bits. A difference is a fault: of memory, of a
processor, or of a transfer.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from savant_ray.training.reduction import SEGMENT, gather, n_ranks
from savant_ray.training.state import TrainingState

INTEGERS = {2: torch.int16, 4: torch.int32}  # by the size of an element in bytes
MODULUS = (1 << 61) - 1


class RanksDifferError(RuntimeError):
    """Ranks have different weights or optimizer state.

    It is not a `SavantError`, which would end the run: all workers are restarted from the newest checkpoint
    (`scaling.max_failures`).
    """


def raise_if_ranks_differ(state: TrainingState) -> None:
    """Compare the weights and the optimizer state of all ranks. Collective.

    Raises:
        RanksDifferError: they are not the same (raised on all ranks); the message names the ranks that differ from most.
    """
    if n_ranks() == 1:
        return
    checksums = [row[0] for row in gather([checksum(state)], state.device)]
    if len(set(checksums)) == 1:
        return
    raise RanksDifferError(
        f"{differing(checksums)} different weights or optimizer state after step {state.step:,}: an error of memory, a "
        "processor or a transfer, or workers on different processors (training.compare_ranks_every: 0 accepts these)"
    )


def differing(checksums: list[int]) -> str:
    """Return subject and verb of a sentence about the ranks that differ from the majority; about all if there is none."""
    (common, count), *others = Counter(checksums).most_common()
    has_majority = not others or count > others[0][1]
    ranks = [str(rank) for rank, value in enumerate(checksums) if not has_majority or value != common]
    if not has_majority:
        return f"ranks {' and '.join(ranks)} have"
    return f"rank {ranks[0]} has" if len(ranks) == 1 else f"ranks {', '.join(ranks)} have"


def checksum(state: TrainingState) -> int:
    """Return a number of 61 bits that changes if one bit of the weights, their average or the optimizer's state changes."""
    result = 0
    for value in torch.stack([_sum_as_integers(tensor) for tensor in state.tensors()]).tolist():
        result = (result * 31 + value) % MODULUS
    return result


def _sum_as_integers(tensor: Tensor) -> Tensor:
    """Return the sum of the elements, read as integers: 0-d, 64 bits.

    It is computed in parts, because `sum` first copies int16 and int32 tensors to int64.
    """
    parts = tensor.view(INTEGERS[tensor.element_size()]).flatten().split(SEGMENT)
    return torch.stack([part.sum() for part in parts]).sum()
