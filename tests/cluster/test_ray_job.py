"""`make submit`, `ray job submit` and `ray job stop` against a local head."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ray.job_submission import JobStatus, JobSubmissionClient

from savant_ray.training.checkpoint import checkpoints
from tests.cluster.conftest import ROOT, SETTINGS, Head, environment, losses, records, steps_done, wait_for
from tests.tracked_files import copy_tracked_files

pytestmark = pytest.mark.slow
SMALLER = (
    "--training.max_steps 3 --training.compile false --model.dim 32 --model.vocab_size 600 --validation.batches 1"
    " --validation.logic_problems 0"
)


def copy_repository(folder: Path) -> Path:
    """Copy the files of the project that a job needs."""
    needed = ("savant_ray/*", "jobs/*", "configs/*", "Makefile", "requirements.txt", "pyproject.toml")
    return copy_tracked_files(folder, *needed)


def submit(head: Head, folder: Path, home: Path, command: str) -> subprocess.CompletedProcess[str]:
    ray = ["ray", "job", "submit", "--address", head.dashboard, "--working-dir", str(folder)]
    home_variable = ["--runtime-env-json", f'{{"env_vars": {{"HOME": "{home}"}}}}']
    there = environment(RAY_AUTH_MODE="disabled")
    line = [*ray, *home_variable, "--", *command.split()]
    return subprocess.run(line, env=there, text=True, capture_output=True, timeout=400)


@pytest.mark.rare
def test_a_submitted_quickstart_succeeds_and_its_run_folder_remains(head: Head, tmp_path: Path) -> None:
    folder, home = copy_repository(tmp_path / "repository"), tmp_path / "home"
    home.mkdir()
    command = f"python jobs/train.py --config configs/quickstart.yaml {SMALLER}"
    done = submit(head, folder, home, command)
    assert done.returncode == 0 and "succeeded" in done.stdout.lower(), done.stdout + done.stderr
    run = home / "savant_runs/checkpoints_quickstart"
    assert str(run) in done.stdout, "the folder of the run is printed"
    assert len(losses(run)) == 3 and (run / "step_3/manifest.json").exists()


def test_a_job_that_cannot_start_is_reported_as_failed(head: Head, tmp_path: Path) -> None:
    done = submit(head, ROOT / "jobs", tmp_path, "python train.py --trainig.max_steps 3")
    assert done.returncode != 0 and "did you mean" in done.stdout + done.stderr


@pytest.mark.parametrize("resumes", [False, pytest.param(True, marks=pytest.mark.rare)])
def test_ray_job_stop_saves_the_step_and_the_next_submission_resumes_from_it(
    resumes: bool, head: Head, workplace: Path
) -> None:
    folder, run = copy_repository(workplace / "repository"), workplace / "tiny"
    write_config(folder / "configs/own.yaml", workplace, max_steps=10_000)
    job = make_submit(head, folder, "configs/own.yaml")
    name = submission(job)
    wait_for(lambda: job.poll() is not None or steps_done(run) >= 12)
    assert job.poll() is None, job.communicate()
    stop = [Path(sys.executable).parent / "ray", "job", "stop", "--address", head.dashboard, name]
    assert subprocess.run(stop, env=environment(RAY_AUTH_MODE="disabled"), timeout=120).returncode == 0
    printed, _ = job.communicate(timeout=600)

    info = JobSubmissionClient(head.dashboard).get_job_info(name)
    assert info.status == JobStatus.STOPPED
    assert info.runtime_env["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "60"
    stopped_at = len(losses(run))
    assert stopped_at >= 12, printed
    assert checkpoints(run)[-1].name == f"step_{stopped_at}", printed
    assert f"stopped and saved as step_{stopped_at}" in printed
    if not resumes:
        return

    write_config(folder / "configs/own.yaml", workplace, max_steps=stopped_at + 5)
    again = make_submit(head, folder, "configs/own.yaml")
    printed, _ = again.communicate(timeout=600)
    assert again.returncode == 0 and f"step_{stopped_at}" in printed, printed
    assert records(run, "attempt")[-1]["step"] == stopped_at and len(losses(run)) == stopped_at + 5


def write_config(path: Path, workplace: Path, max_steps: int) -> None:
    """Write the settings of the tests' small run, with the absolute paths that a job needs."""
    text = f"{workplace}/dataset/savant_dataset_"
    settings = SETTINGS | {
        "run.storage_path": str(workplace),
        "data.cache_dir": f"{workplace}/cache",
        "data.sources": [{"path": f"{text}train.jsonl", "weight": 1}],
        "data.validation": f"{text}val.jsonl",
        "training.compile": False,
        "training.accumulation": 16,  # a step takes long enough to be hit
        "training.max_steps": max_steps,
        "checkpoint.every_steps": 10,
        "validation.every_steps": max_steps,
    }
    sections: dict[str, dict[str, object]] = {}
    for name, value in settings.items():
        section, _, key = name.partition(".")
        sections.setdefault(section, {})[key] = value
    path.write_text(yaml.safe_dump(sections))


def make_submit(head: Head, folder: Path, config: str) -> subprocess.Popen[str]:
    """Start `make submit` in an environment that is installed already."""
    venv = Path(sys.executable).parent.parent
    installed = ["--old-file", f"{venv}/.installed", f"VENV={venv}"]
    command = ["make", "submit", *installed, f"ADDRESS={head.dashboard}", f"CONFIG={config}"]
    there = environment(RAY_AUTH_MODE="disabled")
    return subprocess.Popen(command, cwd=folder, env=there, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def submission(job: subprocess.Popen[str]) -> str:
    """Read the output up to the name that Ray gave the job, and return the name."""
    assert job.stdout is not None
    for line in job.stdout:
        if found := re.search(r"Job '(\w+)' submitted successfully", line):
            return found[1]
    raise AssertionError("not submitted")
