"""The wheel, installed in an environment of its own and used in a folder without the checkout."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.cluster.conftest import environment, losses
from tests.tracked_files import copy_tracked_files, tracked_files

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the tracked files, so that nothing else gets into it."""
    source = copy_tracked_files(tmp_path_factory.mktemp("checkout"), "*")
    built = tmp_path_factory.mktemp("dist")
    pip_wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    done = subprocess.run(
        [*pip_wheel, "-w", built, source], env=outside_of_the_checkout(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = built.iterdir()
    return file


@pytest.fixture(scope="module")
def savant(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel in a new environment, which finds its dependencies in that of the tests."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip = [sys.executable, "-m", "pip", "--python", folder, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(pip, env=outside_of_the_checkout(), check=True)
    packages = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    return folder / "bin/savant"


def outside_of_the_checkout() -> dict[str, str]:
    """Return the environment of a user who has no checkout."""
    variables = environment()
    return {name: value for name, value in variables.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def run(program: Path, *arguments: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [program, *arguments]
    return subprocess.run(
        command, cwd=folder, env=outside_of_the_checkout() | variables, capture_output=True, text=True, timeout=280
    )


def test_the_wheel_has_the_whole_package_with_the_shipped_settings_and_nothing_else(wheel: Path) -> None:
    expected = {str(path.relative_to(ROOT)) for path in tracked_files("savant_ray/*")}
    expected |= {f"savant_ray/{path.relative_to(ROOT)}" for path in tracked_files("configs/*.yaml")}
    content = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert content == expected


@pytest.mark.skipif(find_spec("twine") is None, reason="twine is not installed (make extras)")
def test_a_package_index_accepts_the_wheel(wheel: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "twine", "check", "--strict", wheel], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_commands_work_in_an_empty_folder(savant: Path, tmp_path: Path) -> None:
    shown = run(savant, "config", "--config", "quickstart", folder=tmp_path)
    assert shown.returncode == 0 and "name: checkpoints_quickstart" in shown.stdout, shown.stderr
    where = run(savant.with_name("python"), "-c", "import savant_ray; print(savant_ray.__file__)", folder=tmp_path)
    assert where.stdout.startswith(str(savant.parents[1])), "it is not the checkout that is tried"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.rare
def test_the_quickstart_trains_in_an_empty_folder_and_says_what_to_try_next(savant: Path, tmp_path: Path) -> None:
    few_steps = {
        "SAVANT_TRAINING__MAX_STEPS": "3",
        "SAVANT_VALIDATION__BATCHES": "1",
        "SAVANT_VALIDATION__LOGIC_PROBLEMS": "0",
    }
    done = run(savant, "quickstart", folder=tmp_path, **few_steps)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(losses(tmp_path / "checkpoints_quickstart")) == 3 and done.stderr == ""
    assert "savant evaluate checkpoints_quickstart" in done.stdout.partition("To try next:")[2]

    again = run(savant, "quickstart", folder=tmp_path, **few_steps)
    assert again.returncode == 0 and "has done its 3 steps" in again.stdout
    answer = run(
        savant, "generate", "--checkpoint", "checkpoints_quickstart", "--prompt", "Question: ", folder=tmp_path
    )
    assert answer.returncode == 0 and answer.stdout.startswith("Question: "), answer.stderr
