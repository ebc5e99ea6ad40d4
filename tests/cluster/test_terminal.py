"""A run in a terminal that closes, with a name that is not ASCII, in a folder whose modules shadow installed packages."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from savant_ray.training.checkpoint import newest_checkpoint
from tests.cluster.conftest import ROOT, Head, environment, losses, options, run_job
from tests.terminal import ended, read_until, start_in_terminal

NAME = "modèle a#b?c%20 [1] 实验 👩‍💻"
HANGUP = """
import sys, time
from pathlib import Path
from savant_ray.driver.phases import AttemptPhase, Phase
phase = AttemptPhase()
phase.handle_signals()
phase.current = Phase.TRAINING
print("ready", flush=True)
deadline = time.monotonic() + 50
while phase.current is Phase.TRAINING and time.monotonic() < deadline:
    time.sleep(0.01)
for _ in range(3):
    print("to a terminal that is gone", flush=True)
Path(sys.argv[1]).write_text("saved" if phase.current is Phase.STOP_REQUESTED else "")
sys.exit(75)
"""
TWICE = """
import os, signal
from savant_ray.driver.phases import AttemptPhase, Phase
phase = AttemptPhase()
phase.handle_signals()
phase.current = Phase.TRAINING
for _ in range(3):
    os.kill(os.getpid(), signal.SIGHUP)
print(phase.current.name)
"""


def test_a_program_whose_terminal_closes_can_still_print_and_save(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HANGUP, str(tmp_path / "out")]
    process, terminal = start_in_terminal(command, ROOT, dict(os.environ))
    read_until(terminal, "ready", 50)
    os.close(terminal)
    assert ended(process) == 75 and (tmp_path / "out").read_text() == "saved"


def test_several_hangups_of_one_closing_terminal_are_one_request_to_stop() -> None:
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (0, "STOP_REQUESTED\n", "")


def test_under_nohup_a_hangup_has_no_effect() -> None:
    command = f"trap '' HUP; exec {sys.executable} -c '{TWICE}'"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (0, "TRAINING\n", "")


def folder_of_traps(workplace: Path) -> Path:
    """Write modules that would shadow the installed ones if workers searched the working directory."""
    shutil.copytree(ROOT / "savant_ray", workplace / "savant_ray", ignore=shutil.ignore_patterns("__pycache__"))
    for module in ("savant_ray/__init__.py", "tokenizers.py", "orjson.py"):
        (workplace / module).write_text(f"raise ImportError('the wrong {module}')\n")
    return workplace


@pytest.mark.rare
@pytest.mark.slow
def test_closing_the_terminal_saves_the_step_and_a_cluster_resumes_a_run_with_a_non_ascii_name(
    head: Head, workplace: Path
) -> None:
    folder = folder_of_traps(workplace)
    too_long = folder / ("x" * 100)
    too_long.mkdir()
    command = [sys.executable, str(ROOT / "jobs/train.py"), *options(run__name=NAME, training__max_steps=100_000)]
    process, terminal = start_in_terminal(
        [*command, "--validation.every_steps", "100000"], folder, environment(TMPDIR=str(too_long))
    )
    run = folder / NAME
    read_until(terminal, "gradient norm", 150)  # what the live lines show once there was a step
    os.killpg(process, signal.SIGHUP)  # as a shell does that ends; Ray's own processes get it too
    os.close(terminal)
    assert ended(process) == 75
    logged = (run / "training_log.txt").read_text()
    assert "too long for Ray's Unix sockets" in logged and "stopped and saved as step_" in logged
    newest = newest_checkpoint(run)
    assert newest is not None and newest.name == f"step_{len(losses(run))}"

    steps = len(losses(run)) + 2
    code, printed = run_job(head, folder, run__name=NAME, training__max_steps=steps)
    assert code == 0 and re.search(f"resuming from .*/{newest.name}", printed), printed
    assert len(losses(run)) == steps
