"""The memory cap of a worker, and what it uses.

The cap means what the device reports for this process. PyTorch's fraction limits its allocator only and leaves out the
CUDA context, kernels and library workspaces (pytorch/pytorch#58466), so those are measured and taken off.
"""

from __future__ import annotations

import os
import resource

import psutil
import pynvml
import torch

GIB = 1024**3
MARGIN_GB = 0.1  # for kernels that are loaded later
MOST_OUTSIDE_GB = 1.0  # what other processes hold cannot be told apart without NVML


def cap_memory(device: torch.device, limit_gb: float) -> str | None:
    """Limits what this process takes of a GPU to `limit_gb` GiB.

    Call before the first tensor, and again after the first step, when libraries have taken theirs. Returns what the
    user should know (a smaller card, no GPU), or None.
    """
    if device.type != "cuda":
        return f"training.vram_limit_gb = {limit_gb:g} caps GPU memory; on the CPU there is nothing to cap"
    total_gb = torch.cuda.get_device_properties(device).total_memory / GIB
    fraction = allocator_fraction(limit_gb, total_gb, outside_allocator_gb(device))
    torch.cuda.set_per_process_memory_fraction(fraction, device)
    if limit_gb <= total_gb:
        return None
    return f"training.vram_limit_gb = {limit_gb:g}, but the GPU has {total_gb:.1f} GiB: capped at that"


def allocator_fraction(limit_gb: float, total_gb: float, outside_gb: float) -> float:
    """The share of the device that PyTorch's allocator may take, so that all of the process stays within the limit."""
    return max(0.0, min(limit_gb, total_gb) - outside_gb - MARGIN_GB) / total_gb


def outside_allocator_gb(device: torch.device) -> float:
    """What the process holds on a GPU beside PyTorch's allocator, GiB; by NVML where it is installed and knows."""
    reserved = torch.cuda.memory_reserved(device)
    held = _held_by_process(device)
    if held is not None:
        return max(0.0, (held - reserved) / GIB)
    free, total = torch.cuda.mem_get_info(device)
    return min(MOST_OUTSIDE_GB, max(0.0, (total - free - reserved) / GIB))


def memory_used_gb(device: torch.device) -> float:
    """GiB: on a GPU the most that the process held since the last call, on a CPU its resident size."""
    if device.type != "cuda":
        return psutil.Process().memory_info().rss / GIB
    peak = torch.cuda.max_memory_reserved(device) / GIB + outside_allocator_gb(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def peak_memory_gb(device: torch.device) -> float:
    """GiB: the most that the process's tensors took of a GPU, on a CPU its largest resident size so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def _held_by_process(device: torch.device) -> int | None:
    """Bytes, None where NVML is missing or does not see this process, as in some containers."""
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError:
        return None
    held = {process.pid: process.usedGpuMemory for process in processes}
    return held.get(os.getpid())
