"""Makes a training process hang on request, at a chosen place.

Python imports this file at startup if its folder is on PYTHONPATH. With HANGS=FOLDER, a process that reaches a place of
`PLACES` and finds the file FOLDER/<rank>-<place> there removes it and hangs.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import time
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any


def sleep() -> None:
    time.sleep(100_000)


def hold_the_interpreter_lock() -> None:
    ctypes.PyDLL(None).sleep(100_000)  # unlike a CDLL, it does not release the lock


def read_a_pipe_that_nobody_writes() -> None:
    path = Path(os.environ["HANGS"], f"pipe-{os.getpid()}")
    os.mkfifo(path)
    path.read_bytes()


# place -> module, function, how it hangs
PLACES: dict[str, tuple[str, str, Callable[[], None]]] = {
    "start": ("savant_ray.worker.training_function", "run_storage", sleep),
    "compute": ("savant_ray.worker.host", "RayHost.grace_left", sleep),
    "lock": ("savant_ray.worker.host", "RayHost.grace_left", hold_the_interpreter_lock),
    "read": ("savant_ray.worker.batch_reader", "BatchReader._next", read_a_pipe_that_nobody_writes),
    "validate": ("savant_ray.worker.host", "RayHost.validate", sleep),
    "update": ("savant_ray.training.step", "update", sleep),
}


def hangs_on_request(function: Callable[..., Any], places: dict[str, Callable[[], None]]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        for place, hang in places.items():
            request = Path(os.environ["HANGS"], f"{os.environ.get('RANK')}-{place}")
            if request.exists():
                request.unlink()
                hang()
        return function(*args, **kwargs)

    return wrapped


def wrap(module: ModuleType) -> None:
    paths = {path for name, path, _ in PLACES.values() if name == module.__name__}
    for path in paths:
        *owners, function = path.split(".")
        owner = functools.reduce(getattr, owners, module)
        places = {place: hang for place, (name, p, hang) in PLACES.items() if (name, p) == (module.__name__, path)}
        setattr(owner, function, hangs_on_request(getattr(owner, function), places))


class HangingLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        wrap(module)


class Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if any(name == place[0] for place in PLACES.values()) else None
        if spec is not None and spec.loader is not None:
            spec.loader = HangingLoader(spec.loader)
        return spec


if "HANGS" in os.environ:
    sys.meta_path.insert(0, Finder())
