"""Reads a rank's local batch of each step onto its device."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import torch
from torch import Tensor

from savant_ray.config import Config
from savant_ray.data.stream import BYTES_PER_TOKEN, StepStream
from savant_ray.errors import error_context
from savant_ray.training.device import raise_memory_cap_error_on_oom
from savant_ray.training.progress import PROGRESS, SLOW
from savant_ray.training.state import TrainingState, micro_batch_size
from savant_ray.training.step import MicroBatch, micro_batches


def local_batches(stream: StepStream, state: TrainingState, config: Config) -> BatchReader:
    """Start reading a rank's sequences from `state.position` on, without `state.left_out`.

    Raises:
        MemoryCapError: the device has no memory for those of a step.
    """
    plan = replace(stream.plan, left_out=state.left_out)
    rows = micro_batch_size(config, state.device) if state.settings.deterministic else 1
    stream = replace(stream, plan=plan, micro_batch_rows=rows)
    n_steps = config.training.max_steps - state.step
    with raise_memory_cap_error_on_oom(config.training.vram_limit_gb):
        return BatchReader(stream, state.position, n_steps, config, state.device)


class BatchReader:
    """Iterable over this rank's local batches; it can be iterated once.

    A local batch is the list of a step's micro-batches of this rank, with tensors on `device`. With
    `training.deterministic` the stream gives each rank whole micro-batches.

    - Order: exactly one local batch per step, in the stream's order; it is empty for a rank without sequences.
    - Source: the stream reads in the background from construction on, one portion ahead (`data/stream.py`).
    - Prefetch depth: on a CPU none. A local batch is built when it is requested, because training uses the cores. On
      CUDA one local batch: while a step runs, a thread builds the next one and copies it to the device.
    - Memory: on CUDA two local batches in pinned host memory and two on the device, allocated at construction. No step
      can run out of device memory for its input.
    - Overlap: each buffer is filled on a CUDA stream of its own, because a new thread's current stream is the default
      stream, on which the step runs. An event makes the step's stream wait for the copy. Another event makes the copy
      wait until the step that used the buffer before has finished.
    - Lifetime: on CUDA the tensors of a local batch are overwritten after the next one has been requested.
    - Errors are raised where the local batch would have been returned. Closing or dropping the iterator closes the
      stream and does not wait for the thread.
    """

    def __init__(
        self, stream: StepStream, start_position: int, n_steps: int, config: Config, device: torch.device
    ) -> None:
        self._steps = stream.steps(start_position, n_steps)
        self._device = device
        self._in_micro_batches = functools.partial(
            micro_batches, config=config, size=micro_batch_size(config, device), first_index=stream.first_micro_batch
        )
        shape = (stream.sequences_per_step, config.model.max_seq_len)
        needs_copies = device.type == "cuda" and stream.sequences_per_step > 0
        self._buffers = [_Buffer(shape, device) for _ in range(2)] if needs_copies else []

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        local_batches = self._prefetched(*self._buffers) if self._buffers else self._on_request()
        with closing(local_batches):
            for limit_factor in itertools.chain([SLOW] * 2, itertools.repeat(1.0)):  # Ray Data's read task has to start
                PROGRESS.begin("waiting for the sequences of a step", limit_factor)
                local_batch = next(local_batches, None)
                PROGRESS.begin("computing")
                if local_batch is None:
                    return
                yield local_batch

    def _on_request(self) -> Generator[list[MicroBatch], None, None]:
        with closing(self._steps):
            while (local_batch := self._next()) is not None:
                yield local_batch

    def _prefetched(self, buffer: _Buffer, other: _Buffer) -> Generator[list[MicroBatch], None, None]:
        # Without a current device in the thread, CUDA would create a context on GPU 0.
        set_device = functools.partial(torch.cuda.set_device, self._device)
        executor = ThreadPoolExecutor(1, thread_name_prefix="prefetch", initializer=set_device)
        try:
            pending = executor.submit(self._next, buffer)
            while (local_batch := pending.result()) is not None:
                other.release()
                pending = executor.submit(self._next, other)
                buffer.acquire()
                yield local_batch
                buffer, other = other, buffer
        finally:
            executor.submit(self._steps.close)
            executor.shutdown(wait=False)

    def _next(self, buffer: _Buffer | None = None) -> list[MicroBatch] | None:
        """Return the next local batch in host memory, or copied to the device by `buffer`; None after the last one."""
        with error_context("reading the next step's sequences"):
            step = next(self._steps, None)
            if step is None:
                return None
            local_batch = self._in_micro_batches(step.sequences, step.positions)
        return local_batch if buffer is None else buffer.copy(local_batch)


class _Buffer:
    """Pinned host memory and device memory for the tensors of one local batch, which one copy moves to the device.

    Both have `BYTES_PER_TOKEN` for each of N x T tokens: all tokens, then all document ids, then the loss mask.
    """

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        n_bytes = shape[0] * shape[1] * BYTES_PER_TOKEN
        self._host = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
        self._on_device = torch.empty(n_bytes, dtype=torch.uint8, device=device)
        self._shape = shape
        self._copy_stream = torch.cuda.Stream(device)
        self._on_device.record_stream(self._copy_stream)  # freed memory is not reused before a pending copy is done
        self._copied, self._released = torch.cuda.Event(), torch.cuda.Event()
        self.release()  # the memory may have belonged to a tensor that the current stream still uses

    def copy(self, local_batch: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Start copying a local batch and return it with tensors on the device; called in the prefetching thread."""
        self._copied.synchronize()  # the host memory is free once its last copy is done
        tokens_NT, document_ids_NT, is_trained_NT = tensors_in(self._host, self._shape)
        torch.cat([batch.tokens_BT for batch in local_batch], out=tokens_NT)
        torch.cat([batch.document_ids_BT for batch in local_batch], out=document_ids_NT)
        torch.cat([batch.is_trained_BT for batch in local_batch], out=is_trained_NT)
        with torch.cuda.stream(self._copy_stream):
            self._copy_stream.wait_event(self._released)
            self._on_device.copy_(self._host, non_blocking=True)
            self._copied.record(self._copy_stream)
        sizes = [len(batch.positions) for batch in local_batch]
        parts = zip(*(tensor.split(sizes) for tensor in tensors_in(self._on_device, self._shape)), strict=True)
        return [
            replace(batch, tokens_BT=tokens, document_ids_BT=ids, is_trained_BT=is_trained)
            for batch, (tokens, ids, is_trained) in zip(local_batch, parts, strict=True)
        ]

    def acquire(self) -> None:
        """Make the current stream wait for the copy."""
        torch.cuda.current_stream(self._on_device.device).wait_event(self._copied)

    def release(self) -> None:
        """Let the next copy overwrite the device memory once the work queued on the current stream is done."""
        self._released.record(torch.cuda.current_stream(self._on_device.device))


def tensors_in(buffer: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return views `[N, T]` of a buffer of `BYTES_PER_TOKEN` per token: tokens, document ids, loss mask."""
    n_tokens = shape[0] * shape[1]
    integers_2NT = buffer[: 8 * n_tokens].view(torch.int32).view(2, *shape)
    return integers_2NT[0], integers_2NT[1], buffer[8 * n_tokens :].view(torch.bool).view(shape)
