"""Versions are pinned in one place, and without a GPU `make install` installs torch without CUDA packages."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from urllib.parse import quote

import pytest
import setuptools
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.tracked_files import tracked_files

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
IMPORT_NAMES = {"pyyaml": "yaml", "jinja2": "jinja2", "nvidia-ml-py": "pynvml"}


def parsed(lines: list[str]) -> list[Requirement]:
    return [Requirement(text) for line in lines if (text := line.partition("#")[0].strip())]


PINS = parsed((ROOT / "requirements.txt").read_text().splitlines())
EXTRA_PINS = parsed((ROOT / "requirements-extras.txt").read_text().splitlines())
RANGES = parsed(
    PROJECT["project"]["dependencies"]
    + PROJECT["project"]["optional-dependencies"]["test"]
    + PROJECT["project"]["optional-dependencies"]["check"]
    + PROJECT["project"]["optional-dependencies"]["docs"]
    + PROJECT["project"]["optional-dependencies"]["mlflow"]
    + PROJECT["build-system"]["requires"]
)


# --- versions


def test_every_requirement_is_pinned_once_to_one_version():
    names = [canonicalize_name(pin.name) for pin in PINS]
    assert len(names) == len(set(names))
    assert [str(pin) for pin in PINS if not re.fullmatch(r"==[\w.]+", str(pin.specifier))] == []


def test_pins_and_ranges_name_the_same_packages_and_agree():
    pins = {canonicalize_name(pin.name): pin for pin in PINS}
    assert set(pins) == {canonicalize_name(r.name) for r in RANGES}
    for wanted in RANGES:
        pin = pins[canonicalize_name(wanted.name)]
        assert wanted.specifier.contains(str(pin.specifier).removeprefix("==")), f"{pin} is outside {wanted}"
        assert wanted.extras == pin.extras, f"{pin} and {wanted} name different extras"


def test_optional_packages_are_pinned_within_their_ranges_and_only_once():
    pins = {canonicalize_name(pin.name): pin for pin in EXTRA_PINS}
    assert len(pins) == len(EXTRA_PINS) and not set(pins) & {canonicalize_name(pin.name) for pin in PINS}
    assert [str(pin) for pin in EXTRA_PINS if not re.fullmatch(r"==[\w.]+", str(pin.specifier))] == []
    for wanted in parsed([text for texts in PROJECT["project"]["optional-dependencies"].values() for text in texts]):
        pin = pins.get(canonicalize_name(wanted.name))
        assert pin is None or wanted.specifier.contains(str(pin.specifier).removeprefix("==")), (
            f"{pin} is outside {wanted}"
        )


def test_the_documentation_gives_a_reason_for_every_requirement() -> None:
    page = (ROOT / "docs/reference/packages.md").read_text()
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    named = [canonicalize_name(name) for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert sorted(named) == sorted(canonicalize_name(pin.name) for pin in PINS)


def test_no_other_file_pins_a_version():
    others = ["environment.yml", "pyproject.toml", "Makefile", ".ci/run", "README.md", "CONTRIBUTING.md", "mkdocs.yml"]
    for name in others:
        assert re.findall(r"[\w\]-]+==\d[\w.+]*", (ROOT / name).read_text()) == [], name


def test_the_conda_environment_installs_the_pins_and_the_project():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, from_pip = environment["dependencies"]
    assert from_pip["pip"] == ["-r requirements.txt", "-e ."]
    python = next(item.removeprefix("python=") for item in conda if item.startswith("python="))
    assert python in SpecifierSet(PROJECT["project"]["requires-python"]) and "pip" in conda


def test_this_environment_has_the_pinned_versions():
    for pin in PINS:
        installed = importlib.metadata.version(pin.name).split("+")[0]
        assert pin.specifier.contains(installed), f"{pin.name} {installed} is installed; requirements.txt has {pin}"


def test_every_third_party_import_is_a_requirement():
    known = {IMPORT_NAMES.get(canonicalize_name(pin.name), pin.name) for pin in PINS}
    known |= {pin.name for pin in EXTRA_PINS}
    known |= {"savant_ray", "mlflow", "wandb", *sys.stdlib_module_names}
    known |= {"tests", "docs", "invalid_lines"}
    known |= {"prometheus_client", "werkzeug"}  # which come with ray[default] and Flask
    for path in tracked_files("savant_ray/*.py", "jobs/*.py", "tests/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                assert name.split(".")[0] in known, f"{path.relative_to(ROOT)} imports {name}"


def test_the_project_names_its_command_its_packages_and_its_licence():
    assert PROJECT["project"]["scripts"] == {"savant": "savant_ray.cli:main"}
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    folders = {path.parent for path in tracked_files("savant_ray/*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


# --- make

TORCH = next(pin for pin in PINS if pin.name == "torch")
VERSION = str(TORCH.specifier).removeprefix("==")
PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "savant-ray"
version = "0"
[tool.setuptools]
packages = []
"""


