"""Checks before Ray starts: paths, text, disk space, locks, `--fresh`, and what a finished run prints."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from savant_ray.cli import main
from savant_ray.cluster.ray_job import grace_seconds, in_ray_job, missing_text_explained, output_folder
from savant_ray.config import Config, load_config
from savant_ray.data.record_reader import documents
from savant_ray.driver.checks import (
    check_before_start,
    check_disk,
    checkpoint_bytes,
    refuse_inputs_in_the_run,
)
from savant_ray.driver.data_files import find_data_files
from savant_ray.errors import CheckpointError, DataError, SavantError, SettingsError
from savant_ray.locations import join_uri, parent_and_name, replace_missing_home
from savant_ray.reporting import RunReport
from savant_ray.reporting.wording import byte_size, own_command
from savant_ray.storage.local import LocalStorage
from savant_ray.storage.lock import LOCK, is_in_use, locked
from savant_ray.storage.paths import with_absolute_paths
from savant_ray.storage.run_storage import run_storage
from tests.cluster.conftest import environment, with_text
from tests.cluster.conftest import options as tiny_options
from tests.cluster.test_starting_point import start_of, write

ROOT = Path(__file__).parents[2]
IN_A_JOB = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}


def test_relative_paths_become_absolute_and_uris_are_unchanged(tmp_path: Path) -> None:
    config = load_config(["--data.validation", '["a.jsonl", "s3://b/c.jsonl"]'], environment={})
    resolved = with_absolute_paths(config, tmp_path / "in", tmp_path / "out")
    assert resolved.data.validation == [f"{tmp_path}/in/a.jsonl", "s3://b/c.jsonl"]
    assert resolved.run.storage_path == f"{tmp_path}/out" and resolved.data.cache_dir == f"{tmp_path}/out/cache"
    assert resolved.data.sources[0].path == f"{tmp_path}/in/dataset/savant_dataset_train.jsonl"
    (tmp_path / "in/train").mkdir(parents=True)
    for learnt in ("auto", "train"):
        config = load_config(["--data.tokenizer", learnt], environment={})
        assert with_absolute_paths(config, tmp_path / "in", tmp_path / "out").data.tokenizer == learnt
    assert with_absolute_paths(resolved, Path("/elsewhere"), Path("/elsewhere")) == resolved
    # The working directory of a Ray job is deleted with the job.
    for mlflow in ("sqlite:///mlflow.db", f"sqlite:///{tmp_path}/out/mlflow.db", "sqlite:///:memory:", "http://h:5000"):
        config = load_config(["--reporting.mlflow", mlflow], environment={})
        kept = f"sqlite:///{tmp_path}/out/mlflow.db" if "mlflow.db" in mlflow else mlflow
        assert with_absolute_paths(config, tmp_path / "in", tmp_path / "out").reporting.mlflow == kept
    for validation, path in (("{path: a.jsonl, text: body}", f"{tmp_path}/in/a.jsonl"), ("{fraction: 0.1}", None)):
        config = load_config(["--data.validation", validation], environment={})
        assert with_absolute_paths(config, tmp_path / "in", tmp_path / "out").data.held_out.path == path


def test_a_run_in_object_storage_has_a_local_mirror_and_the_cache_must_be_local() -> None:
    config = load_config(["--run.storage_path", "s3://bucket/my/runs?region=eu-west-1"], environment={})
    resolved = with_absolute_paths(config, Path("/in"), Path("/out"))
    assert resolved.run.storage_path == config.run.storage_path
    assert run_storage(resolved).folder == Path.home() / "savant_runs/s3/bucket/my/runs/checkpoints_savant"
    uri = join_uri(config.run.storage_path, "step_5")
    assert uri == "s3://bucket/my/runs/step_5?region=eu-west-1"
    assert parent_and_name(uri) == (config.run.storage_path, "step_5")
    config = load_config(["--data.cache_dir", "s3://bucket/cache"], environment={})
    with pytest.raises(SettingsError, match=r"data\.cache_dir: s3://bucket/cache is a URI"):
        with_absolute_paths(config, Path("/in"), Path("/out"))


def test_suggested_commands_can_be_typed_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python, elsewhere = tmp_path / ".venv/bin/python", tmp_path / "elsewhere"
    python.parent.mkdir(parents=True)
    elsewhere.mkdir()
    python.touch(mode=0o755)
    job, installed = Path("jobs/train.py"), python.with_name("savant")
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/generate.py").touch()
    monkeypatch.chdir(tmp_path)
    assert own_command("generate", job, python) == ".venv/bin/python jobs/generate.py", "as make calls it"
    assert own_command("generate", installed, python) == ".venv/bin/python -m savant_ray.cli generate"
    installed.touch(mode=0o755)
    assert own_command("generate", installed, python) == ".venv/bin/savant generate"
    assert own_command("report", job, python) == ".venv/bin/savant report", "there is no script for it"
    monkeypatch.chdir(elsewhere)
    assert own_command("generate", tmp_path / job, python) == f"{python} {tmp_path}/jobs/generate.py"
    assert own_command("generate", installed, python) == f"{installed} generate"
    monkeypatch.setenv("PATH", str(python.parent))
    assert own_command("generate", installed, python) == "savant generate"


def test_a_ray_job_writes_below_the_home_folder() -> None:
    job = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}
    assert in_ray_job(job) and output_folder(job) == Path.home() / "savant_runs"
    assert not in_ray_job({}) and output_folder({}) == Path.cwd()


def test_missing_text_in_a_ray_job_is_explained_as_not_uploaded() -> None:
    with (
        pytest.raises(DataError, match=r"^corpus: no such file\n.*Ray job.*absolute"),
        missing_text_explained(IN_A_JOB),
    ):
        raise DataError("corpus: no such file")
    with pytest.raises(DataError, match=r"^corpus: no such file$"), missing_text_explained({}):
        raise DataError("corpus: no such file")


def test_a_missing_home_folder_is_reported_only_if_one_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(SettingsError, match=f"user {os.getuid()} has no home folder.*set HOME"):
        output_folder({"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"})
    with pytest.raises(SettingsError, match="set HOME"):
        run_storage(load_config(["--run.storage_path", "s3://bucket/runs"], environment={}))
    assert output_folder({}) == Path.cwd()


def test_a_missing_home_folder_is_replaced_for_libraries_but_not_for_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    replace_missing_home()
    assert Path.home().is_dir() and not list(Path.home().iterdir())
    with pytest.raises(SettingsError, match="set HOME"):
        run_storage(load_config(["--run.storage_path", "s3://bucket/runs"], environment={}))


def test_a_checkpoint_of_the_default_model_is_about_a_gigabyte() -> None:
    assert checkpoint_bytes(Config()) == pytest.approx(12 * 80.2e6, rel=0.01)


def test_a_disk_that_is_too_small_for_the_checkpoints_is_refused(tmp_path: Path) -> None:
    check_disk(tmp_path, bytes_per_checkpoint=1000, keep=3)
    with pytest.raises(SettingsError, match=r"run\.storage_path: .* free, 4 checkpoints of 1,000,000 TB need"):
        check_disk(tmp_path, bytes_per_checkpoint=10**18, keep=3)
    (tmp_path / "step_4").mkdir()
    (tmp_path / "step_4/weights").touch()
    os.truncate(tmp_path / "step_4/weights", 4 * 10**12)  # of holes
    check_disk(tmp_path, bytes_per_checkpoint=10**12, keep=3)
    with pytest.raises(SettingsError, match="4 checkpoints of 1.00 TB need 4.00 TB more"):
        check_disk(tmp_path, bytes_per_checkpoint=10**12, keep=3, fresh=True)
    (tmp_path / "step_4").rename(tmp_path / "step_4.damaged")
    with pytest.raises(SettingsError, match="need 4.00 TB more"):
        check_disk(tmp_path, bytes_per_checkpoint=10**12, keep=3)


@pytest.mark.parametrize(("keep", "needed"), [(3, 4), (10**9, 9)])
def test_disk_space_is_required_for_the_checkpoints_that_are_kept_and_that_the_run_can_write(
    keep: int, needed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, dict[str, Any]] = {
        "run": {"storage_path": str(tmp_path)},
        "training": {"max_steps": 4000},
        "checkpoint": {"keep": keep, "every_steps": 500},
    }
    config = Config.from_dict(settings)
    free = needed * checkpoint_bytes(config)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free - 1))
    with pytest.raises(SettingsError, match=f"{needed} checkpoints of .* need"):
        check_before_start(config, run_storage(config))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    check_before_start(config, run_storage(config))
    assert not list(tmp_path.iterdir()), "the check writes nothing"


@pytest.mark.parametrize(
    ("n_bytes", "shown"),
    [
        (0, "0 bytes"),
        (812, "812 bytes"),
        (45_120, "45.1 KB"),
        (9_990_000, "9.99 MB"),
        (300e6, "300 MB"),
        (1.23e9, "1.23 GB"),
    ],
)
def test_byte_sizes_are_shown_in_suitable_units(n_bytes: float, shown: str) -> None:
    assert byte_size(n_bytes) == shown


def test_fresh_refuses_inputs_in_the_run_that_it_would_move_aside(tmp_path: Path) -> None:
    def refuse(init_from: str, run: str) -> None:
        storage = LocalStorage(tmp_path)
        storage.location = run
        refuse_inputs_in_the_run(Config.from_dict({"run": {"init_from": init_from}}), storage)

    (tmp_path / "link").symlink_to(tmp_path / "run")
    for inside, run in ((f"{tmp_path}/link/step_3", f"{tmp_path}/run"), ("s3://b/a%20b?x=1", "s3://b/a b")):
        with pytest.raises(SettingsError, match=r"run\.init_from: .* lies in the run"):
            refuse(inside, run)
    for outside, run in ((f"{tmp_path}/run.old", f"{tmp_path}/run"), ("s3://b/ab", "s3://b/a"), ("s3://b/a", "/b/a")):
        refuse(outside, run)


def run_of(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run `savant train` with the tests' tiny settings; it ends before Ray starts."""
    job = [sys.executable, str(ROOT / "jobs/train.py"), *tiny_options(**{"run.name": ODD}), *options]
    return subprocess.run(job, cwd=folder, env=environment(), capture_output=True, text=True, timeout=100)


