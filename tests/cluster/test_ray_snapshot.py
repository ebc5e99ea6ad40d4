"""Ray Train's list of checkpoints: it is correct before Ray reads it, and failures to write it do not end a run."""

from __future__ import annotations

import asyncio
import pickle
import shutil
from pathlib import Path

import pytest
from ray.train import Checkpoint, CheckpointConfig
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.context import StorageContext
from ray.train.v2._internal.execution.training_report import _TrainingReport

from savant_ray.storage.local import LocalStorage
from savant_ray.storage.ray_snapshot import SNAPSHOT, rebuild_snapshot
from savant_ray.storage.tolerant_file_system import tolerant_file_system
from savant_ray.training.checkpoint import checkpoints
from tests.cluster.test_starting_point import start_of, write


def rays_manager(run: Path, keep: int = 3) -> CheckpointManager:
    """Return Ray Train's checkpoint manager, as it starts in the run folder."""
    storage = StorageContext(
        str(run.parent), run.name, storage_filesystem=pickle.loads(pickle.dumps(tolerant_file_system(None)))
    )
    return CheckpointManager(CheckpointConfig(num_to_keep=keep), storage)


def rays_checkpoints(run: Path) -> list[str]:
    return [Path(result.checkpoint.path).name for result in rays_manager(run)._checkpoint_results]


def save(manager: CheckpointManager, run: Path, step: int) -> list[str]:
    """Save a checkpoint as a worker does; return the remaining folders."""
    write(run, step)
    report = _TrainingReport(
        Checkpoint(str(run / f"step_{step}"), tolerant_file_system(None)), {"step": step}, validation=False
    )

    async def register() -> None:  # it notifies waiting tasks of its event loop
        manager.register_checkpoint(report)

    asyncio.run(register())
    return [folder.name for folder in checkpoints(run)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("keep", "left"), [(3, [1, 2, 3, 3, 3, 3]), (1, [1, 1, 1, 1, 1, 1])])
def test_the_newest_checkpoints_are_kept(keep: int, left: list[int], tmp_path: Path) -> None:
    run = tmp_path / "run"
    manager = rays_manager(run, keep)
    for step, expected in zip(range(9700, 10300, 100), left, strict=True):
        folders = save(manager, run, step)
        assert len(folders) == expected and folders[-1] == f"step_{step}"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_later_attempt_deletes_the_checkpoints_of_earlier_ones_in_step_order(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write(run, 10000, 9900, 5000)
    start_of(LocalStorage(run))
    assert save(rays_manager(run), run, 10100) == ["step_9900", "step_10000", "step_10100"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_unwritable_list_and_a_missing_checkpoint_do_not_end_a_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    manager = rays_manager(run, keep=1)
    assert save(manager, run, 1) == ["step_1"]
    (run / SNAPSHOT).unlink()
    (run / SNAPSHOT).mkdir()  # cannot be written
    shutil.rmtree(run / "step_1")
    assert save(manager, run, 2) == ["step_2"]
    (run / SNAPSHOT).rmdir()
    assert save(manager, run, 3) == ["step_3"] and rays_checkpoints(run) == ["step_3"]


def test_an_interrupted_deletion_leaves_no_checkpoint_that_looks_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # the process was killed
        tolerant_file_system(None, LocalStorage(tmp_path)).delete_dir(f"{tmp_path}/step_1")
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step_2"]
    assert start_of(LocalStorage(tmp_path), pytest.fail) == tmp_path / "step_2"
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_2"]


class FailingFileSystem:
    """A file system that fails while `fails` is set."""

    type_name = "failing"
    fails = True

    def __init__(self) -> None:
        self.deleted: list[str] = []

    def delete_dir(self, path: str) -> None:
        if self.fails:
            raise OSError("not now")
        if path == "gone":
            raise FileNotFoundError(path)
        self.deleted.append(path)


def test_a_checkpoint_that_could_not_be_deleted_is_deleted_with_the_next_one() -> None:
    filesystem = FailingFileSystem()
    tolerant_file_system(filesystem).delete_dir("run/step_1")
    filesystem.fails = False
    for path in ("gone", "run/step_2"):
        tolerant_file_system(filesystem).delete_dir(path)
    assert filesystem.deleted == ["run/step_1", "run/step_2"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("damage", ["truncated", "missing", "names folders that are gone", "empty"])
def test_rays_list_of_checkpoints_is_rebuilt_before_ray_reads_it(damage: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write(run, 5, 9900, 10000)
    snapshot = run / SNAPSHOT
    write(run, 20000)
    rebuild_snapshot(LocalStorage(run))
    shutil.rmtree(run / "step_20000")
    if damage == "truncated":
        snapshot.write_bytes(snapshot.read_bytes()[:100])
    elif damage == "missing":
        snapshot.unlink()
    elif damage == "empty":
        snapshot.write_bytes(b"")
    start_of(LocalStorage(run))
    assert rays_checkpoints(run) == ["step_5", "step_9900", "step_10000"]


def test_without_checkpoints_rays_list_is_removed(tmp_path: Path) -> None:
    (tmp_path / SNAPSHOT).write_text("{")
    start_of(LocalStorage(tmp_path))
    assert not (tmp_path / SNAPSHOT).exists()
