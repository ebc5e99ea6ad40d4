"""Collects the project's own tests only: what git does not track is left out, unless it is named."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.tracked_files import ROOT, is_tracked, tracked_files

pytest_plugins = ["tests.storage.fixtures"]  # tests of several folders use an object store

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads cost tiny models more than they save; PyTorch reads it once
# Under nohup SIGHUP is ignored, and in a shell's background SIGINT; the programs that tests start would inherit that.
for number, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

hypothesis.settings.register_profile("without a time limit", deadline=None)
hypothesis.settings.load_profile("without a time limit")


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name bytes by their length: compressed ones may contain the time, so that processes would collect other tests."""
    return f"{len(val)} bytes" if isinstance(val, bytes) and len(val) >= 20 else None


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    named = named_paths(config)
    if collection_path in named:
        return None
    if collection_path.is_dir():
        inside = any(collection_path in path.parents for path in (*tracked_files("*"), *named))
        return None if inside else True
    return True if collection_path.suffix == ".py" and not is_tracked(collection_path) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the files with slow tests first, so that two processes have shorter ones left to share at the end."""
    slow_files = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow_files)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for path in untracked_tests(named_paths(config)):
        terminalreporter.line(f"not run, because git does not track it (git add, or name it): {path.relative_to(ROOT)}")


def named_paths(config: pytest.Config) -> set[Path]:
    """The files and folders of the command line, or all tests."""
    return {(config.invocation_params.dir / argument.partition("::")[0]).resolve() for argument in config.args}


def untracked_tests(named: set[Path]) -> Iterator[Path]:
    """Yields the test files in the named folders that are neither tracked nor named themselves."""
    for folder in sorted(path for path in named if path.is_dir()):
        for path in sorted(folder.rglob("test_*.py")):
            if path not in named and not is_tracked(path):
                yield path