ODD = "a b#c?d%20 [1]{x}&;$'"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--data.validation", "nothing.jsonl"], "nothing.jsonl"),
        (["--data.sources", "[{path: nothing.jsonl, weight: 1}]"], "nothing.jsonl"),
        (["--data.tokenizer", "./nothing.json"], "nothing.json"),
        (["--run.init_from", "nothing"], "error: run.init_from: "),
        (["--model.vocab_size", "1000000000000000"], "run.storage_path: "),
        (["--run.init_from", f"{ODD}/step_3"], "/step_3 lies in the run that --fresh would move aside"),
        (["--data.tokenizer", f"./{ODD}/step_3/tokenizer.json"], "lies in the run that --fresh would move aside"),
    ],
)
def test_fresh_does_not_move_the_old_run_if_the_new_one_cannot_start(
    wrong: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = with_text(tmp_path) / ODD
    write(run, 3)
    monkeypatch.chdir(tmp_path)
    assert main(["train", *tiny_options(**{"run.name": ODD}), "--fresh", *wrong]) in (2, 3, 4)
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and message in printed, printed
    assert (run / "step_3").is_dir() and not run.with_name(f"{ODD}.old").exists()


@pytest.mark.parametrize("max_steps", [18, 2])
def test_a_finished_run_prints_its_step_and_a_next_command_quoted_for_the_shell(max_steps: int, tmp_path: Path) -> None:
    run = with_text(tmp_path) / ODD
    write(run, 18)
    (run / "metrics.jsonl").write_text("")
    (run / "samples.jsonl").write_text('{"event": "sample", "step": 18, "time": "2026-01-01T00:00:00+00:00"}\n')
    done = run_of(tmp_path, "--training.max_steps", str(max_steps))
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert f"{run} has done its 18 steps" in done.stdout or f"{run} is already at step 18, beyond" in done.stdout
    assert "max_steps = 2;" in done.stdout or max_steps == 18
    command = done.stdout.rpartition(" or: ")[2].replace("…", "x")
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True).stdout
    assert words.splitlines()[-5:] == [str(ROOT / "jobs/generate.py"), "--checkpoint", str(run), "--prompt", "x"]


