"""Versions stand in one place, and `make install` gets torch without CUDA packages where there is no GPU."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
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
RANGES = parsed(
    PROJECT["project"]["dependencies"]
    + PROJECT["project"]["optional-dependencies"]["test"]
    + PROJECT["project"]["optional-dependencies"]["check"]
    + PROJECT["project"]["optional-dependencies"]["docs"]
    + PROJECT["project"]["optional-dependencies"]["mlflow"]
    + PROJECT["build-system"]["requires"]
)


# --- versions


def test_every_requirement_is_pinned_to_one_version_and_once():
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


def test_the_documentation_says_of_every_requirement_why_it_is_there() -> None:
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
    known |= {"savant_ray", "mlflow", "wandb", *sys.stdlib_module_names}
    known |= {"tests", "docs", "bad_lines"}
    known |= {"prometheus_client", "werkzeug"}  # which come with ray[default] and Flask
    for path in tracked_files("savant_ray/*.py", "jobs/*.py", "tests/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                assert name.split(".")[0] in known, f"{path.relative_to(ROOT)} imports {name}"


def test_the_project_names_its_command_its_packages_and_its_licence():
    assert PROJECT["project"]["scripts"] == {"savant": "savant_ray.cli:main"}
    assert PROJECT["tool"]["setuptools"]["packages"]["find"] == {"include": ["savant_ray", "savant_ray.*"]}
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    folders = {path.parent for path in tracked_files("savant_ray/*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


# --- make

# Stands in for Python: creates an environment of itself, and plays a package index that has the builds in $BUILDS.
FAKE_PYTHON = """#!/bin/bash
echo "$*" >> "$LOG"
case "$*" in
    "--version") echo "Python 3.11.2" ;;
    "-m venv --clear "*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
    "-m pip --version") [[ $0 == *bin/python ]] ;;
    "-c import venv, ensurepip") [[ $WITHOUT != venv ]] ;;
    "-c import sys;"*) [[ $WITHOUT != version ]] ;;
    "-c import importlib.metadata"*) [[ -n $INSTALLED ]] ;;
    "-m pip install --dry-run"*) [[ $BUILDS == *cuda* ]] && echo '{"name": "nvidia-cublas"}' || echo '{"name": "torch"}' ;;
    "-m pip install torch=="*"+cpu") [[ $BUILDS == *cpu* ]] ;;
