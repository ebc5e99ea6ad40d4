"""The device that trains: number formats, compilation, the memory cap, and out-of-memory errors.

`training.precision`:

    bf16        bf16 weights (the optimizer keeps their lower halves) and bf16 activations
    bf16-mixed  fp32 weights and residual stream, bf16 matrix products
    fp32        fp32 throughout

`training.vram_limit_gb` caps what the device reports for this process. PyTorch's memory fraction limits its allocator only
and leaves out the CUDA context, kernels and library workspaces (pytorch/pytorch#58466), so those are measured and
subtracted.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import platform
import re
import resource
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pynvml
import torch

from savant_ray.config import AUTO
from savant_ray.errors import MemoryCapError, SavantError
from savant_ray.model.flex import MAX_COMPILED_SHAPES, has_bf16_instructions, has_python_headers, has_triton
from savant_ray.model.transformer import UniversalTransformer

Precision = str  # "bf16" | "bf16-mixed" | "fp32", checked by savant_ray.config
Result = TypeVar("Result")

GIB = 1024**3
# Micro-batches that a GPU has in its queue at most: one that it computes, and others so that it never waits for the host.
MAX_IN_FLIGHT = 3
MARGIN_GB = 0.1  # GiB, for kernels that are loaded later
# Without NVML the memory of other processes cannot be separated from this one's, so the estimate is limited to what a
# CUDA context (about 0.5 GiB) and NCCL (0.5 to 1.6 GiB, nccl #864 and #964) take.
MAX_OUTSIDE_GB = 2.0
KEPT_FREED_BYTES = 2**30
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # parameters of mallopt in glibc's malloc.h
HEAP_BYTES = 2**26  # glibc's size of a heap; Ray Train trains in a thread, which has heaps of its own
MAX_MMAP_THRESHOLD = 2**25  # bytes; glibc raises the threshold to it by itself, unless another parameter is set
NO_KERNELS = "no kernel image is available"  # of CUDA's message: this PyTorch was not built for this GPU
OUT_OF_MEMORY_MESSAGES = re.compile(  # libraries that allocate without PyTorch raise a plain RuntimeError
    r"CUDA (driver )?error: out of memory"  # of the driver: when Inductor loads a kernel
    r"|Triton Error \[CUDA\]: out of memory"
    r"|CUBLAS_STATUS_ALLOC_FAILED"
    r"|CUBLAS_STATUS_NOT_INITIALIZED when calling `?cublas(Lt)?Create"  # which allocates the library's workspace
    r"|CUDNN_STATUS_ALLOC_FAILED"
    r"|Cuda failure (\d+ )?'out of memory'"  # NCCL's "last error"
)


def supported_precision(precision: Precision, device: torch.device) -> tuple[Precision, str | None]:
    """Return `precision`, or fp32 on a CPU without bf16 instructions, and a note for the user or None.

    PyTorch emulates bf16 products there at 1/100 of the speed of fp32 (measured on an AVX2 processor: 0.2 to 0.8
    against 54 to 78 GFLOP/s). Checkpoints hold fp32 weights in each precision, so a run can move between machines.
    """
    if precision == "fp32" or device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return precision, None
    return "fp32", f"this CPU has no bf16 instructions: training.precision = {precision} computes in fp32"


def use_deterministic_kernels() -> None:
    """Select GPU kernels that give the same bits each time; call it before the first matrix product on a GPU.

    Operators without such a kernel, none of which is in a training step, print a warning.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is initialized
    torch.use_deterministic_algorithms(True, warn_only=True)
    # True by default, which is another pass over each new tensor, to find code that reads memory before writing it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # Compile backward passes in the thread that compiles the forward pass. By default they are compiled when they first
    # run, for a GPU in a thread of autograd. From torch 2.13 on, settings of the compiler belong to a thread, so in that one
    # it would choose kernels by timing them.
    compiler_settings: Any = importlib.import_module("torch._functorch.config")
    compiler_settings.force_non_lazy_backward_lowering = True


