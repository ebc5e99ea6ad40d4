"""`make train` as a new user runs it, with few steps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.conftest import FAST_RAY, environment, losses
from tests.tracked_files import copy_tracked_files

LENGTH_OF_TIME = len("2026-01-31 17:05:00+00:00")  # in front of each line of the log


@pytest.mark.slow
@pytest.mark.rare  # .ci/run runs `make train` itself
def test_make_train_ends_with_a_checkpoint_a_sample_and_the_next_command(tmp_path: Path) -> None:
    if not (Path(sys.prefix) / ".installed").exists():
        pytest.skip("this environment was not made by `make install`")
    copy = copy_tracked_files(tmp_path / "a stranger's copy", "*")
    few_steps = environment(
        SAVANT_TRAINING__MAX_STEPS="3", SAVANT_VALIDATION__BATCHES="1", SAVANT_VALIDATION__LOGIC_PROBLEMS="0"
    )
    for name in FAST_RAY:
        del few_steps[name]  # Ray as a new user has it
    command = ["make", "train", f"VENV={sys.prefix}", "-o", f"{sys.prefix}/.installed"]  # never into this environment
    done = subprocess.run(command, cwd=copy, env=few_steps, text=True, capture_output=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    run = copy / "checkpoints_quickstart"
    assert len(losses(run)) == 3 and (run / "step_3/manifest.json").exists()
    assert "sample at step 3" in done.stdout and "next: python jobs/generate.py" in done.stdout
    assert (copy / "dataset/genius_dataset.jsonl").exists()
    assert done.stderr == "", "the noise of a healthy Ray is not the user's"
    logged = {line[LENGTH_OF_TIME:].strip() for line in (run / "training_log.txt").read_text().splitlines()}
    others = [line for line in done.stdout.splitlines() if line.strip() not in logged]
    assert [line for line in others if not line.startswith("quickstart data: ")] == [], "what the log has and no more"

    again = subprocess.run(command, cwd=copy, env=few_steps, text=True, capture_output=True, timeout=500)
    assert again.returncode == 0 and "has done its 3 steps" in again.stdout