def test_free_space_is_checked_for_a_folder_that_does_not_exist_yet(tmp_path: Path) -> None:
    folder = tmp_path / "not/there"
    check_disk(folder, bytes_per_checkpoint=1000, keep=3)
    assert not folder.exists()
    with pytest.raises(SettingsError, match="not/there has .* free"):
        check_disk(folder, bytes_per_checkpoint=10**18, keep=3)


def test_init_from_must_name_a_checkpoint(tmp_path: Path) -> None:
    settings = Config().to_dict()
    settings["run"] |= {"storage_path": str(tmp_path), "init_from": str(tmp_path / "nothing")}
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        check_before_start(Config.from_dict(settings), LocalStorage(tmp_path))


def test_a_run_in_use_is_refused_and_a_killed_process_holds_no_lock(tmp_path: Path) -> None:
    hold = "import sys, time; from savant_ray.storage.lock import locked\n"
    hold += "with locked(__import__('pathlib').Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(SavantError, match=f"in use by process {holder.pid} on"), locked(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with locked(tmp_path):
        pass


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOLCK, "cannot be locked .*: its file system is mounted without locks; mount it with locks"),
        (errno.ENOSYS, "cannot be locked .*: its file system is mounted without locks; mount it with locks"),
        (errno.EIO, "cannot be written"),
    ],
)
def test_a_file_system_without_locks_is_refused_with_advice(
    code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(SettingsError, match=rf"^run\.storage_path: .*/\.lock {words}"), locked(tmp_path):
        pass
    assert not is_in_use(tmp_path)


def test_the_error_for_an_unwritable_lock_file_names_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with locked(tmp_path):
        pass
    opened = Path.open

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:  # rights do not stop root
        if path.name == LOCK:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(SettingsError, match=rf"\.lock cannot be written \(Permission denied\).* {tmp_path.owner()};"):
        with locked(tmp_path):
            pass


def test_a_lock_file_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limit[1]))
    try:
        with pytest.raises(SettingsError, match=r"\.lock cannot be written \(File too large\)"), locked(tmp_path):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    with locked(tmp_path):
        pass


