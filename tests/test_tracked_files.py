"""Checks and tests look only at files that git tracks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tracked_files import FILES, FOLDERS, ROOT, copy_tracked_files, tracked_files

WORD = "re" + "cieve"  # in two halves, so that this file passes the check itself
BROKEN = f"def {WORD}(:\n"
MISSPELT = f'{{"vocab": {{"{WORD}": 0}}}}\n'
# What people leave in a checkout. Some of it would be an error for each of the checks, or settings for one of them.
LEFT_BEHIND = {
    "checkpoints_quickstart/step_2000/tokenizer.json": MISSPELT,
    "my first run/step_20/tokenizer.json": MISSPELT,
    "tests2/test_broken.py": BROKEN,
    "dataset/mine.txt": MISSPELT,
    "wandb/run-1/files/output.log": MISSPELT,
    "env/lib/python3.11/site-packages/broken.py": BROKEN,
    "env/pyvenv.cfg": "home = /usr/bin\n",
    "analysis.ipynb": BROKEN,
    "scratch.py": BROKEN,
    " -rf.py": BROKEN,
    "-x.py": BROKEN,
    "two\nlines.py": BROKEN,
    "a 'quoted' \"name\".py": BROKEN,
    "codespell.py": BROKEN,
    "ruff.py": BROKEN,
    "configs/mine.yaml": "no: settings\n",
    "jobs/mine.py": BROKEN,
    "jobs/monitoring/mine.yml": "targets: [10.1.2.3]\n",
    "savant_ray/stray.py": BROKEN,
    "savant_ray/model/without_docstring.py": "import savant_ray.cluster\n",
    "savant_ray/old/attention.py": BROKEN,
    "savant_ray_backup/__init__.py": BROKEN,
    "docs/notes.md": MISSPELT,
    "tests/test_stray.py": BROKEN,
    "tests/data/test_stray.py": "def test_that_fails():\n    assert False\n",
    "tests/stray/conftest.py": BROKEN,
    "tests/stray/test_in_a_folder.py": BROKEN,
    "tests/optim/test_stray.py": BROKEN,
    "conftest.py": BROKEN,
    "pytest.ini": "[pytest]\ntestpaths = env\n",
    "ruff.toml": "line-length = 20\n",
    "savant_ray/ruff.toml": "line-length = 20\n",
    "mypy.ini": "[mypy]\nfiles = scratch.py\n",
}


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True)


def leave_behind(checkout: Path) -> None:
    for name, content in LEFT_BEHIND.items():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(content)
    (checkout / ".venv").symlink_to(sys.prefix)
    (checkout / "data").symlink_to("/usr/share")
    (checkout / "dangling.py").symlink_to("nowhere.py")
    Path(os.fsdecode(os.fsencode(checkout) + b"/\xff.py")).write_text(BROKEN)
    (checkout / "events.bin").write_bytes(bytes(range(256)) * 100)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository of the project's files as they are now, full of other files."""
    folder = copy_tracked_files(tmp_path / "somebody's checkout", "*")
    git(folder, "init", "-q")
    git(folder, "add", "--all", "--force")
    leave_behind(folder)
    return folder


def listed(checkout: Path, *patterns: str, **environment: str) -> list[str]:
    command = [sys.executable, "-P", "tests/tracked_files.py", *patterns]
    done = subprocess.run(command, cwd=checkout, env={**os.environ, **environment}, capture_output=True, check=True)
    return done.stdout.decode().split("\0")[:-1]


def own(*patterns: str) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in tracked_files(*patterns)]


def test_files_that_git_does_not_track_are_not_listed(checkout: Path) -> None:
    assert listed(checkout, "*") == own("*")
    assert listed(checkout, "savant_ray/*.py", "jobs/*.py") == own("savant_ray/*.py", "jobs/*.py")


def test_a_deleted_tracked_file_is_not_listed(checkout: Path) -> None:
    (checkout / "jobs/train.py").unlink()
    assert set(own("*")) - set(listed(checkout, "*")) == {"jobs/train.py"}


@pytest.mark.parametrize("why", ["no git", "no repository", "another repository"])
def test_without_git_the_folders_of_the_project_are_listed(why: str, tmp_path: Path) -> None:
    archive = copy_tracked_files(tmp_path / "unpacked", "*")
    (archive / "my run").mkdir()
    (archive / "my run/stray.py").write_text(BROKEN)
    (archive / "jobs/__pycache__").mkdir()
    (archive / "jobs/__pycache__/train.cpython-311.pyc").write_bytes(b"\0")
    if why != "no repository":
        git(tmp_path, "init", "-q")
    found = listed(archive, "*", PATH=str(tmp_path)) if why == "no git" else listed(archive, "*")
    assert found == own("*")


def test_the_folders_listed_without_git_are_those_of_the_repository() -> None:
    tops = {path.relative_to(ROOT).parts[0] for path in tracked_files("*")}
    assert tops == {*FOLDERS, *FILES}


def test_only_tracked_tests_are_run_and_the_others_are_named(checkout: Path) -> None:
    collect = [sys.executable, "-m", "pytest", "-c", "pyproject.toml", "--confcutdir", "tests", "--collect-only"]
    named = "tests/data/test_stray.py"
    done = subprocess.run([*collect, "tests/optim", named], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests/optim/test_stray.py::" not in done.stdout and f"{named}::" in done.stdout, "what is named is run"
    (left_out,) = (line for line in done.stdout.splitlines() if "not run" in line)
    assert left_out == "not run, because git does not track it (git add, or name it): tests/optim/test_stray.py"


@pytest.mark.slow
@pytest.mark.rare
def test_make_check_passes_in_a_checkout_with_untracked_files(checkout: Path) -> None:
    if not (Path(sys.prefix) / ".installed").exists():
        pytest.skip("this environment was not made by `make install`")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    variables |= {"MYPY_CACHE_DIR": str(ROOT / ".mypy_cache")}  # most of the time is reading the types of packages
    command = ["make", "check", f"VENV={sys.prefix}", "-o", f"{sys.prefix}/.installed"]  # never into this environment
    done = subprocess.run(command, cwd=checkout, env=variables, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
