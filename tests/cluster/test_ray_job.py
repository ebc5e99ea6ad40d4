"""`ray job submit --working-dir . -- python jobs/train.py --config configs/quickstart.yaml` against a local head."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cluster.conftest import ROOT, Head, environment, losses

pytestmark = pytest.mark.slow
SMALLER = "--training.max_steps 3 --training.compile false --model.dim 32 --model.vocab_size 600 --validation.batches 1"


def submit(head: Head, folder: Path, home: Path, command: str) -> subprocess.CompletedProcess[str]:
    ray = ["ray", "job", "submit", "--address", head.dashboard, "--working-dir", str(folder)]
    home_variable = ["--runtime-env-json", f'{{"env_vars": {{"HOME": "{home}"}}}}']
    there = environment(RAY_AUTH_MODE="disabled")
    line = [*ray, *home_variable, "--", *command.split()]
    return subprocess.run(line, env=there, text=True, capture_output=True, timeout=400)


def test_a_submitted_quickstart_succeeds_and_its_run_outlives_the_job(head: Head, tmp_path: Path) -> None:
    folder, home = tmp_path / "repository", tmp_path / "home"
    home.mkdir()
    for part in ("savant_ray", "jobs", "configs"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    command = f"python jobs/train.py --config configs/quickstart.yaml {SMALLER}"
    done = submit(head, folder, home, command)
    assert done.returncode == 0 and "succeeded" in done.stdout.lower(), done.stdout + done.stderr
    run = home / "savant_runs/checkpoints_quickstart"
    assert str(run) in done.stdout, "where the run is kept is said"
    assert len(losses(run)) == 3 and (run / "step_3/manifest.json").exists()

    again = submit(head, folder, home, f"{command} --training.max_steps 4")
    assert again.returncode == 0 and "step_3" in again.stdout, again.stdout + again.stderr
    assert len(losses(run)) == 4


def test_a_job_that_cannot_start_is_reported_as_failed(head: Head, tmp_path: Path) -> None:
    done = submit(head, ROOT / "jobs", tmp_path, "python train.py --trainig.max_steps 3")
    assert done.returncode != 0 and "did you mean" in done.stdout + done.stderr
