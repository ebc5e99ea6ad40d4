"""Copies of the training state in host memory: one to write a checkpoint from, one to measure how many weights change."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from savant_ray.training.device import retry_on_oom
from savant_ray.training.state import TrainingState


class HostCopy:
    """A reusable copy of the checkpoint in host memory, 12 bytes a weight (8 for the matrices of Muon).

    An average of the weights (`training.ema_decay`) takes 4 bytes more. Allocating memory takes longer than copying into it,
    so each copy overwrites the one before.
    """

    def __init__(self) -> None:
        self._content: dict[str, Any] = {}
        self._allocation: threading.Thread | None = None

    def allocate(self, state: TrainingState) -> None:
        """Allocate the memory in a background thread, so that the first `update` takes no longer than later ones."""
        shapes = {name: torch.empty(p.shape, device="meta") for name, p in state.model.named_parameters()}
        layout = _layout(state.to_checkpoint(shapes))
        pin_memory = state.device.type == "cuda"
        self._allocation = threading.Thread(
            target=self._allocate, args=(layout, pin_memory), name="allocate-host-copy", daemon=True
        )
        self._allocation.start()

    def _allocate(self, layout: Any, pin_memory: bool) -> None:
        self._content = _allocated(layout, pin_memory)

    def update(self, state: TrainingState) -> dict[str, Any]:
        """Copy the state as it is now and return it as `TrainingState.to_checkpoint` does.

        Later steps do not change the copy; the next `update` overwrites it. bf16 weights are joined with their lower
        halves one tensor at a time, so the device needs 4 bytes for each element of the largest weight.

        Raises:
            DeviceMemoryError: the device has no memory for that.
        """
        if self._allocation is not None:
            self._allocation.join()
        self._content = retry_on_oom(
            lambda: self._copy(state), state.device, f"copying step {state.step:,} for its checkpoint"
        )
        return self._content

    def _copy(self, state: TrainingState) -> dict[str, Any]:
        content = _copied(state.to_checkpoint({}), self._content)
        buffers = self._content.get("model_state_dict", {})
        weights = {
            name: _copied(state.optimizer.master(p), buffers.get(name)) for name, p in state.model.named_parameters()
        }
        return {**content, "model_state_dict": weights}


class WeightChanges:
    """Measures the fraction of fp32 weights that change between two calls; keeps 4 bytes a weight in host memory."""

    def __init__(self) -> None:
        self._weights: dict[str, Tensor] = {}

    def measure(self, state: TrainingState) -> float | None:
        """Return the fraction of weights that changed since the last call, or None at the first call.

        Rows that have never had a gradient, such as embeddings of unused tokens, are left out.
        """
        n_changed = total = 0
        for name, parameter in state.model.named_parameters():
            weight = state.optimizer.master(parameter).cpu()
            rows = state.optimizer.had_gradient(parameter).cpu()
            if name in self._weights:
                n_changed += int((weight != self._weights[name]).reshape(len(weight), -1)[rows].sum())
                total += int(rows.sum()) * (weight.numel() // len(weight))
            self._weights[name] = weight.clone()
        return n_changed / total if total else None


def _copied(value: Any, buffer: Any) -> Any:
    """Copy tensors to host memory, into the tensors of `buffer` where shape and dtype match."""
    if isinstance(value, Tensor):
        if not isinstance(buffer, Tensor) or buffer.shape != value.shape or buffer.dtype != value.dtype:
            buffer = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return buffer.copy_(value)
    if isinstance(value, dict):
        buffers = buffer if isinstance(buffer, dict) else {}
        return {key: _copied(item, buffers.get(key)) for key, item in value.items()}
    return [_copied(item, None) for item in value] if isinstance(value, list) else value


def _layout(value: Any) -> Any:
    """Return the dicts of a checkpoint with meta tensors in place of its tensors and None in place of other values."""
    if isinstance(value, dict):
        return {key: _layout(item) for key, item in value.items()}
    return value.to("meta") if isinstance(value, Tensor) else None


def _allocated(layout: Any, pin_memory: bool) -> Any:
    """Allocate host memory for a layout and write to each page, so that the operating system provides it now."""
    if isinstance(layout, dict):
        return {key: _allocated(item, pin_memory) for key, item in layout.items()}
    if not isinstance(layout, Tensor):
        return None
    # Not `empty_like`: for a meta tensor it imports SymPy, which takes a second of CPU time (torch 2.13).
    buffer = torch.empty(layout.shape, dtype=layout.dtype, pin_memory=pin_memory)
    buffer.numpy().fill(0)  # one thread; PyTorch's `fill_` would use those of training, too
    return buffer
