"""The functions that `make torture` and `make hangs` slow down or block exist, which an attempt shows only after minutes."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from runpy import run_path

import pytest

WINDOWS = run_path(str(Path(__file__).parent / "site/sitecustomize.py"))["WINDOWS"]
PLACES = run_path(str(Path(__file__).parent / "hang_site/sitecustomize.py"))["PLACES"]
FUNCTIONS = sorted(
    {(module, name) for module, windows in WINDOWS.items() for name in windows}
    | {(module, name) for module, name, _ in PLACES.values()}
)


@pytest.mark.parametrize(("module", "name"), FUNCTIONS)
def test_a_function_in_which_runs_are_interrupted_exists(module: str, name: str) -> None:
    assert callable(functools.reduce(getattr, name.split("."), importlib.import_module(module)))