def set_threads(setting: int | str, of_checkpoint: int | None) -> str | None:
    """Set the number of CPU threads to `scaling.threads_per_worker`; return a note for the user or None.

    `of_checkpoint` is the number of threads that computed the checkpoint of a deterministic run, else None.
    """
    cores = torch.get_num_threads()  # set by Ray (OMP_NUM_THREADS)
    threads = min(cores, of_checkpoint or cores) if setting == AUTO else int(setting)
    torch.set_num_threads(threads)
    if setting != AUTO or of_checkpoint in (None, cores):
        return None
    if threads < cores:
        return (
            f"each worker uses {threads} of its {cores} cores, as for the checkpoint, because rounding may depend on the "
            f"number of threads; scaling.threads_per_worker: {cores} uses all"
        )
    return (
        f"each worker has {cores} cores, and the checkpoint was computed with {of_checkpoint} threads per worker: the "
        f"rounding of the following steps may differ; scaling.threads_per_worker: {of_checkpoint} avoids that, but is slow"
    )


def processor_name() -> str:
    """Return the model of this machine's processor, and the vector instructions that PyTorch uses on it."""
    lines: list[str] = []
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(models, '') or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def weights_dtype(precision: Precision) -> torch.dtype:
    """Return the dtype of the model's parameters."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """Return the context manager for a forward pass.

    The cache of autocast is off: each weight is cast once anyway (`RecurrentBlock.prepare_weights`), and PyTorch does not
    support the cache in CUDA graphs (`torch.cuda.make_graphed_callables` raises an error), as generation uses them.
    """
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its queue, so that its time is measured in the phase that caused it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class LaunchQueue:
    """The work of a step that has been launched on a device, and how much of it is finished.

    A GPU computes after the call that launches the work has returned; a CPU has finished when the call returns. A short
    queue has two purposes: a stop waits only for few launches, and the time that the finished work took predicts the time
    that the rest will take.
    """

    def __init__(self, device: torch.device) -> None:
        self.finished = 0
        self._device = device
        self._unfinished: deque[torch.cuda.Event] = deque()

    def wait_for_room(self) -> None:
        """Wait until fewer than `MAX_IN_FLIGHT` launches are unfinished."""
        while len(self._unfinished) >= MAX_IN_FLIGHT:
            self._unfinished.popleft().synchronize()
            self.finished += 1

    def add(self) -> None:
        """Count what has been launched since the last call as one launch."""
        if self._device.type != "cuda":
            self.finished += 1
            return
        event = torch.cuda.Event(blocking=True)  # waits without using a processor
        event.record(torch.cuda.current_stream(self._device))
        self._unfinished.append(event)


def compile_block(
    model: UniversalTransformer, setting: bool | str, device: torch.device, precision: Precision
) -> str | None:
    """Compile the recurrent block as `training.compile` says; return a note for the user or None.

    "auto" compiles if a C++ compiler and the headers of Python are installed and, for a GPU, a Triton that supports it; but
    not in fp32 on a CPU, where compiling takes half a minute and gains 0 to 4 % (docs/LOG.md), nor in bf16 on a GPU without
    bf16 instructions, where PyTorch's compiler raises an error. Each input shape gets its own graph (`dynamic=False`), so
    that a run and its resumption run the same kernels.
    """
    if not wants_compiled(setting, device, precision):
        return None
    missing = missing_compiler()
    if missing is None and device.type == "cuda" and not has_triton(device):
        missing = "Triton for this GPU"
    if missing and setting == "auto":
        return f"{missing} not found: training runs uncompiled (slower, same results up to rounding)"
    if setting == "auto" and device.type == "cuda" and precision != "fp32" and not has_bf16_instructions(device):
        return (
            "this GPU has no bf16 instructions (they need compute capability 8.0): PyTorch emulates them, and training runs "
            "uncompiled; training.precision: fp32 is compiled"
        )
    torch._dynamo.config.recompile_limit = MAX_COMPILED_SHAPES
    model.recurrent_block.compile(dynamic=False)
    return "compiling the model: the first step takes up to a minute longer"


def wants_compiled(setting: bool | str, device: torch.device, precision: Precision) -> bool:
    """Return whether `training.compile` asks for a compiled block; whether a compiler is installed is not checked."""
    return setting is True or (setting == "auto" and not (device.type == "cpu" and precision == "fp32"))


def runs_compiled(model: UniversalTransformer, device: torch.device) -> bool:
    """Return whether a loop may run code from `torch.compile`: a compiled block, or on a GPU compiled attention."""
    return model.recurrent_block._compiled_call_impl is not None or device.type != "cpu"


def missing_compiler() -> str | None:
    """Return what `torch.compile` needs and this machine lacks, with the name of its package, or None."""
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        return "g++"
    return None if has_python_headers() else "Python.h (package python3-dev)"


def prepare_device(device: torch.device, limit_gb: float, is_deterministic: bool) -> str | None:
    """Prepare a process for training steps: its memory and, for deterministic steps on a GPU, its kernels.

    Call it before the first tensor is allocated. Returns a note for the user, as `cap_memory`, or None.
    """
    if device.type == "cuda" and is_deterministic:
        use_deterministic_kernels()
    keep_freed_memory(device)
    return cap_memory(device, limit_gb)


def refuse_gpu_without_kernels(device: torch.device) -> None:
    """Check that PyTorch can run a kernel on the device.

    Raises:
        SavantError: this PyTorch was not built for this GPU; it may be too old or too new.
    """
    try:
        torch.ones(1, device=device)
    except RuntimeError as error:
        if NO_KERNELS not in str(error):
            raise
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        raise SavantError(
            f"PyTorch {torch.__version__} was not built for {torch.cuda.get_device_name(device)} (compute capability "
            f"{capability}); install a build of it for another version of CUDA (pytorch.org, Get Started), or train on the "
            "CPU (scaling.use_gpu: false)"
        ) from error


def cap_memory(device: torch.device, limit_gb: float) -> str | None:
    """Limit the GPU memory of this process to `limit_gb` GiB; call it before the first tensor is allocated.

    Returns:
        A note for the user (the GPU is smaller than the limit, or there is no GPU), or None.
    """
    if device.type != "cuda":
        return f"training.vram_limit_gb = {limit_gb:g} caps GPU memory; it has no effect on a CPU"
    _limit_allocator(device, limit_gb)
    if limit_gb <= (total_gb := _total_gb(device)):
        return None
    return f"training.vram_limit_gb = {limit_gb:g}, but the GPU has {total_gb:.1f} GiB: capped at that"


def keep_freed_memory(device: torch.device) -> None:
    """Let glibc keep the memory that a step on a CPU frees for the next step.

    Otherwise it may return the memory to the system after each step, depending on the order in which tensors are freed.
    Getting it back causes thousands of page faults, 4 % of a step at dim 128. The peak of the memory is the same. Has no
    effect on a GPU and with other C libraries.
    """
    if device.type == "cpu":
        with suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            libc.mallopt(M_TRIM_THRESHOLD, KEPT_FREED_BYTES)
            libc.mallopt(M_TOP_PAD, HEAP_BYTES)
            libc.mallopt(M_MMAP_THRESHOLD, MAX_MMAP_THRESHOLD)


def update_memory_cap(device: torch.device, limit_gb: float) -> str | None:
    """Recompute the allocator's limit after libraries have allocated memory; free cached blocks beyond it.

    Returns:
        A note for the user if the allocator held more than the new limit, or None.
    """
    if device.type != "cuda":
        return None
    allowed_gb = _limit_allocator(device, limit_gb)
    reserved_gb = torch.cuda.memory_reserved(device) / GIB
    if reserved_gb <= allowed_gb:
        return None
    torch.cuda.empty_cache()
    return (
        f"libraries hold {outside_allocator_gb(device):.1f} GiB of the GPU, which leaves {allowed_gb:.1f} of "
        f"training.vram_limit_gb = {limit_gb:g} for tensors; {reserved_gb:.1f} GiB had been reserved for them"
    )


def _limit_allocator(device: torch.device, limit_gb: float) -> float:
    """Set the limit of PyTorch's allocator and return it in GiB."""
    total_gb = _total_gb(device)
    fraction = allocator_fraction(limit_gb, total_gb, outside_allocator_gb(device))
    torch.cuda.set_per_process_memory_fraction(fraction, device.index)  # an index of None is the current device
    return fraction * total_gb