def test_a_lock_is_that_of_the_folder_also_if_the_folder_is_moved_aside_while_another_process_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("savant_ray.storage.lock.RETRY_SECONDS", 10.0)
    run, is_locked, is_checked = tmp_path / "run", threading.Event(), threading.Event()

    def start() -> None:
        with locked(run):
            is_locked.set()
            is_checked.wait(20)

    with locked(run):
        other = threading.Thread(target=start)
        other.start()
        time.sleep(0.1)  # the other one waits for the lock
        run.rename(tmp_path / "run.old")  # as `--fresh` does
    assert is_locked.wait(20)
    assert is_in_use(run), "otherwise a third process could start the same run"
    is_checked.set()
    other.join()


def test_checking_whether_a_run_is_in_use_does_not_block_its_start(tmp_path: Path) -> None:
    with locked(tmp_path):
        assert is_in_use(tmp_path)
    with (tmp_path / LOCK).open("rb") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(0.2, looking.close).start()
        with locked(tmp_path):
            pass


def test_a_run_is_locked_under_every_path_to_it(tmp_path: Path) -> None:
    """The second path stands for an export that is mounted in two places."""
    there, other = tmp_path / "export/run", tmp_path / "mount"
    there.mkdir(parents=True)
    other.symlink_to(there.parent)
    with locked(there):
        assert is_in_use(other / "run")
        with pytest.raises(SavantError, match=f"in use by process {os.getpid()}"), locked(other / "run"):
            pass
    write(other / "run", 1, 2)
    assert start_of(LocalStorage(other / "run"), pytest.fail) == other / "run/step_2"
    assert start_of(LocalStorage(there), pytest.fail) == there / "step_2"
    moved = LocalStorage(other / "run").move_aside()
    assert moved == str(other / "run.old") and (there.parent / "run.old/step_2").is_dir()


