"""A CUDA graph in the imagination of a CPU: records the operators of a step, and replays them on the same memory.

As in a CUDA graph, Python does not run again, numbers of the host are those of the recording, and results are written to
where they were. So a step that reads a position or a shape from the host gives wrong tokens here, too. A step that waits
for the device is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}


class RecordedGraph:
    """Stands in for `StepGraph` on a CPU."""

    n_recorded = n_replayed = 0

    def __init__(self, device: torch.device) -> None:
        self.captures = True
        self._recorder: Recorder | None = None

    def run(self, function: Callable[[], None]) -> None:
        if self._recorder is not None:
            self._recorder.replay()
            RecordedGraph.n_replayed += 1
            return
        self._recorder = Recorder()
        with self._recorder:
            function()
        RecordedGraph.n_recorded += 1

    def invalidate(self) -> None:
        self._recorder = None

    def release(self) -> None:
        self._recorder = None


class Recorder(TorchDispatchMode):
    """Runs operators and keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert operator not in WAITS, f"{operator} waits for the device"
        result = operator(*args, **(kwargs or {}))
        self._calls.append((operator, args, kwargs or {}, result))
        return result

    @torch.autocast("cpu", enabled=False)  # the operators that autocast added are among the recorded ones
    def replay(self) -> None:
        for operator, args, kwargs, recorded in self._calls:
            if operator.is_view:
                continue  # the recorded tensor shares the memory
            result = operator(*args, **kwargs)
            for old, new in zip(tree_leaves(recorded), tree_leaves(result), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
