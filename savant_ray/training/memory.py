"""Estimate of a worker's GPU memory: which micro-batch fits under which limit.

Computed, not measured, except for two figures of an H100 (torch 2.11, bf16, 12 sequences of 1,024 tokens, `dim` 1,024, 12
loops without recomputation, chunks of logits smaller than today's): the process held 0.5 to 0.6 GiB outside PyTorch's
allocator, and 8.35 GiB of tensors. Only `docs/generate.py` uses the estimate: training tries, and continues with what fits
(`BatchFit`).
"""

from __future__ import annotations

import math

import torch

from savant_ray.config import Config
from savant_ray.errors import MemoryCapError
from savant_ray.model.loss import gpu_chunk_rows
from savant_ray.model.transformer import ffn_dim, n_parameters
from savant_ray.optim.tree_sum import max_sums
from savant_ray.training.device import GIB, MARGIN_GB
from savant_ray.training.seeds import max_loops
from savant_ray.training.state import BatchFit, is_deterministic, micro_batch_size

OUTSIDE_GB = 0.55  # CUDA context, kernels and workspaces of libraries
BYTES_PER_PARAMETER = 16  # weight and lower half (or fp32 weight) 4, two moments 8, gradient 4
BYTES_PER_BLOCK_WEIGHT = 6  # the block's weights as its products use them, and their gradients in fp32
# For each token, a compiled loop keeps 13 vectors of size `dim` and 3 of size `ffn_dim` for its backward pass (counted in
# its graph).
KEPT_VECTORS = 13
# The estimate multiplies these vectors by a factor for copies to aligned widths, temporaries and rounding of allocations.
# The factor was chosen so that the estimate gave the measured 8.35 GiB.
OVERHEAD = 1.15
BYTES_PER_LOGIT = 6  # of a chunk: fp32, and their gradients in bf16


def estimated_gb(config: Config, fit: BatchFit) -> float:
    """Return the GiB of the tensors of a training step with this choice of micro-batch and recomputation."""
    model, value_bytes = config.model, 2 if config.training.precision == "bf16" else 4
    tokens = fit.rows * model.max_seq_len
    loop = OVERHEAD * tokens * value_bytes * (KEPT_VECTORS * model.dim + 3 * ffn_dim(model))
    inputs = tokens * value_bytes * model.dim
    n_loops = max_loops(config)
    activations = loop + n_loops * inputs if fit.recompute_loops else n_loops * loop
    head = model.vocab_size * model.dim  # as large as the embedding
    average_bytes = 0 if config.training.ema_decay is None else 4
    weights = (BYTES_PER_PARAMETER + average_bytes) * n_parameters(model)
    weights += BYTES_PER_BLOCK_WEIGHT * (n_parameters(model) - 2 * head)
    logits = BYTES_PER_LOGIT * model.vocab_size * gpu_chunk_rows(tokens, model.vocab_size, fit.limit_gb)
    head_gradients = 2 * 4 * head  # fp32, of the loss: once summed over the chunks and once scaled
    return (weights + activations + logits + head_gradients + kept_sums_bytes(config)) / GIB


def kept_sums_bytes(config: Config) -> int:
    """Return the bytes of the sums of gradients that a single worker on a GPU keeps with `training.deterministic`."""
    device = torch.device("cuda")
    if not is_deterministic(config, device):
        return 0
    n_micro_batches = math.ceil(config.training.effective_batch / micro_batch_size(config, device))
    return 4 * n_parameters(config.model) * max_sums(n_micro_batches)


def expected_fit(config: Config) -> BatchFit | None:
    """Return the micro-batch and recomputation that fit under `training.vram_limit_gb`, None if nothing does."""
    fit = BatchFit.from_config(config, torch.device("cuda"))
    while estimated_gb(config, fit) > config.training.vram_limit_gb - OUTSIDE_GB - MARGIN_GB:
        try:
            fit = fit.smaller()
        except MemoryCapError:
            return None
    return fit
