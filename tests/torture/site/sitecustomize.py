"""Slows down the windows of a run and publishes which ones a process is in, so that each can be hit by an interruption.

A window is a phase of training. Python imports this file at startup if its folder is on PYTHONPATH. With
TORTURE_WINDOWS=FOLDER, each process that trains writes the names of its current windows into FOLDER/<pid>.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

SECONDS = 0.15  # sleep in each window, at its beginning, or at its end if it is in `AT_THE_END`
# module -> function -> window
WINDOWS = {
    "savant_ray.training.step": {
        "accumulate": "accumulation",
        "accumulate_in_tree": "accumulation",  # with training.deterministic
        "update": "update",
    },
    "savant_ray.evaluation.validator": {"Validator._validate": "validation", "Validator._sample": "generation"},
    "savant_ray.training.host_copies": {"HostCopy.update": "save"},
    "savant_ray.training.checkpoint": {"_write_files": "background write"},
    "savant_ray.storage.protocol": {"write_checkpoint": "handover"},
}
AT_THE_END = ("save", "background write", "handover")


class Windows:
    """The windows that this process is in; there can be several, because checkpoints are written during training."""

    def __init__(self, folder: Path) -> None:
        self._file, self._open, self._lock = folder / str(os.getpid()), [], threading.Lock()

    def enter(self, name: str) -> None:
        with self._lock:
            self._open.append(name)
            self._write()

    def leave(self, name: str) -> None:
        with self._lock:
            self._open.remove(name)
            self._write()

    def _write(self) -> None:
        temporary = self._file.with_name(f".{self._file.name}")
        temporary.write_text("\n".join(self._open))
        temporary.replace(self._file)


def in_window(name: str, function: Callable[..., Any], windows: Windows) -> Callable[..., Any]:
    @functools.wraps(function)
    def slowed(*args: Any, **kwargs: Any) -> Any:
        windows.enter(name)
        try:
            if name not in AT_THE_END:
                time.sleep(SECONDS)
            result = function(*args, **kwargs)
            if name in AT_THE_END:
                time.sleep(SECONDS)
            return result
        finally:
            windows.leave(name)

    return slowed


def slow_down(module: ModuleType, windows: Windows) -> None:
    for path, window in WINDOWS[module.__name__].items():
        *owners, name = path.split(".")
        owner = functools.reduce(getattr, owners, module)
        setattr(owner, name, in_window(window, getattr(owner, name), windows))


class SlowLoader(Loader):
    def __init__(self, loader: Loader, windows: Windows) -> None:
        self._loader, self._windows = loader, windows

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        slow_down(module, self._windows)


class Finder(MetaPathFinder):
    def __init__(self, windows: Windows) -> None:
        self._windows = windows

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name in WINDOWS else None
        if spec is not None and spec.loader is not None:
            spec.loader = SlowLoader(spec.loader, self._windows)
        return spec


if "TORTURE_WINDOWS" in os.environ:
    sys.meta_path.insert(0, Finder(Windows(Path(os.environ["TORTURE_WINDOWS"]))))
