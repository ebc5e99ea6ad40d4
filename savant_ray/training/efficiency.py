"""Model FLOPs utilization (MFU): the useful FLOPs of training relative to the speed of a large matrix product.

The useful operations are those of the matrix products without padding, recomputation and masked keys (PaLM, arXiv
2204.02311, appendix B). The peak is the fastest of several large matrix products in the dtype of training with the same
number of threads, measured in the training process after the first step and at each validation. Other processes may disturb
one measurement, so the fastest one counts, and a training step that is faster raises the peak to its own speed.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from savant_ray.config import ModelConfig
from savant_ray.model.transformer import ffn_dim
from savant_ray.training.device import Precision, none_on_oom

SIDES = (256, 1024, 2048, 4096, 8192)  # of the matrices; a GPU reaches its peak with the largest ones only
MAX_SECONDS = 0.1  # a size whose product would take longer is not measured
ROUNDS = 3
PRODUCTS_IN_FLIGHT = 10  # that a GPU gets at a time, so that the time of launching them is not measured


class Peak:
    """FLOP/s of the fastest matrix product or training step so far on the device; 0 before the first measurement."""

    def __init__(self, precision: Precision, device: torch.device) -> None:
        self._dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        self._device = device
        self.flops_per_second = 0.0

    def measure(self, max_seconds: float = MAX_SECONDS) -> None:
        """Measure again and keep the higher value; sizes whose product would take longer than `max_seconds` are left out.

        Sizes that do not fit into memory are left out as well; the largest takes 0.5 GiB in bf16.
        """
        for side in SIDES:
            if self.flops_per_second and 2 * side**3 / self.flops_per_second > max_seconds:
                break
            measured = none_on_oom(
                functools.partial(matmul_flops_per_second, self._dtype, self._device, side), self._device
            )
            if measured is None:
                break
            self.flops_per_second = max(self.flops_per_second, measured)

    def utilization(self, flops: float, seconds: float) -> float | None:
        """Return the speed `flops / seconds` as a fraction of the peak, at most 1; None if either is unknown.

        A step faster than the peak shows that other processes disturbed its measurement: the peak is raised to the step's
        speed.
        """
        if not flops or not self.flops_per_second:
            return None
        speed = flops / seconds
        self.flops_per_second = max(self.flops_per_second, speed)
        return speed / self.flops_per_second


def matmul_flops_per_second(dtype: torch.dtype, device: torch.device, side: int) -> float:
    """Return FLOP/s of square matrix products: the fastest of `ROUNDS` and one before them, which also warms up.

    A CPU computes one product in a round. A GPU gets `PRODUCTS_IN_FLIGHT` at a time and is timed by its own events.
    """
    generator = torch.Generator(device).manual_seed(0)  # does not advance the global generator
    a, b = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    seconds = _seconds_on_gpu if device.type == "cuda" else _seconds_on_cpu
    return 2 * side**3 / min(seconds(functools.partial(torch.mm, a, b, out=product)) for _ in range(1 + ROUNDS))


def _seconds_on_cpu(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _seconds_on_gpu(function: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(PRODUCTS_IN_FLIGHT):
        function()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000 / PRODUCTS_IN_FLIGHT


def useful_flops(config: ModelConfig, document_lengths: Sequence[int] | np.ndarray, masked_tokens: int = 0) -> float:
    """Return the FLOPs of the matrix products of a forward and backward pass over documents of these token counts.

    `masked_tokens` of them are not predicted, so the head is not useful for them. The backward pass of a product takes
    twice the FLOPs of its forward pass.
    """
    lengths = np.asarray(document_lengths, dtype=np.int64)
    dim, loops = config.dim, config.n_loops
    n_global = loops // config.global_every
    weights = 6 * dim**2 + 3 * dim * ffn_dim(config)
    pairs = n_global * visible_pairs(lengths, lengths)
    pairs += (loops - n_global) * visible_pairs(lengths, config.window_size)
    tokens = int(lengths.sum())
    forward = 2 * (tokens * loops * weights + (tokens - masked_tokens) * dim * config.vocab_size) + 4 * dim * pairs
    return 3.0 * forward


def visible_pairs(lengths: np.ndarray | int, window_size: np.ndarray | int) -> int:
    """Return the number of (query, key) pairs; a query sees itself and up to `window_size` tokens before it."""
    reach = np.minimum(window_size, lengths)
    return int(np.sum(lengths * (reach + 1) - reach * (reach + 1) // 2))


def document_lengths(document_ids_BT: np.ndarray) -> np.ndarray:
    """Return the token count of each document of packed sequences, without padding (-1)."""
    starts = np.ones(document_ids_BT.shape, dtype=bool)
    starts[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    first = np.flatnonzero(starts)
    lengths = np.diff(first, append=starts.size)
    return lengths[document_ids_BT.ravel()[first] >= 0]