esac
"""


class FakeMachine:
    """A folder with the Makefile, a stand-in for Python, and what the last `make` said and ran."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tools = folder / "tools"
        self.tools.mkdir()
        for name in ("Makefile", "requirements.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, folder)
        self.add("fakepython", FAKE_PYTHON)
        self.add("nvidia-smi", "#!/bin/bash\nexit 9\n")

    def add(self, name: str, script: str) -> None:
        (self.tools / name).write_text(script)
        (self.tools / name).chmod(0o755)

    def make(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        path = f"{self.tools}{os.pathsep}{os.environ['PATH']}"
        # Nothing else: with the VENV=… of a `make test VENV=…` this would install into the environment that runs it.
        env = {"PATH": path, "LOG": str(self.folder / "log"), "PYTHON": "fakepython"} | variables
        return subprocess.run(["make", *arguments], cwd=self.folder, env=env, capture_output=True, text=True)

    def installed(self) -> list[str]:
        """The arguments of each `pip install`, dry runs left out."""
        lines = (self.folder / "log").read_text().splitlines()
        return [line.removeprefix("-m pip install ") for line in lines if re.match(r"-m pip install (?!--dry)", line)]


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    return FakeMachine(tmp_path)


REST = ["-r requirements.txt", "--no-build-isolation --no-deps -e ."]
TORCH = next(str(pin) for pin in PINS if pin.name == "torch")


def test_without_a_gpu_the_cpu_build_is_installed_first(machine):
    assert machine.make("install", BUILDS="cpu cuda").returncode == 0
    assert machine.installed() == [f"{TORCH}+cpu", *REST]


def test_without_a_gpu_and_a_cpu_build_nothing_big_is_installed_and_the_way_out_is_said(machine):
    result = machine.make("train", BUILDS="cuda")
    assert result.returncode != 0
    assert "make train TORCH_INDEX=ADDRESS" in result.stderr and "no NVIDIA GPU" in result.stderr
    assert machine.installed() == [f"{TORCH}+cpu"]


def test_an_index_whose_plain_build_has_no_cuda_is_fine(machine):
    assert machine.make("install", BUILDS="plain").returncode == 0
    assert machine.installed()[1:] == REST


def test_with_a_gpu_the_plain_build_is_installed(machine):
    machine.add("nvidia-smi", "#!/bin/bash\nexit 0\n")
    assert machine.make("install", BUILDS="cuda").returncode == 0
    assert machine.installed() == REST


def test_a_named_torch_index_is_used_whatever_the_machine(machine):
    assert machine.make("install", "TORCH_INDEX=file:///wheels", BUILDS="cuda").returncode == 0
    assert machine.installed() == [f"--index-url file:///wheels {TORCH}", *REST]


def test_a_torch_that_is_there_stays(machine):
    assert machine.make("install", BUILDS="cuda", INSTALLED="yes").returncode == 0
    assert machine.installed() == REST


def test_the_environment_is_made_again_only_when_its_files_change(machine):
    machine.make("install", BUILDS="cpu")
    machine.make("install", BUILDS="cpu")
    assert len(machine.installed()) == 3
    later = (machine.folder / ".venv/.installed").stat().st_mtime + 5
    os.utime(machine.folder / "requirements.txt", (later, later))
    machine.make("install", BUILDS="cpu")
    assert len(machine.installed()) == 6


@pytest.mark.parametrize(
    ("without", "advice"), [("venv", "sudo apt install python3-venv"), ("version", "No Python 3.11, 3.12 or 3.13")]
)
def test_a_machine_without_what_it_takes_is_told_what(machine, without, advice):
    result = machine.make("install", WITHOUT=without)
    assert result.returncode != 0 and advice in result.stderr
    assert not (machine.folder / ".venv").exists()


def test_make_train_runs_the_quickstart_and_hands_arguments_on(machine):
    assert machine.make("train", "ARGS=--training.max_steps 3", BUILDS="cpu").returncode == 0
    last = (machine.folder / "log").read_text().splitlines()[-1]
    assert last == "jobs/train.py --config configs/quickstart.yaml --training.max_steps 3"


@pytest.mark.parametrize("name", ["my conf.yaml", "it's mine.yaml", '"a" (1).yaml', "$HOME & co;#.yaml", "*.yaml"])
def test_make_hands_the_name_of_a_configuration_on_as_it_is(machine, name):
    machine.add("fakepython", FAKE_PYTHON.replace('echo "$*"', "printf '<%s>' \"$@\" '\n'"))
    done = machine.make(
        "train", f"CONFIG={name}", """ARGS=--validation.prompt 'one two' --run.name "it's" """, BUILDS="cpu"
    )
    assert done.returncode == 0, done.stderr
    told = (machine.folder / "log").read_text()
    assert f"<--config><{name}><--validation.prompt><one two><--run.name><it's>" in told


def test_a_folder_for_the_environment_that_make_cannot_handle_is_refused(machine):
    done = machine.make("install", "VENV=my env")
    assert done.returncode != 0 and "VENV=my env: make cannot handle spaces in this path" in done.stderr


def test_make_alone_lists_the_targets(machine):
    said = machine.make().stdout
    assert all(f"make {target}" in said for target in ("install", "train", "test", "test-quick", "check", "clean"))


@pytest.mark.parametrize(("train", "test", "fails"), [(0, 0, False), (0, 1, True), (1, 0, True)])
def test_ci_runs_the_readmes_two_commands_in_order_and_fails_with_either(train, test, fails, tmp_path):
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci/run")
    (tmp_path / "Makefile").write_text(
        f"train:\n\t@echo trained; exit {train}\ntest:\n\t@echo '1 failed, 2 passed in 0.10s'; exit {test}\n"
    )
    outside_make = {"PATH": os.environ["PATH"]}
    result = subprocess.run(["bash", ".ci/run"], cwd=tmp_path, env=outside_make, capture_output=True, text=True)
    assert (result.returncode != 0) == fails
    said = result.stdout.splitlines()
    assert "trained" in said[:-1] and said[-1] == "1 failed, 2 passed in 0.10s"
