"""Driver and workers run the same copy of the package."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from savant_ray.cluster.same_code import code_digest, job_config, other_code_error, own_digest, package_folder
from savant_ray.data.tokenizer import train_tokenizer
from savant_ray.events import RunFailed
from tests.cluster.conftest import ROOT, Head, environment
from tests.training.tiny import tiny_config
from tests.worker.without_ray import run_worker


def package(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_py", ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_the_digest_depends_on_the_code_and_not_on_its_folder(tmp_path: Path) -> None:
    one, other = (package(tmp_path / name, a_py="1", sub__b_py="2") for name in ("one", "other"))
    (other / "notes.txt").write_text("of nobody's interest")
    (other / ".#a.py").symlink_to("user@host.123:1")  # as Emacs marks a file with unsaved changes
    assert code_digest(one) == code_digest(other)
    for change in ({"a_py": "2"}, {"c_py": ""}, {"sub__b_py": ""}):
        assert code_digest(package(other, **change)) != code_digest(one)


def test_moving_code_between_files_changes_the_digest(tmp_path: Path) -> None:
    one, other = package(tmp_path / "one", a_py="12", b_py=""), package(tmp_path / "other", a_py="1", b_py="2")
    assert code_digest(one) != code_digest(other)


def test_workers_import_the_package_only_from_the_drivers_folder() -> None:
    config = job_config()
    config._py_driver_sys_path.extend(["/where/the/script/is", "/where/the/command/was/typed"])
    assert config._py_driver_sys_path == [str(package_folder().parent)]
    assert own_digest() == code_digest(package_folder())


def test_the_error_for_other_code_names_both_folders_and_what_to_do() -> None:
    message = str(other_code_error("/mine", "node 10.0.0.2", "/theirs"))
    assert "/mine" in message and "/theirs" in message and "10.0.0.2" in message and "make submit" in message
    assert "cannot import it" in str(other_code_error("/mine", "node 10.0.0.2", ""))
    message = str(other_code_error("/mine", "worker 0", "/mine"))  # the files were changed while the run trained
    assert "run the same command again" in message and "make submit" not in message


def test_a_worker_of_a_node_that_joined_later_with_other_code_ends_the_run(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(train_tokenizer(iter(()), vocab_size=258).files()[tokenizer.name])
    events, _ = run_worker(tiny_config().to_dict(), str(tokenizer), package="/mine", code="of another version")
    (failed,) = events
    assert isinstance(failed, RunFailed)
    assert all(part in failed.text for part in ("/mine", "worker 0", str(package_folder())))


DRIVER = """
import sys
import ray
from savant_ray.cluster.same_code import job_config, refuse_other_code
from savant_ray.errors import SavantError
for config in (job_config(), None):
    ray.init(sys.argv[1], job_config=config, log_to_driver=False, logging_level="ERROR")
    try:
        refuse_other_code()
        print("the same")
    except SavantError as error:
        print(error)
    ray.shutdown()
"""


@pytest.mark.slow
def test_nodes_that_import_other_code_than_the_driver_are_refused(head: Head, tmp_path: Path) -> None:
    """The second job has Ray's own configuration, so its workers import the installed package."""
    shutil.copytree(ROOT / "savant_ray", tmp_path / "savant_ray", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "savant_ray/events.py").open("a") as file:
        file.write("# another version\n")
    variables = environment(RAY_AUTH_MODE="disabled", PYTHONPATH=str(tmp_path))
    command = [sys.executable, "-c", DRIVER, head.address]
    done = subprocess.run(command, cwd="/", env=variables, text=True, capture_output=True, timeout=150)
    same, refused = done.stdout.split("\n", 1)
    assert same == "the same", done.stdout + done.stderr
    assert f"runs savant_ray from {tmp_path}/savant_ray, but node" in refused, done.stdout + done.stderr
    assert f"has another version of it in {ROOT}/savant_ray" in refused or "cannot import it" in refused
