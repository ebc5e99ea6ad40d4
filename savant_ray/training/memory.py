"""The memory cap of a worker, and what it uses."""

from __future__ import annotations

import psutil
import torch

GIB = 1024**3


def cap_memory(device: torch.device, limit_gb: float) -> str | None:
    """Limits this process's CUDA allocations to `limit_gb` GiB; call before the first of them.

    Returns what the user should know (a smaller card, no GPU), or None.
    """
    if device.type != "cuda":
        return f"training.vram_limit_gb = {limit_gb:g} caps GPU memory; on the CPU there is nothing to cap"
    total_gb = torch.cuda.get_device_properties(device).total_memory / GIB
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit_gb / total_gb), device)
    if limit_gb <= total_gb:
        return None
    return f"training.vram_limit_gb = {limit_gb:g}, but the GPU has {total_gb:.1f} GiB: capped at that"


def memory_used_gb(device: torch.device) -> float:
    """GiB: the peak since the last call on a GPU, the resident size of the process on a CPU."""
    if device.type != "cuda":
        return psutil.Process().memory_info().rss / GIB
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak / GIB
