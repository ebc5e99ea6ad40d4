"""`savant_ray.train`, called from scripts and notebook-like processes."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import savant_ray
from savant_ray.errors import CheckpointError, DataError, SavantError, SettingsError, TrainingError
from savant_ray.training.checkpoint import newest_checkpoint
from tests.cluster.conftest import SETTINGS, environment, start_program, steps_done, wait_for, with_text

ROOT = Path(__file__).parents[1]


def settings(**changes: object) -> dict[str, dict[str, object]]:
    """Return the settings of the tests' tiny run as nested dictionaries."""
    nested: dict[str, dict[str, object]] = {}
    for name, value in {**SETTINGS, "training.compile": False, **changes}.items():
        section, field = name.replace("__", ".").split(".")
        nested.setdefault(section, {})[field] = value
    return nested


def python(code: str, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start a process that runs `code`, with the package from this checkout."""
    variables = environment(RAY_AUTH_MODE="disabled", PYTHONPATH=str(ROOT))
    return start_program([sys.executable, "-c", code, *arguments], folder, variables)


def test_public_names_exist_and_are_imported_on_first_use() -> None:
    assert {"train", "Config", "Result", "SavantError"} <= set(savant_ray.__all__)
    assert all(getattr(savant_ray, name) is not None for name in savant_ray.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        savant_ray.trian  # noqa: B018
    script = "import savant_ray, sys; print({'torch', 'ray', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    ("executable", "pattern"),
    [
        ("/bin/false", "without a result .exit code 1"),
        ("/nowhere/python", "cannot be started"),
        ("", "cannot be started"),
    ],
)
def test_a_training_process_that_cannot_start_raises_a_training_error(
    executable: str, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(TrainingError, match=pattern):
        savant_ray.train({})


def test_invalid_settings_raise_a_settings_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"training\.max_step"):
        savant_ray.train({"training": {"max_step": 3}})
    config = savant_ray.Config()
    unvalidated = config.training.model_copy(update={"max_steps": 0})
    with pytest.raises(SettingsError, match=r"training\.max_steps: 0 has to be at least 1"):
        savant_ray.train(config.model_copy(update={"training": unvalidated}))
    with pytest.raises(SettingsError, match="not a setting"):
        savant_ray.train({"training": {"max_steps": object()}})
    with pytest.raises(SettingsError, match=r"no\.yaml: no such file"):
        savant_ray.train(tmp_path / "no.yaml")


def test_errors_of_the_training_process_are_raised_in_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path])  # Python ignores what is not a string
    with pytest.raises(DataError, match="savant_dataset_train"):
        savant_ray.train(settings(run__storage_path=tmp_path))
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        savant_ray.train(savant_ray.Config.from_dict(settings(run__init_from=str(tmp_path / "nothing"))))
    with pytest.raises(SavantError, match="File name too long"):  # the message is longer than the buffer of a socket
        savant_ray.train(settings(run__init_from="/nothing" * 50_000))


def test_a_stop_that_is_requested_at_once_returns_the_state_of_the_run(tmp_path: Path) -> None:
    result = savant_ray.train(settings(run__storage_path=tmp_path), stop_requested=lambda: True)
    assert (result.step, result.finished, result.checkpoint) == (0, False, None)
    with pytest.raises(ZeroDivisionError):  # not a run that can no longer be stopped
        savant_ray.train(settings(run__storage_path=tmp_path), stop_requested=lambda: bool(1 / 0))


def training_process(folder: Path, code: str) -> str:
    """Return a program to run in place of Python as the training process; it ends after at most 30 s."""
    program = folder / "program"
    program.write_text(f"#!{sys.executable}\nimport os, signal, time\nsignal.alarm(30)\n{code}")
    program.chmod(0o755)
    return str(program)


def test_an_error_of_stop_requested_does_not_hide_that_training_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", training_process(tmp_path, "time.sleep(1)\nos._exit(1)"))
    with pytest.raises(ZeroDivisionError) as raised:
        savant_ray.train({}, stop_requested=lambda: bool(1 / 0))
    assert isinstance(raised.value.__context__, TrainingError)


def test_a_program_with_thousands_of_open_files_can_train(monkeypatch: pytest.MonkeyPatch) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < 2000:
        pytest.skip("this process may not have 2,000 open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (2000, hard))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    descriptors = [os.dup(2) for _ in range(1100)]
    try:
        with pytest.raises(TrainingError, match="without a result"):
            savant_ray.train({})
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


STOPS_WITH_MUCH_OUTPUT = """
def stop(*_):
    os.write(1, b"x" * 200_000)  # more than a pipe holds
    os._exit(1)
signal.signal(signal.SIGUSR1, stop)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
time.sleep(60)
"""


SAVES_UNLESS_STOPPED_TWICE = """
def stop(*_):  # as in the driver, a second SIGTERM would end the wait for the save, and a SIGUSR1 does not
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    open("stopping", "w").close()
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGUSR1, stop)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGUSR1])
open("ready", "w").close()
while not os.path.exists("may_end"):
    time.sleep(0.01)
