"""Profile of some training steps (`training.profile`): a trace of their operations and, on CUDA, of the GPU's memory.

Each profiled rank writes its own files, which the host stores in the folder `profile` of the run. An error in the profiler
is reported in a notice and does not end the run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from savant_ray.config import ProfileConfig, TrainingConfig
from savant_ray.errors import MemoryCapError
from savant_ray.events import Event, Notice
from savant_ray.locations import error_text
from savant_ray.training.device import DeviceMemoryError, is_out_of_memory
from savant_ray.training.progress import PROGRESS, SLOW
from savant_ray.training.state import TrainingState

FOLDER = "profile"  # in the run folder
TRACE = ".pt.trace.json.gz"  # the suffix that TensorBoard's plugin for profiles looks for
MEMORY_EVENTS = 100_000  # newest allocations and frees in a memory snapshot; kept in host memory


def region(name: str) -> AbstractContextManager[object]:
    """Return a context manager that marks a part of a step in the trace; outside of a trace it does nothing."""
    return record_function(name) if torch._C._autograd._profiler_enabled() else nullcontext()


class ProfileHost(Protocol):
    """The part of a `Host` that a profiler uses."""

    rank: int

    def emit(self, event: Event) -> None:
        """Send an event to the driver."""

    def store_file(self, file: Path, name: str) -> str:
        """Store a file as `name` in the run folder and return where it is."""


class StepProfiler:
    """Context manager around the steps of an attempt; does nothing if this rank is not profiled.

    The trace begins before the first profiled step waits for its data and ends after the last profiled step, or at the end
    of the attempt if that comes first. If an attempt resumes after the first of these steps, it profiles the remaining
    ones. On CUDA, allocations are recorded from the beginning of the attempt until the trace is written, and a snapshot of
    them is written together with it. If the attempt ends earlier because the device runs out of memory, the snapshot is
    written then.
    """

    def __init__(self, settings: TrainingConfig, state: TrainingState, host: ProfileHost) -> None:
        self._steps = range(0)  # steps that are still to be profiled
        self._device, self._host = state.device, host
        self._trace: profile | None = None
        self._first = 0  # first step of the trace
        self._current = self._done = 0  # the step that has begun and the newest finished one
        self._records_memory = False
        if settings.profile is not None and (settings.profile.ranks == "all" or host.rank == 0):
            self._choose_steps(settings.profile, state.step + 1, settings.max_steps)

    def _choose_steps(self, profile: ProfileConfig, first: int, last: int) -> None:
        """Choose the steps of the profile that are among those of this attempt, from `first` to `last`."""
        requested = range(profile.first_step, profile.first_step + profile.steps)
        self._steps = range(max(requested.start, first), min(requested.stop, last + 1))
        if not self._steps and first <= last:
            self._notify(
                f"training.profile: this attempt takes {_steps_text(first, last)} and not "
                f"{_steps_text(requested.start, requested[-1])}, so nothing is profiled"
            )

    def __enter__(self) -> Self:
        if self._steps and self._device.type == "cuda":
            self._report_errors(self._record_memory)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None and not isinstance(error, Exception):
            return  # a second signal: exit immediately
        if self._trace is not None:
            self._report_errors(self._finish)
        elif self._records_memory and _is_memory_error(error):
            self._report_errors(self._write_memory, "out-of-memory")
        if self._records_memory:
            self._report_errors(self._stop_recording_memory)

    def before_step(self, step: int) -> None:
        """Start the trace if `step`, the next one, is the first that is profiled.

        After a rewind to an earlier step, a trace that has begun is discarded and starts again with the repeated step.
        """
        self._current = step
        if self._trace is not None and step <= self._first:
            self._report_errors(self._discard)
        if self._trace is None and step in self._steps:
            self._first = step
            self._report_errors(self._start)

    def after_step(self, step: int) -> None:
        """Write the trace if `step` was the last that is profiled."""
        self._done = step
        if self._trace is not None and step >= self._steps[-1]:
            self._report_errors(self._finish)

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        trace = profile(activities=activities, record_shapes=True, acc_events=True)
        trace.start()
        self._trace = trace

    def _discard(self) -> None:
        trace, self._trace = self._trace, None
        if trace is not None:
            trace.stop()

    def _finish(self) -> None:
        trace, self._trace = self._trace, None
        self._steps = range(0)
        if trace is None:
            return
        PROGRESS.begin("writing the profile", SLOW)
        trace.stop()
        written = self._write(TRACE, trace.export_chrome_trace)
        steps = _steps_text(self._first, self._done)
        self._notify(f"the profile of {steps} is in {written}; open it at ui.perfetto.dev or with TensorBoard")
        if self._records_memory:
            self._write_memory("memory")
            self._stop_recording_memory()

    def _record_memory(self) -> None:
        torch.cuda.memory._record_memory_history("all", stacks="python", max_entries=MEMORY_EVENTS)
        self._records_memory = True

    def _write_memory(self, name: str) -> None:
        written = self._write(f"-{name}.pickle", torch.cuda.memory._dump_snapshot)
        self._notify(
            f"the use of GPU memory up to step {self._current:,} is in {written}; open it at pytorch.org/memory_viz"
        )

    def _stop_recording_memory(self) -> None:
        self._records_memory = False
        torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, suffix: str, export: Callable[[str], None]) -> str:
        """Store what `export` writes in the run folder and return where it is."""
        name = f"rank{self._host.rank}-step{self._first or self._current}{suffix}"
        with tempfile.TemporaryDirectory(prefix="savant-profile-") as folder:
            export(str(Path(folder, name)))
            return self._host.store_file(Path(folder, name), f"{FOLDER}/{name}")

    def _report_errors(self, function: Callable[..., None], *arguments: str) -> None:
        """Call `function`; if it fails, emit a notice and end profiling."""
        try:
            function(*arguments)
        except Exception as error:
            self._trace, self._steps = None, range(0)
            self._notify(f"profiling failed: {error_text(error)}; training continues without it")
            if self._records_memory:
                self._report_errors(self._stop_recording_memory)

    def _notify(self, text: str) -> None:
        self._host.emit(Notice(text=f"rank {self._host.rank}: {text}"))


def _steps_text(first: int, last: int) -> str:
    return f"steps {first:,} to {last:,}" if last > first else f"step {first:,}"


def _is_memory_error(error: BaseException | None) -> bool:
    return isinstance(error, MemoryCapError | DeviceMemoryError) or is_out_of_memory(error)
