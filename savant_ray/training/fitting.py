"""How much of a step goes through the device at once, and what gives way when that does not fit under the cap.

Under a cap, first each loop is recomputed in the backward pass instead of kept (arXiv 1604.06174); then micro-batches are
halved, down to one sequence. The step begins anew with the same sequences, so that effective batch and order stay what
they are. A CPU begins with few sequences at once: they are as fast as many, and hold far less memory.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from savant_ray.config import Config
from savant_ray.errors import MemoryCapError, SavantError

FAILED_ALLOCATION = re.compile(  # libraries that allocate beside PyTorch report it as any other error
    r"CUDA error: out of memory"
    r"|Triton Error \[CUDA\]: out of memory"
    r"|CUBLAS_STATUS_ALLOC_FAILED"
    r"|CUDNN_STATUS_ALLOC_FAILED"
    r"|Cuda failure (\d+ )?'out of memory'"  # NCCL's last error
)
Result = TypeVar("Result")
CPU_STREAM_ELEMENTS = 1 << 19  # tokens x dim at once; more was not faster at widths of 128 to 512 (docs/LOG.md)


@dataclass(frozen=True)
class Fit:
    """What is tried, and what it was found for."""

    device: str  # "cpu" or "cuda"
    limit_gb: float
    batch_size: int
    may_recompute: bool
    rows: int  # sequences of a micro-batch at most
    recompute_loops: bool

    @classmethod
    def of(cls, config: Config, device: torch.device) -> Fit:
        """What the settings ask for, on a CPU with no more at once than is of use."""
        settings, rows = config.training, config.training.batch_size
        if device.type == "cpu":
            rows = min(rows, max(1, CPU_STREAM_ELEMENTS // (config.model.max_seq_len * config.model.dim)))
        return cls(
            device=device.type,
            limit_gb=settings.vram_limit_gb,
            batch_size=settings.batch_size,
            may_recompute=settings.recompute_loops is not False,
            rows=rows,
            recompute_loops=settings.recompute_loops is True,
        )

    def smaller(self) -> Fit:
        """What needs less memory.

        Raises:
            MemoryCapError: nothing does.
        """
        if self.may_recompute and not self.recompute_loops:
            return dataclasses.replace(self, recompute_loops=True)
        if self.rows == 1:
            raise MemoryCapError(
                f"not even one sequence fits under training.vram_limit_gb = {self.limit_gb:g}; raise it, or lower "
                "model.max_seq_len, model.dim or model.vocab_size"
                + ("" if self.recompute_loops else "; or let training.recompute_loops be auto")
            )
        return dataclasses.replace(self, rows=(self.rows + 1) // 2)

    def to_record(self) -> dict[str, Any]:
        """For a checkpoint."""
        return dataclasses.asdict(self)

    def remembered(self, record: dict[str, Any] | None) -> Fit:
        """What a checkpoint's run had found, if it was found for the same settings."""
        found = Fit(**record) if record else self
        asked = ("device", "limit_gb", "batch_size", "may_recompute")
        if any(getattr(found, name) != getattr(self, name) for name in asked):
            return self
        return dataclasses.replace(found, recompute_loops=found.recompute_loops or self.recompute_loops)

    def __str__(self) -> str:
        loops = "loops recomputed in the backward pass" if self.recompute_loops else "loops kept for the backward pass"
        return f"micro-batches of {self.rows}, {loops}"


class DeviceMemoryError(RuntimeError):
    """Work beside the training steps ran out of device memory.

    No `SavantError`: it does not mean that the model is too large, so the worker fails as for any other reason and is
    restarted (`scaling.max_failures`).
    """


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether the device had no room for something; the compiler wraps what its kernels run into."""
    if error is None or isinstance(error, SavantError | DeviceMemoryError):
        return False
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if isinstance(error, RuntimeError) and FAILED_ALLOCATION.search(str(error)):
        return True
    return is_out_of_memory(getattr(error, "inner_exception", None)) or is_out_of_memory(error.__cause__)


def none_on_oom(act: Callable[[], Result], device: torch.device) -> Result | None:
    """Return `act()`, or None if the device ran out of memory; cached blocks are freed then."""
    try:
        return act()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    if device.type == "cuda":  # out of the `except`, whose traceback holds the tensors
        torch.cuda.empty_cache()
    return None


def skip_on_oom(
    act: Callable[[], Result], device: torch.device, work: str, notify: Callable[[str], None]
) -> Result | None:
    """Return `act()`, or None if the device ran out of memory, and notify the user that `work` is skipped.

    For figures that training does not depend on.
    """
    result = none_on_oom(lambda: (act(),), device)  # in a tuple, since `act` may return None
    if result is None:
        notify(f"{work} was skipped: the device ran out of memory")
        return None
    return result[0]


def retry_on_oom(act: Callable[[], Result], device: torch.device, work: str) -> Result:
    """Return `act()`; if the device runs out of memory, free cached blocks and call it once more.

    Raises:
        DeviceMemoryError: the second call ran out of memory as well; `work` says what was being done.
    """
    result = none_on_oom(act, device)
    if result is not None:
        return result
    try:
        return act()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise DeviceMemoryError(
            f"{work} ran out of device memory twice, the second time after cached blocks were freed; raise "
            "training.vram_limit_gb if the device has more, or stop what else runs on it"
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
            f"the model with its gradients and moments does not fit under training.vram_limit_gb = {limit_gb:g}; raise it, "
            f"or lower model.dim or model.vocab_size ({str(error).strip().partition(chr(10))[0]})"
        ) from error