open("saved", "w").close()
os._exit(1)
"""


def test_an_exception_of_the_caller_after_a_stop_was_requested_does_not_prevent_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        threading.Timer(0.5, Path("may_end").touch).start()
        raise TimeoutError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", training_process(tmp_path, SAVES_UNLESS_STOPPED_TWICE))
    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        wait = threading.Thread(
            target=lambda: (wait_for(Path("stopping").exists), os.kill(os.getpid(), signal.SIGALRM))
        )
        wait.start()
        with pytest.raises(TimeoutError):
            savant_ray.train({}, stop_requested=Path("ready").exists)
    finally:
        wait.join()
        signal.signal(signal.SIGALRM, previous)
    assert Path("saved").exists()


def test_output_of_a_run_that_an_exception_of_the_caller_stops_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def time_is_over(*_: object) -> None:
        raise TimeoutError

    monkeypatch.setattr(sys, "executable", training_process(tmp_path, STOPS_WITH_MUCH_OUTPUT))
    previous = signal.signal(signal.SIGALRM, time_is_over)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(TimeoutError):
            savant_ray.train({})
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert capsys.readouterr().out.count("x") == 200_000


SCRIPT = """
import subprocess, sys, json
mine = subprocess.Popen(["sleep", "600"])
import savant_ray
try:
    result = savant_ray.train(json.loads(sys.argv[1]))
    print("result", result.step, result.finished, result.checkpoint, sorted(result.metrics))
except KeyboardInterrupt:
    print("interrupted")
print("child lives:", mine.poll() is None)
mine.kill()
"""

NOTEBOOK = """
import asyncio, code, io, json, sys
class Cell(io.StringIO):
    def isatty(self): return False
async def kernel():
    cell, real = Cell(), sys.stdout
    sys.stdout = cell
    shell = code.InteractiveInterpreter({"settings": json.loads(sys.argv[1])})
    shell.runsource("import subprocess, ray, savant_ray, asyncio; mine = subprocess.Popen(['sleep', '600'])")
    shell.runsource("info = ray.init(num_cpus=2, include_dashboard=False)")
    shell.runsource("first = savant_ray.train(settings)")
    shell.runsource("settings['training']['max_steps'] = 10")
    shell.locals["second"] = await asyncio.to_thread(savant_ray_train, shell)
    shell.runsource("alive = mine.poll() is None; mine.kill()")
    shell.runsource("answer = ray.get(ray.remote(lambda: 42).remote())")
    sys.stdout = real
    names = shell.locals
    print(cell.getvalue())
    print("Ray answers", names["answer"], "- child lives:", names["alive"])
    print("steps", names["first"].step, names["second"].step, names["second"].finished)
def savant_ray_train(shell):
    import savant_ray
    return savant_ray.train(shell.locals["settings"])
asyncio.run(kernel())
"""


@pytest.mark.slow
@pytest.mark.parametrize("resumes", [False, pytest.param(True, marks=pytest.mark.rare)])
def test_a_script_is_interrupted_and_resumes_and_its_child_process_survives(resumes: bool, tmp_path: Path) -> None:
    workplace = with_text(tmp_path)
    job = python(SCRIPT, workplace, json.dumps(settings(training__max_steps=100_000, validation__every_steps=100_000)))
    wait_for(lambda: steps_done(workplace / "tiny") > 3 or job.poll() is not None)
    job.send_signal(signal.SIGINT)
    printed, _ = job.communicate(timeout=600)
    assert "interrupted\nchild lives: True" in printed and "Traceback" not in printed, printed
    newest = newest_checkpoint(workplace / "tiny")
    assert newest is not None and int(newest.name[5:]) == steps_done(workplace / "tiny")
    if not resumes:
        return

    more = steps_done(workplace / "tiny") + 3
    printed, _ = python(SCRIPT, workplace, json.dumps(settings(training__max_steps=more))).communicate(timeout=600)
    assert f"result {more} True {workplace}/tiny/step_{more} ['best_validation_loss'" in printed, printed
    assert "child lives: True" in printed and "Traceback" not in printed, printed


@pytest.mark.slow
@pytest.mark.rare
def test_a_notebook_trains_twice_in_the_ray_that_it_started(tmp_path: Path) -> None:
    job = python(NOTEBOOK, with_text(tmp_path), json.dumps(settings()))
    printed, _ = job.communicate(timeout=600)
    assert job.returncode == 0 and "Traceback" not in printed, printed
    assert "Ray answers 42 - child lives: True" in printed and "steps 8 10 True" in printed, printed
    assert "step 8/8" in printed and "resuming from" in printed, "the cell shows what training prints"


@pytest.mark.slow
@pytest.mark.rare
def test_a_run_whose_caller_is_killed_saves_its_step(tmp_path: Path) -> None:
    workplace = with_text(tmp_path)
    job = python(SCRIPT, workplace, json.dumps(settings(training__max_steps=100_000, validation__every_steps=100_000)))
    wait_for(lambda: steps_done(workplace / "tiny") > 3 or job.poll() is not None)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    log = workplace / "tiny/training_log.txt"
    wait_for(lambda: "stopped and saved as" in log.read_text())
    newest = newest_checkpoint(workplace / "tiny")
    assert newest is not None and newest.name == f"step_{steps_done(workplace / 'tiny')}"
