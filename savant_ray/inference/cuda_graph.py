"""A function that is replayed as a CUDA graph (docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs)."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch


class StepGraph:
    """Runs a function eagerly once, captures it as a CUDA graph, and replays the graph from the second call on.

    The function must take no arguments, return None, use the same tensors in each call, and not synchronize with the device.
    On a device without CUDA, and if the capture fails, it runs eagerly each time.

    Attributes:
        captures: whether calls are captured; False without CUDA and after a failed capture.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.captures = device.type == "cuda"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._is_current = False

    def run(self, function: Callable[[], None]) -> None:
        """Run the function once."""
        if self._graph is not None and self._is_current:
            self._graph.replay()
        elif self.captures:
            self._run_and_capture(function)
        else:
            function()

    def invalidate(self) -> None:
        """Capture the function again at the next call; required when it uses other tensors."""
        self._is_current = False  # The old graph stays until then, so that the new one can use its memory.

    def release(self) -> None:
        """Free the graph, and empty the allocator's cache: it would keep the graph's memory, which nothing else can use."""
        if self._graph is not None:
            self._graph = None
            torch.cuda.empty_cache()

    def _run_and_capture(self, function: Callable[[], None]) -> None:
        stream = _capture_stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.stream(stream), _without_deterministic_mode():
                function()  # loads kernels and initializes cuBLAS, which a capture cannot do
                self._capture(function, stream)
        finally:  # also if the function raised an error, because the kernels that it launched before may still run
            torch.cuda.current_stream(self._device).wait_stream(stream)

    def _capture(self, function: Callable[[], None], stream: torch.cuda.Stream) -> None:
        graph = torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle() if self._graph is None else self._graph.pool()
        try:
            # "thread_local": other threads of a worker may copy batches and checkpoints meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                function()
        except RuntimeError as error:  # out of memory, or an operation that cannot be captured
            _close_pool(self._device, pool)
            warnings.warn(f"generating without a CUDA graph, which is slower: {error}", stacklevel=3)
            self.captures = False
        else:
            self._graph, self._is_current = graph, True


@contextmanager
def _without_deterministic_mode() -> Iterator[None]:
    """Select the kernels of a step as if `torch.use_deterministic_algorithms` were off.

    In that mode `scatter_` and `index_copy_` sort their indices first and, in some versions of PyTorch, copy data from the
    host, which a capture cannot do. A step of decoding writes to each element once, so its result is the same.
    """
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("default")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


def _close_pool(device: torch.device, pool: tuple[int, int]) -> None:
    """End a failed capture for the allocator, which otherwise raises an error whenever it has to free memory.

    PyTorch 2.11's `CUDAGraph::capture_end` does this too, but not if the capture is invalid: it raises an error earlier.
    """
    with suppress(RuntimeError):  # raised if the capture has already been ended for the allocator
        torch._C._cuda_endAllocateToPool(device.index or 0, pool)
        torch._C._cuda_releasePool(device.index or 0, pool)


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return one stream for all captures, because cuBLAS keeps a workspace of 32 MiB for each stream that it has run on."""
    return torch.cuda.Stream(device)
