"""The machine and the model that are measured: a GPU where there is one, and as much model as a CPU can bear.

Peak is the matrix product 2048 x 2048 x 2048 in the same dtype with the same threads, measured beside the rest.
"""

from __future__ import annotations

import torch

from savant_ray.config import ModelConfig
from savant_ray.training.efficiency import matmul_flops_per_second
from savant_ray.training.precision import usable_precision

SIDE = 2048
REPEATS = 5


def benchmark_device() -> torch.device:
    """A GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def benchmark_dtype(device: torch.device) -> torch.dtype:
    """What the device computes `training.precision: bf16` in."""
    return torch.bfloat16 if usable_precision("bf16", device)[0] == "bf16" else torch.float32


def model_config(device: torch.device) -> ModelConfig:
    """The guide's model; on a CPU one of half the width."""
    return ModelConfig() if device.type == "cuda" else ModelConfig(dim=512, n_heads=8)


def peak_flops_per_second(device: torch.device) -> float:
    """What the device reaches in the dtype of the benchmarks."""
    return matmul_flops_per_second(benchmark_dtype(device), device, SIDE, REPEATS)
