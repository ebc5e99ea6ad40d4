"""A job uploads code and configuration, but no text, runs, environments or caches."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from savant_ray.cluster.upload import WARN_BYTES, files_to_send, size_warning

ROOT = Path(__file__).parents[1]
EXCLUDES = yaml.safe_load((ROOT / "jobs/runtime_env.yaml").read_text())["excludes"]
UPLOADED = ("savant_ray/model/loss.py", "jobs/train.py", "configs/mine.yaml", "my experiment.yaml", "tokenizer.json")
NOT_UPLOADED = (
    "my run/step_500/step_500.pt",
    "my run/step_500/manifest.json",
    "my run/metrics.jsonl",
    "my run/tensorboard/events.out.tfevents.1.host",
    "runs/2026/b/step_7.damaged/tokenizer.json",
    "runs/step_1000.pt",
    "corpus/part-001.jsonl",
    "corpus/part-002.jsonl.zst",
    "corpus/part-003.jsonl.gz",
    "scratch/train-0123abcd/shard-00000.arrow",
    "export/model.safetensors",
    "my-env/lib/python3.12/site-packages/torch/lib/libtorch.so",
    ".venv/lib64/python3.12/site-packages/torch/__init__.py",
    ".git/objects/pack/pack-1.pack",
    ".mypy_cache/3.12/cache.db",
    "savant_ray/__pycache__/cli.cpython-312.pyc",
    "wandb/run-1/files/output.log",
)


def checkout(folder: Path) -> Path:
    for name in (*UPLOADED, *NOT_UPLOADED):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    return folder


def test_code_and_configuration_are_uploaded_and_text_runs_and_environments_are_not(tmp_path: Path) -> None:
    assert {str(path) for path in files_to_send(checkout(tmp_path), EXCLUDES)} == set(UPLOADED)


def test_the_complete_package_is_uploaded() -> None:
    sent = {str(path) for path in files_to_send(ROOT, EXCLUDES)}
    listed = ["git", "ls-files", "savant_ray", "jobs", "configs", "requirements.txt", "pyproject.toml"]
    tracked = subprocess.run(listed, cwd=ROOT, text=True, capture_output=True)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    assert set(tracked.stdout.splitlines()) <= sent


def test_files_that_git_ignores_are_not_uploaded() -> None:
    assert ".gitignore" in {str(path) for path in files_to_send(ROOT, [])}
    assert not [path for path in files_to_send(ROOT, []) if "__pycache__" in path.parts]


def test_a_large_upload_is_reported_with_its_largest_folders(tmp_path: Path) -> None:
    checkout(tmp_path)
    with (tmp_path / "movies.bin").open("wb") as file:
        file.truncate(2 * WARN_BYTES)
    command = [sys.executable, "-m", "savant_ray.cluster.upload", str(ROOT / "jobs/runtime_env.yaml")]
    there = {"cwd": tmp_path, "env": {"PYTHONPATH": str(ROOT)}}
    done = subprocess.run(command, text=True, capture_output=True, timeout=100, **there)
    assert done.returncode == 0 and done.stdout == ""
    assert done.stderr.startswith("warning: 100 MB of this folder are uploaded with the job (movies.bin 100 MB, ")
    assert size_warning({Path("a"): WARN_BYTES - 1}) == "" and "a 50 MB" in size_warning({Path("a"): WARN_BYTES})
