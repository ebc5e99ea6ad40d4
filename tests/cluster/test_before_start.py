"""What is decided before Ray starts: paths, disk, lock."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from savant_ray.cluster.checks import check_before_start, check_disk, checkpoint_bytes
from savant_ray.cluster.disk import Disk
from savant_ray.cluster.lock import LOCK, is_in_use, locked, move_run_aside
from savant_ray.cluster.paths import (
    in_ray_job,
    joined,
    output_folder,
    parent_and_name,
    python_to_type,
    run_folder,
    with_absolute_paths,
)
from savant_ray.cluster.preparation import find_text
from savant_ray.cluster.session import grace_seconds
from savant_ray.cluster.starting_point import find_start
from savant_ray.config import Config, load_config
from savant_ray.errors import CheckpointError, DataError, SavantError, SettingsError
from savant_ray.reporting import RunReport
from tests.cluster.test_starting_point import write

ROOT = Path(__file__).parents[2]


def test_relative_paths_are_against_the_folder_and_uris_stay(tmp_path: Path) -> None:
    config = load_config(["--data.validation", '["a.jsonl", "s3://b/c.jsonl"]'], environment={})
    resolved = with_absolute_paths(config, tmp_path / "in", tmp_path / "out")
    assert resolved.data.validation == [f"{tmp_path}/in/a.jsonl", "s3://b/c.jsonl"]
    assert resolved.run.storage_path == f"{tmp_path}/out" and resolved.data.cache_dir == f"{tmp_path}/out/cache"
    assert resolved.data.sources[0].path == f"{tmp_path}/in/dataset/savant_dataset_train.jsonl"
    assert resolved.data.tokenizer == "train"
    assert with_absolute_paths(resolved, Path("/elsewhere"), Path("/elsewhere")) == resolved


def test_a_run_in_object_storage_has_a_mirror_below_home_and_a_cache_that_has_none() -> None:
    config = load_config(["--run.storage_path", "s3://bucket/my/runs?region=eu-west-1"], environment={})
    resolved = with_absolute_paths(config, Path("/in"), Path("/out"))
    assert resolved.run.storage_path == config.run.storage_path
    assert run_folder(resolved) == Path.home() / "savant_runs/s3/bucket/my/runs/checkpoints_savant"
    uri = joined(config.run.storage_path, "step_5")
    assert uri == "s3://bucket/my/runs/step_5?region=eu-west-1"
    assert parent_and_name(uri) == (config.run.storage_path, "step_5")
    config = load_config(["--data.cache_dir", "s3://bucket/cache"], environment={})
    with pytest.raises(SettingsError, match=r"data\.cache_dir: s3://bucket/cache is a URI"):
        with_absolute_paths(config, Path("/in"), Path("/out"))


def test_the_next_command_calls_the_python_that_has_the_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    assert python_to_type(python) == ".venv/bin/python", "as make calls it"
    (tmp_path / "elsewhere").mkdir(), monkeypatch.chdir(tmp_path / "elsewhere")
    assert python_to_type(python) == str(python)
    monkeypatch.setenv("PATH", str(python.parent))
    assert python_to_type(python) == "python"


def test_a_job_writes_below_home_because_its_folder_vanishes() -> None:
    job = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}
    assert in_ray_job(job) and output_folder(job) == Path.home() / "savant_runs"
    assert not in_ray_job({}) and output_folder({}) == Path.cwd()


def test_the_guides_checkpoint_is_about_a_gigabyte() -> None:
    assert checkpoint_bytes(Config()) == pytest.approx(12 * 80.2e6, rel=0.01)


def test_a_disk_without_room_for_the_checkpoints_is_refused(tmp_path: Path) -> None:
    check_disk(tmp_path, one_checkpoint=1000, keep=3)
    with pytest.raises(SettingsError, match=r"run\.storage_path: .* GB free, 4 checkpoints of .* GB need"):
        check_disk(tmp_path, one_checkpoint=10**18, keep=3)


def test_init_from_must_name_a_checkpoint(tmp_path: Path) -> None:
    settings = Config().to_dict()
    settings["run"] |= {"storage_path": str(tmp_path), "init_from": str(tmp_path / "nothing")}
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        check_before_start(Config.from_dict(settings), Disk(tmp_path))


def test_a_run_in_use_is_refused_and_a_dead_one_holds_no_lock(tmp_path: Path) -> None:
    hold = "import sys, time; from savant_ray.cluster.lock import locked\n"
    hold += "with locked(__import__('pathlib').Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(SavantError, match=f"in use by process {holder.pid} on"), locked(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with locked(tmp_path):
        pass


def test_who_only_looks_whether_a_run_is_in_use_keeps_nobody_from_starting_it(tmp_path: Path) -> None:
    with locked(tmp_path):
        assert is_in_use(tmp_path)
    with (tmp_path / LOCK).open("rb") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(0.2, looking.close).start()
        with locked(tmp_path):
            pass


def test_a_run_is_locked_under_every_path_that_leads_to_it(tmp_path: Path) -> None:
    """As an export that is mounted in two places."""
    there, other = tmp_path / "export/run", tmp_path / "mount"
    there.mkdir(parents=True)
    other.symlink_to(there.parent)
    with locked(there):
        assert is_in_use(other / "run")
        with pytest.raises(SavantError, match=f"in use by process {os.getpid()}"), locked(other / "run"):
            pass
    write(other / "run", 1, 2)
    assert find_start(Disk(other / "run"), pytest.fail) == other / "run/step_2"
    assert find_start(Disk(there), pytest.fail) == there / "step_2"
    moved = move_run_aside(other / "run")
    assert moved == other / "run.old" and (there.parent / "run.old/step_2").is_dir()


LEAVING = """
import os, signal, time
from savant_ray.cluster.signals import StopSignals
signals = StopSignals()
signals.install()
signals.patient = True
try:
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
except KeyboardInterrupt:
    print("leaving", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
finally:
    print("cleaned up after the third", flush=True)
"""


def test_a_third_ctrl_c_ends_a_run_that_is_leaving_on_the_spot() -> None:
    done = subprocess.run([sys.executable, "-c", LEAVING], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (75, "leaving\n", "")


def test_a_submitted_job_knows_how_long_its_stop_may_take() -> None:
    sent = yaml.safe_load((ROOT / "jobs/runtime_env.yaml").read_text())["env_vars"]
    in_a_job = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}
    patient = load_config(["--run.grace_seconds", "300"], environment={})
    assert grace_seconds(patient, in_a_job | sent) == pytest.approx(42), "the rest of 60 is for saving"
    assert grace_seconds(patient, in_a_job) == pytest.approx(2.1), "of Ray's own 3"
    assert grace_seconds(patient, {}) == 300


def test_text_is_looked_at_before_ray_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    for name, content in {"train.jsonl": "a", "copy.jsonl": "held out", "empty.jsonl": ""}.items():
        (tmp_path / "data" / name).write_text(content and f'{{"text": "{content}"}}\n')
    (tmp_path / "val.jsonl").write_text('{"text": "held out"}\n')
    (tmp_path / "data/gone.jsonl").symlink_to("nowhere.jsonl")

    def look(path: str, validation: str = "val.jsonl", cache_dir: str = "cache") -> list[str]:
        sources = f"[{{path: '{path}', weight: 1}}]"
        arguments = ["--data.sources", sources, "--data.validation", validation, "--data.cache_dir", cache_dir]
        config = with_absolute_paths(load_config(arguments, environment={}), tmp_path, tmp_path)
        with RunReport(None) as report:
            return [Path(file.path).name for _, files in find_text(config, report).sources for file in files]

    assert look("data/*.jsonl") == ["empty.jsonl", "train.jsonl"]
    printed = capsys.readouterr().out.replace("\n", " ")
    assert "gone.jsonl: a broken link, to nowhere.jsonl; left out" in printed
    assert "because it is the validation text (data.validation)" in printed and "data/copy.jsonl" in printed
    for wrong, error, message in (
        ({"path": "val.jsonl"}, DataError, r"data\.sources\[0\]\.path: holds nothing but the validation text"),
        ({"path": "data/empty.jsonl"}, DataError, r"data\.sources\[0\]\.path: .*/empty\.jsonl: is empty"),
        ({"path": "data", "validation": "nowhere"}, DataError, r"data\.validation: .*/nowhere: no such file or folder"),
        ({"path": "data", "cache_dir": "val.jsonl"}, SettingsError, r"data\.cache_dir: .*cannot be used as a folder"),
    ):
        with pytest.raises(error, match=message):
            look(**wrong)
