"""The container image and the services around it, as far as they can be checked without a container engine.

hadolint checks the Dockerfile, and its Python steps are run in a folder of their own.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.test_packaging import PROJECT
from tests.test_wheel import outside_of_the_checkout
from tests.tracked_files import tracked_files

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "jobs/container"
DOCKERFILE = FOLDER / "Dockerfile"
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


class Instruction(NamedTuple):
    name: str
    text: str


def instructions() -> Iterator[Instruction]:
    """Yield the instructions of the Dockerfile, with continued lines joined and without comments."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    for line in filter(None, text.splitlines()):
        name, _, rest = line.partition(" ")
        yield Instruction(name, rest.strip())


def stages() -> list[list[Instruction]]:
    """Return the instructions of each stage; those before the first FROM belong to none."""
    found: list[list[Instruction]] = []
    for instruction in instructions():
        if instruction.name == "FROM":
            found.append([])
        if found:
            found[-1].append(instruction)
    return found


def copied() -> list[str]:
    """Return the files and folders that the image takes from the checkout."""
    sources = [i.text.split()[:-1] for i in instructions() if i.name == "COPY" and not i.text.startswith("--from")]
    return [name for names in sources for name in names]


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed (make extras)")
def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    done = subprocess.run([str(HADOLINT), DOCKERFILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_image_has_a_pinned_base_and_an_unprivileged_user_and_no_build_tools_of_its_own() -> None:
    base = next(i.text for i in instructions() if i.text.startswith("BASE="))
    assert re.fullmatch(r"BASE=python:3\.1[123]\.\d+-slim-\w+", base)
    build, final = stages()
    assert [stage[0].text for stage in (build, final)] == ["${BASE} AS build", "${BASE}"]
    users = [i.text for i in final if i.name == "USER"]
    assert users == ["1000:1000"], "a number, which Kubernetes can check (runAsNonRoot)"
    assert not [i for i in final if i.name == "RUN" and "pip" in i.text]
    assert all(any(i.name == "SHELL" and "-euc" in i.text for i in stage) for stage in (build, final))


def test_the_files_that_the_image_needs_are_sent_to_the_builder_and_no_others() -> None:
    lines = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    allowed = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert allowed == set(copied()) and "*" in lines
    assert all((ROOT / name).exists() for name in allowed)
    needed = tracked_files("savant_ray/*", "configs/*", "setup.py", "pyproject.toml")
    for path in needed:
        name = str(path.relative_to(ROOT))
        assert any(fnmatch.fnmatch(name, pattern) for item in allowed for pattern in (item, f"{item}/*"))


def test_the_pins_that_the_image_installs_are_all_that_the_package_needs() -> None:
    runtime = (ROOT / "requirements.txt").read_text().partition("# Building and testing")[0]
    pins = {canonicalize_name(Requirement(line).name) for line in runtime.splitlines() if re.match(r"\w", line)}
    needed = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["mlflow"]
    assert {canonicalize_name(Requirement(text).name) for text in needed} <= pins
    assert "pytest" not in pins


def links_to_packages(folder: Path) -> Path:
    """Fill a folder with links to the packages of this environment, except the project itself; return the folder."""
    folder.mkdir(exist_ok=True)
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "savant" not in path.name and not (folder / path.name).is_symlink():
            (folder / path.name).symlink_to(path)
    return folder


@pytest.mark.slow
@pytest.mark.rare
@pytest.mark.parametrize("variant", ["cpu", "cuda", "tpu"])
def test_the_build_steps_make_an_environment_in_which_the_commands_run(variant: str, tmp_path: Path) -> None:
    """The packages of the environment of the tests are visible, so that pip downloads nothing."""
    work, target = tmp_path / "build", tmp_path / "opt/savant"
    work.mkdir()
    packages = target / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    variables = outside_of_the_checkout() | {
        "VARIANT": variant,
        "TORCH_INDEX": "",
        "EXTRAS": "[s3]",
        "PIP_NO_INDEX": "1",
    }
    variables |= {"PATH": f"{target / 'bin'}:{Path(sys.executable).parent}:/usr/bin:/bin"}
    codes = []
    for name, text in stages()[0]:
        if name == "COPY":
            *sources, _ = text.split()
            for source in sources:
                copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                copy(ROOT / source, work / source)
        elif name == "RUN":
            script = text.replace("/opt/savant", str(target))
            done = subprocess.run(["/bin/sh", "-euc", script], cwd=work, env=variables, capture_output=True, text=True)
            codes.append(done.returncode)
            if done.returncode:
                break
            if packages.exists():
                dependencies = links_to_packages(tmp_path / "dependencies")
                (packages / "dependencies.pth").write_text(f"import sys; sys.path.insert(0, {str(dependencies)!r})")
    if variant == "tpu":
        assert codes[-1] == 1 and "VARIANT is cpu or cuda, not tpu" in done.stderr
        return
    assert codes == [0] * len(codes), done.stdout + done.stderr
    shown = subprocess.run(
        [target / "bin/savant", "config", "--config", "chat"],
        cwd=tmp_path,
        env=variables,
        text=True,
        capture_output=True,
    )
    assert "name: checkpoints_chat" in shown.stdout, shown.stderr


# --- compose.yaml

COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def test_the_services_mount_files_that_exist_and_volumes_that_are_declared() -> None:
    assert (FOLDER / SERVICES["ray"]["build"]["context"]).resolve() == ROOT
    assert (ROOT / SERVICES["ray"]["build"]["dockerfile"]) == DOCKERFILE
    named = set()
    for service in SERVICES.values():
        for mount in service["volumes"]:
            source, target, *_ = mount.split(":")
            named |= set() if source.startswith(".") else {source}
            assert (FOLDER / source).is_dir() or source in COMPOSE["volumes"], mount
            assert target.startswith("/")
    assert named == set(COMPOSE["volumes"])


def test_prometheus_and_grafana_are_provisioned_from_the_monitoring_folder() -> None:
    monitoring = ROOT / "jobs/monitoring"
    named = [option for option in SERVICES["prometheus"]["command"] if "/monitoring/" in option]
    named += SERVICES["grafana"]["environment"].values()
    paths = re.findall(r"(?:/monitoring/)([\w./]+)", " ".join(named))
    assert sorted(paths) == ["grafana/provisioning", "prometheus.yml"] and all((monitoring / p).exists() for p in paths)
    for service in ("prometheus", "grafana"):
        assert SERVICES[service]["network_mode"] == "service:ray", "the addresses in jobs/monitoring are of loopback"
        assert {"../monitoring:/monitoring:ro", "ray:/tmp/ray:ro"} <= set(SERVICES[service]["volumes"])


def test_ports_are_published_for_this_machine_only_and_images_are_pinned() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports == ["127.0.0.1:8265:8265", "127.0.0.1:3000:3000"]
    for name in ("prometheus", "grafana"):
        assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", SERVICES[name]["image"])


def test_the_gpu_variant_changes_only_the_image_and_its_devices() -> None:
    ((name, changed),) = yaml.safe_load((FOLDER / "compose.cuda.yaml").read_text())["services"].items()
    assert name == "ray" and set(changed) == {"image", "build", "deploy"}
    assert changed["build"] == {"args": {"VARIANT": "cuda", "TORCH_INDEX": ""}}, (
        "TORCH_INDEX of the environment is for the CPU"
    )
    assert set(changed["build"]["args"]) <= {i.text.partition("=")[0] for i in instructions() if i.name == "ARG"}


def test_ray_is_started_with_options_that_it_has() -> None:
    from tests.test_docs import unknown_to_ray

    ray = SERVICES["ray"]
    words = [word.partition("=")[0] for word in [*ray["entrypoint"][1:], *ray["command"]]]
    assert words[0] == "start" and unknown_to_ray(words) == set()
