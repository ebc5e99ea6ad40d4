"""Collects the project's own tests only: what git does not track is left out, unless it is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tracked_files import ROOT, is_tracked, tracked_files

LEFT_OUT = pytest.StashKey[list[Path]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEFT_OUT] = []


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    named = {(config.invocation_params.dir / argument.partition("::")[0]).resolve() for argument in config.args}
    if collection_path in named:
        return None
    if collection_path.is_dir():
        inside = any(collection_path in path.parents for path in (*tracked_files("*"), *named))
        return None if inside else True
    if collection_path.suffix != ".py" or is_tracked(collection_path):
        return None
    if collection_path.name.startswith("test_") and named & set(collection_path.parents):
        config.stash[LEFT_OUT].append(collection_path)
    return True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for path in config.stash[LEFT_OUT]:
        terminalreporter.line(f"not run, because git does not track it (git add, or name it): {path.relative_to(ROOT)}")