def _total_gb(device: torch.device) -> float:
    return torch.cuda.get_device_properties(device).total_memory / GIB


def allocator_fraction(limit_gb: float, total_gb: float, outside_gb: float) -> float:
    """Return the fraction of the device that the allocator may take so that the process stays within the limit."""
    return max(0.0, min(limit_gb, total_gb) - outside_gb - MARGIN_GB) / total_gb


def outside_allocator_gb(device: torch.device) -> float:
    """Return the GPU memory of this process outside PyTorch's allocator in GiB, from NVML if it is available."""
    reserved = torch.cuda.memory_reserved(device)
    held = _held_by_process(device)
    if held is not None:
        return max(0.0, (held - reserved) / GIB)
    free, total = torch.cuda.mem_get_info(device)
    return min(MAX_OUTSIDE_GB, max(0.0, (total - free - reserved) / GIB))


def memory_used_gb(device: torch.device) -> float:
    """Return GiB: on a GPU the peak of this process since the last call, on a CPU its resident size."""
    if device.type != "cuda":
        return psutil.Process().memory_info().rss / GIB
    peak = torch.cuda.max_memory_reserved(device) / GIB + outside_allocator_gb(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def peak_memory_gb(device: torch.device) -> float:
    """Return GiB: on a GPU the peak of allocated tensors, on a CPU the peak resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    with suppress(OSError):  # Linux: `ru_maxrss` begins with that of the parent process, which may have been larger
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        if (peak := re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)) is not None:
            return int(peak[1]) * 1024 / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def _held_by_process(device: torch.device) -> int | None:
    """Return bytes, or None if NVML is missing or does not list this process, as in some containers."""
    try:
        _initialize_nvml()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError:
        _initialize_nvml.cache_clear()
        return None
    held = {process.pid: process.usedGpuMemory for process in processes}
    return held.get(os.getpid())


@functools.cache  # once per process
def _initialize_nvml() -> None:
    pynvml.nvmlInit()


class DeviceMemoryError(RuntimeError):
    """Work outside the training steps ran out of device memory.

    It is no `SavantError`: it does not show that the model is too large, so the worker fails as for any other reason and
    is restarted (`scaling.max_failures`).
    """


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an allocation on the device failed; the compiler wraps the errors of its kernels in its own."""
    if error is None or isinstance(error, SavantError | DeviceMemoryError):
        return False
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if isinstance(error, RuntimeError) and OUT_OF_MEMORY_MESSAGES.search(str(error)):
        return True
    return is_out_of_memory(getattr(error, "inner_exception", None)) or is_out_of_memory(error.__cause__)


def none_on_oom(function: Callable[[], Result], device: torch.device) -> Result | None:
    """Return `function()`; if the device runs out of memory, free cached blocks and return None."""
    try:
        return function()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    if device.type == "cuda":  # outside of the `except` block, whose traceback references the tensors
        torch.cuda.empty_cache()
    return None


def skip_on_oom(
    function: Callable[[], Result], device: torch.device, work: str, notify: Callable[[str], None]
) -> Result | None:
    """Return `function()`; if the device runs out of memory, notify the user that `work` was skipped and return None.

    For figures that training does not depend on.
    """
    result = none_on_oom(lambda: (function(),), device)  # in a tuple, since `function` may return None
    if result is None:
        notify(f"{work} was skipped: the device ran out of memory")
        return None
    return result[0]


def retry_on_oom(function: Callable[[], Result], device: torch.device, work: str) -> Result:
    """Return `function()`; if the device runs out of memory, free cached blocks and call it once more.

    Raises:
        DeviceMemoryError: the second call ran out of memory as well; `work` says what was being done.
    """
    result = none_on_oom(function, device)
    if result is not None:
        return result
    try:
        return function()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise DeviceMemoryError(
            f"{work} ran out of device memory twice, the second time after cached blocks were freed; raise "
            "training.vram_limit_gb if the device has more, or stop other programs that use it"
        ) from error


@contextmanager
def raise_memory_cap_error_on_oom(limit_gb: float) -> Iterator[None]:
    """Turn out-of-memory errors into an error that ends the run.

    For the model, its gradients and its optimizer state only: they need the same memory at each attempt.

    Raises:
        MemoryCapError: the device ran out of memory.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryCapError(
            f"the model with its gradients and optimizer state does not fit under training.vram_limit_gb = {limit_gb:g}; "
            f"raise it, or lower model.dim or model.vocab_size ({str(error).strip().partition(chr(10))[0]})"
        ) from error
