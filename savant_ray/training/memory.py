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
# What other processes hold cannot be told apart without NVML. A context takes about 0.5, NCCL 0.5 to 1.6 (nccl #864, #964).
MOST_OUTSIDE_GB = 2.0


def cap_memory(device: torch.device, limit_gb: float) -> str | None:
    """Limits what this process takes of a GPU to `limit_gb` GiB; call before the first tensor.

    Returns what the user should know (a smaller card, no GPU), or None.
    """
    if device.type != "cuda":
        return f"training.vram_limit_gb = {limit_gb:g} caps GPU memory; on the CPU there is nothing to cap"
    _limit_allocator(device, limit_gb)
    if limit_gb <= (total_gb := _total_gb(device)):
        return None
    return f"training.vram_limit_gb = {limit_gb:g}, but the GPU has {total_gb:.1f} GiB: capped at that"


def cap_memory_again(device: torch.device, limit_gb: float) -> str | None:
    """The same when libraries have taken theirs; what was kept beyond the new limit is given back.

    Returns what the user should know if it had gone beyond, or None.
    """
    if device.type != "cuda":
        return None
    allowed_gb = _limit_allocator(device, limit_gb)
    reserved_gb = torch.cuda.memory_reserved(device) / GIB
    if reserved_gb <= allowed_gb:
        return None
    torch.cuda.empty_cache()
    return (
        f"libraries hold {outside_allocator_gb(device):.1f} GiB of the GPU, so that {allowed_gb:.1f} of "
        f"training.vram_limit_gb = {limit_gb:g} are left for tensors; {reserved_gb:.1f} were held for them"
    )


def _limit_allocator(device: torch.device, limit_gb: float) -> float:
    """Sets what PyTorch's allocator may take; GiB."""
    total_gb = _total_gb(device)
    fraction = allocator_fraction(limit_gb, total_gb, outside_allocator_gb(device))
    torch.cuda.set_per_process_memory_fraction(fraction, device.index)  # of "cuda" without a number: the current one
    return fraction * total_gb


def _total_gb(device: torch.device) -> float:
    return torch.cuda.get_device_properties(device).total_memory / GIB


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
