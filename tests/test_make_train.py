"""`make train` as a new user types it, with few steps."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.conftest import environment, losses

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_make_train_ends_with_a_checkpoint_a_sample_and_what_to_do_next(tmp_path: Path) -> None:
    if not (Path(sys.prefix) / ".installed").exists():
        pytest.skip("this environment was not made by `make install`")
    copy = copy_of_the_repository(tmp_path / "savant")
    few_steps = environment(
        SAVANT_TRAINING__MAX_STEPS="3", SAVANT_VALIDATION__BATCHES="1", SAVANT_TRAINING__COMPILE="false"
    )
    command = ["make", "train", f"VENV={sys.prefix}", "-o", f"{sys.prefix}/.installed"]  # never into this environment
    done = subprocess.run(command, cwd=copy, env=few_steps, text=True, capture_output=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    run = copy / "checkpoints_quickstart"
    assert len(losses(run)) == 3 and (run / "step_3/manifest.json").exists()
    assert "sample at step 3" in done.stdout and "next: python jobs/generate.py" in done.stdout
    assert (copy / "dataset/genius_dataset.jsonl").exists()

    again = subprocess.run(command, cwd=copy, env=few_steps, text=True, capture_output=True, timeout=500)
    assert again.returncode == 0 and "has done its 3 steps" in again.stdout


def copy_of_the_repository(target: Path) -> Path:
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, text=True, capture_output=True, check=True).stdout.splitlines():
        if (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target
