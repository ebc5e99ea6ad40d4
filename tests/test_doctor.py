"""`savant doctor` names what prevents a training on this machine, and its exit code says whether something does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from savant_ray import doctor
from savant_ray.cli import main

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_ADDRESS", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_a_machine_that_can_train_has_no_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert shown.endswith("\ntraining can run here\n")
    for topic in ("Python", "packages", "torch", "GPU", "compiler", "memory", "disk", "Ray", "ports", "extra mlflow"):
        assert f" {topic} " in shown


def test_the_page_cache_of_a_container_counts_as_available_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {
        "memory.max": "1000000000\n",
        "memory.current": "999000000\n",
        "memory.stat": "anon 99000000\nactive_file 100000000\ninactive_file 800000000\n",
    }.items():
        (folder / name).write_text(text)
    monkeypatch.setattr(doctor, "CGROUP_LIMIT", folder / "memory.max")
    assert next(finding.text for finding in doctor.diagnose() if finding.topic == "memory") == "0.9 GB available"


@pytest.mark.parametrize(
    ("error", "shown", "remedy"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."),
            "OutOfMemoryError: CUDA",
            "nvidia-smi",
        ),
        (
            RuntimeError("CUDA error: no kernel image is available for execution on the device"),
            "RuntimeError: CUDA error: no kernel image",
            "install a torch for another version of CUDA",
        ),
    ],
)
def test_a_gpu_that_another_program_uses_or_that_torch_does_not_support_is_named_with_what_to_do(
    error: Exception, shown: str, remedy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail_on_gpu(*_: object, **options: object) -> object:
        if options.get("device") == "cuda":
            raise error
        return ones(*_, **options)

    ones = torch.ones
    monkeypatch.setattr(torch, "ones", fail_on_gpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert f"error   GPU          {shown}" in printed
    assert remedy in printed and "--force-reinstall" not in printed


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("RAY_ADDRESS", "127.0.0.1:1", "127.0.0.1:1 (from RAY_ADDRESS): nothing listens there"),
        ("RAY_ADDRESS", "http://127.0.0.1:8265", "is the address of a dashboard"),
        ("RAY_TMPDIR", f"/tmp/{'x' * 90}", "too long for Ray's Unix sockets"),
    ],
)
def test_a_ray_that_cannot_be_used_is_an_error(
    variable: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, value)
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert message in shown and shown.endswith("\n1 error: training cannot run here\n")


def test_packages_that_cannot_be_imported_are_errors_and_the_other_checks_are_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    (folder / "ray").mkdir()
    (folder / "ray/__init__.py").write_text("import no_such_module")
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{ROOT}")
    done = subprocess.run([sys.executable, "-m", "savant_ray.cli", "doctor"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == ""
    assert "error   torch        ImportError: libcudart.so.13: cannot open shared object file" in done.stdout
    assert "error   Ray          ModuleNotFoundError: No module named 'no_such_module'" in done.stdout
    assert f"-m pip install -e {ROOT}\n" in done.stdout, "a package index may not have this program"
    assert "ok      disk " in done.stdout


def test_packages_that_are_missing_or_too_old_are_errors_and_those_of_extras_are_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata = folder / "savant_ray-9.dist-info/METADATA"
    metadata.parent.mkdir()
    requirements = [
        "torch>=99",
        "no-such-package",
        "psutil",
        "another-one>=1; extra == 'serve'",
        "ruff; extra == 'check'",
    ]
    lines = ["Metadata-Version: 2.1", "Name: savant-ray", "Version: 9", *(f"Requires-Dist: {r}" for r in requirements)]
    metadata.write_text("\n".join(lines))
    monkeypatch.syspath_prepend(folder)
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert ", needed is >=99" in shown and "no-such-package is not installed" in shown
    assert "note    extra serve  another-one is not installed" in shown and "savant-ray[serve]" in shown
    assert "psutil" not in shown and "extra check" not in shown and "2 errors" in shown
