"""The project's own files: those that git tracks, even if the checkout has other files.

`python tests/tracked_files.py PATTERN…` prints their relative paths, each followed by a NUL, for `xargs -0`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The content of a source archive, which has no git metadata. Generated files in these folders are left out.
FOLDERS = (".ci", "configs", "docs", "jobs", "savant_ray", "tests")
FILES = (
    ".gitignore",
    ".pre-commit-config.yaml",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "environment.yml",
    "mkdocs.yml",
    "pyproject.toml",
    "requirements-extras.txt",
    "setup.py",
    "requirements.txt",
)


def tracked_files(*patterns: str) -> list[Path]:
    """Return the absolute paths of the project's files that match one of the patterns, sorted.

    A pattern is matched against the whole path from the root, and `*` matches `/` as well: `savant_ray/*.py` is every
    module of the package. A tracked file that was deleted is left out. Without git, or in a copy that git does not
    track, the files in the project's own folders are returned.
    """
    names = _tracked() or _in_own_folders()
    return [ROOT / name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def copy_tracked_files(target: Path, *patterns: str) -> Path:
    """Copy the files that match, with their folders, as `tracked_files` finds them; return `target`."""
    for path in tracked_files(*patterns):
        copy = target / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
    return target


@cache
def is_tracked(path: Path) -> bool:
    """Whether a file is one of the project's own."""
    return path in _all_files()


@cache
def _all_files() -> frozenset[Path]:
    return frozenset(tracked_files("*"))


@cache
def _tracked() -> tuple[str, ...]:
    """Relative paths that git tracks; empty if there is no git or it tracks nothing here."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):  # not installed; no repository, or one that another user owns
        return ()
    names = {os.fsdecode(name) for name in listed.split(b"\0") if name}
    if "tests/tracked_files.py" not in names:  # unpacked somewhere in another project's repository
        return ()
    return tuple(sorted(name for name in names if (ROOT / name).is_file()))


@cache
def _in_own_folders() -> tuple[str, ...]:
    found = [name for name in FILES if (ROOT / name).is_file()]
    for folder in FOLDERS:
        found += _below(ROOT / folder)
    return tuple(sorted(found))


def _below(folder: Path) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__pycache__"))]
        yield from (str((Path(parent) / name).relative_to(ROOT)) for name in files if not name.endswith(".pyc"))


def main() -> None:
    """Print the files that match the patterns on the command line."""
    for path in tracked_files(*sys.argv[1:]):
        sys.stdout.buffer.write(os.fsencode(path.relative_to(ROOT)) + b"\0")


if __name__ == "__main__":
    main()