LEAVING = """
import os, signal, time
from savant_ray.driver.phases import AttemptPhase, Phase
phase = AttemptPhase()
phase.handle_signals()
phase.current = Phase.TRAINING
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


def test_a_third_ctrl_c_exits_immediately() -> None:
    done = subprocess.run([sys.executable, "-c", LEAVING], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (75, "leaving\n", "")


def test_a_ray_job_limits_the_last_step_to_the_time_until_ray_kills_it() -> None:
    sent = yaml.safe_load((ROOT / "jobs/runtime_env.yaml").read_text())["env_vars"]
    in_a_job = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}
    patient = load_config(["--run.grace_seconds", "300"], environment={})
    assert grace_seconds(patient, in_a_job | sent) == pytest.approx(42), "the rest of 60 is for saving"
    assert grace_seconds(patient, in_a_job) == pytest.approx(2.1), "of Ray's own 3"
    assert grace_seconds(patient, {}) == 300


def test_held_out_documents_come_from_the_files_of_the_sources(tmp_path: Path) -> None:
    for name in "ab":
        lines = (json.dumps({"body": f"{name} {number}"}) + "\n" for number in range(300))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))

    def texts(validation: str) -> tuple[list[str], list[str]]:
        sources = "[{path: a.jsonl, text: body, weight: 1, limit: 200}, {path: b.jsonl, text: body, weight: 1}]"
        arguments = ["--data.sources", sources, "--data.validation", validation]
        config = with_absolute_paths(load_config(arguments, environment={}), tmp_path, tmp_path)
        with RunReport(None) as report:
            found = find_data_files(config, report)
        both = (found.training_texts(None), found.validation_texts(None))
        training, held_out = ([t.text for s in some for t in documents(s.files, rule=s.rule)] for some in both)
        return training, held_out

    training, held_out = texts("{fraction: 0.2}")
    everything = [*(f"a {number}" for number in range(200)), *(f"b {number}" for number in range(300))]
    assert sorted(training + held_out) == sorted(everything)
    assert {text[0] for text in training} == {text[0] for text in held_out} == {"a", "b"}
    (tmp_path / "c.jsonl").write_text('{"story": "c"}\n')
    assert texts("{path: c.jsonl, text: story}") == (everything, ["c"])


@pytest.mark.parametrize(
    ("written", "number", "is_refused"),
    [
        ("YAML", 1234567890123456789, True),
        ("YAML", 123456789012345678, False),
        ("Python", 1234567890123456789, True),
        ("Python", 123456789012345678, False),
        pytest.param("Python", 10**400, True, id="more than a float can be"),
    ],
)
def test_a_filter_by_a_number_that_would_be_rounded_is_refused(
    written: str, number: int, is_refused: bool, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "a", "id": {number}}}\n')
    source = {"path": str(tmp_path / "a.jsonl"), "weight": 1, "filter": {"equals": {"id": number}}}
    data = {"sources": [source], "validation": str(tmp_path / "a.jsonl"), "cache_dir": str(tmp_path / "cache")}
    if written == "YAML":
        config = load_config([part for name, value in data.items() for part in (f"--data.{name}", str(value))], {})
    else:
        config = Config.from_dict({"data": data})
    with RunReport(None) as report:
        if is_refused:
            with pytest.raises(
                SettingsError, match=r"data\.sources\[0\]\.filter\.equals: the value of id has more than 18"
            ):
                find_data_files(config, report)
        else:
            assert find_data_files(config, report).sources


def test_text_is_checked_before_ray_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
            return [Path(file.path).name for _, files in find_data_files(config, report).sources for file in files]

    assert look("data/*.jsonl") == ["empty.jsonl", "train.jsonl"]
    printed = capsys.readouterr().out.replace("\n", " ")
    assert "gone.jsonl: a broken link to nowhere.jsonl; skipped" in printed
    assert "because it is the validation text (data.validation)" in printed and "data/copy.jsonl" in printed
    assert look("val.jsonl") == ["val.jsonl"]
    assert "warning: data.sources[0].path: contains only the validation text" in capsys.readouterr().out
    for wrong, error, message in (
        ({"path": "data/empty.jsonl"}, DataError, r"data\.sources\[0\]\.path: .*/empty\.jsonl: is empty"),
        ({"path": "data", "validation": "nowhere"}, DataError, r"data\.validation: .*/nowhere: no such file or folder"),
        ({"path": "data", "cache_dir": "val.jsonl"}, SettingsError, r"data\.cache_dir: .*cannot be used as a folder"),
        ({"path": Config().data.sources[0].path}, DataError, "no such file or folder; `savant init TEXT` writes"),
        (
            {"path": "data", "validation": str(Config().data.validation)},
            DataError,
            r"no such file or folder; set data\.validation to held-out text, or to {fraction: 0\.01}",
        ),
    ):
        with pytest.raises(error, match=message):
            look(**wrong)
