"""What a model's training takes at least, and what the machine could do at most: the share of peak (MFU).

Useful are the floating-point operations of the matrix products without padding, recomputation and invisible keys (PaLM,
arXiv 2204.02311, appendix B). Peak is a large matrix product in the dtype of training, with the same threads, measured
where training runs: after the first step and at each validation, because other processes may disturb one measurement; the
best counts, and a step that is faster than it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from savant_ray.config import ModelConfig
from savant_ray.model.transformer import ffn_width
from savant_ray.training.precision import Precision

SIDES = (256, 1024, 4096)  # of the matrices: as large as the device multiplies in a moment
A_MOMENT = 0.1  # seconds
REPEATS = 3


class Peak:
    """FLOP/s of the fastest matrix product so far on this device; 0 before the first measurement."""

    def __init__(self, precision: Precision, device: torch.device) -> None:
        self._dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        self._device = device
        self.flops_per_second = 0.0

    def measure(self) -> None:
        """Measure again and keep the higher value; a CPU without bf16 instructions takes seconds for large matrices."""
        for side in SIDES:
            if 2 * side**3 > A_MOMENT * self.flops_per_second > 0:
                break
            measured = matmul_flops_per_second(self._dtype, self._device, side, REPEATS)
            self.flops_per_second = max(self.flops_per_second, measured)

    def share(self, flops: float, seconds: float) -> float | None:
        """The part of the peak that `flops` in `seconds` are, at most 1; None if either was not measured.

        A step faster than the peak shows that other processes disturbed its measurement: the peak is raised to the step's
        speed.
        """
        if not flops or not self.flops_per_second:
            return None
        speed = flops / seconds
        self.flops_per_second = max(self.flops_per_second, speed)
        return speed / self.flops_per_second


def matmul_flops_per_second(dtype: torch.dtype, device: torch.device, side: int, repeats: int) -> float:
    """Of the fastest of a few products of square matrices, the first one being there to warm up."""
    generator = torch.Generator(device).manual_seed(0)  # the global one is left alone
    a, b = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(1 + repeats):
        synchronize(device)
        started = time.perf_counter()
        a @ b
        synchronize(device)
        best = max(best, 2 * side**3 / (time.perf_counter() - started))
    return best


def useful_flops(config: ModelConfig, document_lengths: Sequence[int] | np.ndarray) -> float:
    """Of the matrix products of a forward and backward pass over documents of so many tokens.

    A product's backward pass takes twice its forward pass.
    """
    lengths = np.asarray(document_lengths, dtype=np.int64)
    dim, loops = config.dim, config.n_loops
    n_global = loops // config.global_every
    weights = 6 * dim**2 + 3 * dim * ffn_width(config)
    keys = n_global * visible_pairs(lengths, lengths)
    keys += (loops - n_global) * visible_pairs(lengths, config.window_size)
    forward = 2 * int(lengths.sum()) * (loops * weights + dim * config.vocab_size) + 4 * dim * keys
    return 3.0 * forward


def visible_pairs(lengths: np.ndarray | int, window_size: np.ndarray | int) -> int:
    """(query, key) pairs of the documents, each query seeing itself and up to `window_size` tokens back."""
    reach = np.minimum(window_size, lengths)
    return int(np.sum(lengths * (reach + 1) - reach * (reach + 1) // 2))


def document_lengths(document_ids_BT: np.ndarray) -> np.ndarray:
    """Tokens of each document of packed sequences, padding (-1) left out."""
    starts = np.ones(document_ids_BT.shape, dtype=bool)
    starts[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    first = np.flatnonzero(starts)
    lengths = np.diff(first, append=starts.size)
    return lengths[document_ids_BT.ravel()[first] >= 0]


def synchronize(device: torch.device) -> None:
    """Waits for a GPU, so that its time is booked where it was spent."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