class Machine:
    """A folder with the Makefile and torch as its only requirement, and a package index of empty wheels."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copy(ROOT / "Makefile", folder)
        (folder / "requirements.txt").write_text(f"{TORCH}\n")
        (folder / "pyproject.toml").write_text(PYPROJECT)
        self.tools, modules = folder / "tools", folder / "modules"
        self.tools.mkdir()
        modules.mkdir()
        (modules / "setuptools").symlink_to(Path(setuptools.__file__).parent)
        self.has_gpu(False)
        self.index("default", **{VERSION: "nvidia-cublas"})
        foreign = ("PIP_", "MAKE", "MFLAGS", "VENV", "PYTHON", "TORCH_INDEX", "ARGS", "CONFIG")
        self.variables = {name: value for name, value in os.environ.items() if not name.startswith(foreign)} | {
            "PATH": f"{self.tools}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(modules),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_INDEX_URL": (folder / "default").as_uri(),
        }

    def has_gpu(self, has: bool) -> None:
        tool = self.tools / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\nexit {0 if has else 9}\n")
        tool.chmod(0o755)

    def index(self, name: str, **torch: str) -> str:
        """The address of a package index with these versions of torch and what each requires."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        for version, requirement in torch.items():
            add_wheel(folder, "torch", version, requirement)
        add_wheel(folder, "nvidia-cublas", "1")
        return folder.as_uri()

    def make(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["make", f"PYTHON={sys.executable}", *arguments]
        return subprocess.run(command, cwd=self.folder, env=self.variables, capture_output=True, text=True)

    def installed(self) -> dict[str, str]:
        """The versions of torch, its dependency and this project in the environment, where they are there."""
        script = "from importlib.metadata import *; print({d.name: d.version for d in distributions()})"
        done = subprocess.run([self.folder / ".venv/bin/python", "-I", "-c", script], capture_output=True, text=True)
        found = {canonicalize_name(name): version for name, version in ast.literal_eval(done.stdout).items()}
        return {name: found[name] for name in ("torch", "nvidia-cublas", "savant-ray") if name in found}

    def forget(self) -> None:
        """Removes what `make install` installed, but not the environment, whose creation takes longest."""
        (self.folder / ".venv/.installed").unlink(missing_ok=True)
        if (self.folder / ".venv").exists():
            command = [".venv/bin/python", "-m", "pip", "uninstall", "-qy", "torch", "nvidia-cublas", "savant-ray"]
            subprocess.run(command, cwd=self.folder, env=self.variables, check=True, capture_output=True)


def add_wheel(index: Path, name: str, version: str, requirement: str = "") -> None:
    """Adds a package without content to an index that lies in a folder."""
    folder, stem = index / name, f"{name.replace('-', '_')}-{version}"
    folder.mkdir(parents=True, exist_ok=True)
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += f"Requires-Dist: {requirement}\n" if requirement else ""
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{stem}.dist-info/METADATA", metadata)
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")
    links = (f'<a href="{quote(file.name)}">{file.name}</a>' for file in folder.glob("*.whl"))
    (folder / "index.html").write_text("\n".join(links))


@pytest.fixture(scope="module")
def kept_machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(tmp_path_factory.mktemp("machine"))


@pytest.fixture
def machine(kept_machine: Machine) -> Machine:
    kept_machine.forget()
    kept_machine.has_gpu(False)
    return kept_machine


@pytest.mark.slow
def test_without_a_gpu_the_cpu_build_is_installed_and_kept(machine: Machine) -> None:
    machine.index("default", **{VERSION: "nvidia-cublas", f"{VERSION}+cpu": ""})
    done = machine.make("install")
    assert done.returncode == 0, done.stdout + done.stderr
    assert machine.installed() == {"torch": f"{VERSION}+cpu", "savant-ray": "0"}
    assert machine.make("install").stdout == "", "nothing is done again"

    machine.index("default", **{VERSION: "nvidia-cublas"})
    later = (machine.folder / ".venv/.installed").stat().st_mtime + 5
    os.utime(machine.folder / "requirements.txt", (later, later))
    done = machine.make("install")
    assert done.returncode == 0 and "Installing" in done.stdout, "a requirement may have changed"
    assert machine.installed()["torch"] == f"{VERSION}+cpu"


@pytest.mark.slow
def test_without_a_gpu_and_a_cpu_build_torch_is_not_installed_until_an_index_is_named(machine: Machine) -> None:
    machine.index("default", **{VERSION: "nvidia-cublas"})
    done = machine.make("train")
    assert done.returncode != 0 and "make train TORCH_INDEX=ADDRESS" in done.stderr, done.stderr
    assert machine.installed() == {}
    named = machine.index("named", **{f"{VERSION}+special": ""})
    done = machine.make("install", f"TORCH_INDEX={named}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert machine.installed()["torch"] == f"{VERSION}+special"


@pytest.mark.slow
@pytest.mark.parametrize("gpu", [True, False])
def test_the_default_build_is_installed_with_a_gpu_or_if_it_has_no_cuda_packages(machine: Machine, gpu: bool) -> None:
    machine.has_gpu(gpu)
    machine.index("default", **{VERSION: "nvidia-cublas" if gpu else ""})
    done = machine.make("install")
    assert done.returncode == 0, done.stdout + done.stderr
    cuda = {"nvidia-cublas": "1"} if gpu else {}
    assert machine.installed() == {"torch": VERSION, **cuda, "savant-ray": "0"}


def test_a_machine_without_a_usable_python_gets_the_packages_to_install(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    done = machine.make("install", "PYTHON=false")
    assert done.returncode != 0 and "No Python 3.11, 3.12 or 3.13" in done.stderr
    (tmp_path / "modules/ensurepip.py").write_text("raise ImportError('as on Debian without python3-venv')")
    done = machine.make("install")
    assert done.returncode != 0 and "sudo apt install python3-venv" in done.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize("name", ["my conf.yaml", "it's mine.yaml", '"a" (1).yaml', "$HOME & co;#.yaml", "*.yaml"])
def test_make_passes_the_settings_file_and_arguments_on_unchanged(name: str, tmp_path: Path) -> None:
    """The settings are invalid, so `savant train` only names file and arguments."""
    (tmp_path / name).write_text("run: {seed: none}")
    (tmp_path / "environment").symlink_to(sys.prefix)
    made = [f"VENV={tmp_path}/environment", "--old-file", f"{tmp_path}/environment/.installed"]  # nothing is installed
    arguments = """ARGS=--training.max_steps 'one two' --checkpoint.keep "it's" """
    outside_make = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
    }  # inside another make, make also prints folders
    done = subprocess.run(
        ["make", "train", *made, f"CONFIG={tmp_path / name}", arguments],
        cwd=ROOT,
        env=outside_make,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    for invalid in (f"{tmp_path / name}: run.seed", "--training.max_steps", "--checkpoint.keep"):
        assert f" {invalid}: expected a whole number, found " in done.stderr
    assert all(f"found {value}\n" in done.stderr for value in ("none", "one two", "it's"))


def test_an_environment_folder_with_spaces_is_refused() -> None:
    done = subprocess.run(["make", "install", "VENV=my env"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "VENV=my env: make cannot handle spaces in this path" in done.stderr


def test_a_make_that_cannot_run_the_recipes_is_named() -> None:
    done = subprocess.run(["make", "help", ".FEATURES="], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "too old, 3.82 is needed" in done.stderr, "macOS comes with 3.81"


def test_make_without_a_target_lists_the_targets() -> None:
    outside_make = {"PATH": os.environ["PATH"]}
    said = subprocess.run(["make"], cwd=ROOT, env=outside_make, capture_output=True, text=True).stdout
    targets = re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert [target for target in targets if target != "help" and f"make {target} " not in said] == []


@pytest.mark.parametrize(("train", "test", "fails"), [(0, 0, False), (0, 1, True), (1, 0, True)])
def test_ci_runs_make_train_then_make_test_and_fails_if_either_does(train, test, fails, tmp_path):
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci/run")
    (tmp_path / "Makefile").write_text(
        f"train:\n\t@echo trained; exit {train}\ntest:\n\t@echo '1 failed, 2 passed in 0.10s'; exit {test}\n"
    )
    (tmp_path / "apt-get").write_text("#!/bin/sh\n")  # .ci/run would install what this machine lacks
    (tmp_path / "apt-get").chmod(0o755)
    outside_make = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run(["bash", ".ci/run"], cwd=tmp_path, env=outside_make, capture_output=True, text=True)
    assert (result.returncode != 0) == fails
    said = result.stdout.splitlines()
    assert "trained" in said[:-1] and said[-1] == "1 failed, 2 passed in 0.10s"
