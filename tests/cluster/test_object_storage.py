"""A run in object storage: nothing is half there, nothing is lost, and every machine finds the same."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from savant_ray.config import Config, load_config
from savant_ray.driver.checks import check_before_start
from savant_ray.driver.record_upload import RecordUploader
from savant_ray.driver.starting_point import find_start
from savant_ray.errors import CheckpointError, SavantError, SettingsError
from savant_ray.storage.local import Disk
from savant_ray.storage.object_store import ObjectStorage
from savant_ray.storage.ray_snapshot import SNAPSHOT
from savant_ray.storage.run_storage import on_this_machine, run_storage, storage_errors_explained
from savant_ray.training.checkpoint import MANIFEST, read_manifest, verify
from tests.cluster.conftest import ROOT
from tests.cluster.object_store import BUCKET, ObjectStore
from tests.cluster.test_starting_point import write


def keep(storage: ObjectStorage, *steps: int) -> None:
    for step in steps:
        write(storage.folder, step)
        assert storage.keep(storage.folder / f"step_{step}") == f"{BUCKET}/runs/run/step_{step}"


def test_a_checkpoint_that_is_sent_is_found_whole_on_another_machine(
    here: ObjectStorage, elsewhere: ObjectStorage
) -> None:
    keep(here, 9900, 10000)
    assert find_start(elsewhere, print) == elsewhere.folder / "step_10000"
    verify(elsewhere.folder / "step_10000")
    for storage in (here, elsewhere):
        assert [path.name for path in storage.folder.glob("step_*")] == ["step_10000"], "a mirror needs the newest only"
    assert here.complete_steps() == ["step_9900", "step_10000"]


def test_a_run_may_have_any_name_that_a_folder_may_have(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    name = "modèle a#b?c%20 [1] 实验"
    config = load_config(["--run.name", name, "--run.storage_path", store.uri("runs")], environment={})
    storage = run_storage(config)
    assert storage.path == f"{BUCKET}/runs/{name}" and storage.folder.name == name
    write(storage.folder, 5)
    storage.keep(storage.folder / "step_5")
    for checkpoint in (storage.location, storage.locate("step_5")):
        with on_this_machine(checkpoint) as folder:
            assert folder.name == "step_5"
    moved = storage.move_aside()
    assert moved is not None and storage.complete_steps() == []
    with on_this_machine(moved) as folder:
        assert folder.name == "step_5"


def test_the_manifest_is_sent_last_and_a_sending_that_died_is_no_checkpoint(
    here: ObjectStorage, elsewhere: ObjectStorage, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(here, 1)
    sent: list[str] = []
    upload = ObjectStorage._upload

    def dying(self: ObjectStorage, file: Path, target: str) -> None:
        if file.name == MANIFEST:
            raise OSError("the power is gone")
        sent.append(file.name)
        upload(self, file, target)

    monkeypatch.setattr(ObjectStorage, "_upload", dying)
    write(here.folder, 2)
    files = {file.name for file in (here.folder / "step_2").iterdir()}
    with pytest.raises(OSError, match=r"power.* whole in .*step_2\.unsent of this node"):
        here.keep(here.folder / "step_2")
    assert {file.name for file in (here.folder / "step_2.unsent").iterdir()} == files
    assert (
        set(sent) == files - {MANIFEST} and sent[-1] == "step_2.pt" and f"step_2/{sent[0]}" in store.names("runs/run")
    )
    said: list[str] = []
    assert find_start(elsewhere, said.append) == elsewhere.folder / "step_1"
    assert len(said) == 1 and "set aside as step_2.damaged" in said[0], "weights are never deleted in silence"
    assert {f"step_2.damaged/{name}" for name in sent} <= set(store.names("runs/run"))
    store.write("runs/run/step_3/config.yaml", b"the power was gone before the weights were sent")
    assert find_start(elsewhere, pytest.fail) == elsewhere.folder / "step_1"
    assert not any(name.startswith("step_3") for name in store.names("runs/run"))


def flip(store: ObjectStore, path: str) -> None:
    content = bytearray(store.read(path))
    content[300] ^= 4
    store.write(path, bytes(content))


def test_a_damaged_checkpoint_is_set_aside_there_and_the_next_older_one_taken(
    here: ObjectStorage, elsewhere: ObjectStorage, store: ObjectStore
) -> None:
    keep(here, 1, 2)
    flip(store, "runs/run/step_2/step_2.pt")
    said: list[str] = []
    assert find_start(elsewhere, said.append) == elsewhere.folder / "step_1"
    assert len(said) == 1 and "SHA-256" in said[0] and "set aside as step_2.damaged" in said[0]
    assert "step_2.damaged/step_2.pt" in store.names("runs/run") and elsewhere.complete_steps() == ["step_1"]
    flip(store, "runs/run/step_1/step_1.pt")
    shutil.rmtree(elsewhere.folder)
    with pytest.raises(CheckpointError, match="no complete checkpoint of it"):
        find_start(elsewhere, said.append)


def test_a_damaged_mirror_is_fetched_again_and_a_stale_one_dropped(here: ObjectStorage, store: ObjectStore) -> None:
    keep(here, 1)
    mirrored = here.folder / "step_1/step_1.pt"
    whole = mirrored.read_bytes()
    mirrored.write_bytes(whole[:100])
    write(here.folder, 7)  # of a run that is gone from the storage
    assert find_start(here, pytest.fail) == here.folder / "step_1" and mirrored.read_bytes() == whole
    assert not (here.folder / "step_7").exists()


def test_rays_list_names_what_is_there(here: ObjectStorage, store: ObjectStore) -> None:
    find_start(here, print)
    assert SNAPSHOT not in store.names("runs/run")
    keep(here, 5, 9900, 10000)
    find_start(here, print)
    listed = json.loads(store.read(f"runs/run/{SNAPSHOT}"))["checkpoint_results"]
    assert [result["checkpoint_dir_name"] for result in listed] == ["step_5", "step_9900", "step_10000"]


def record(storage: ObjectStorage, *times: str) -> None:
    storage.folder.mkdir(exist_ok=True)
    clock = "2026-01-01T{}:00+00:00"
    lines = (json.dumps({"event": "checkpoint", "step": 1, "time": clock.format(time)}) + "\n" for time in times)
    (storage.folder / "metrics.jsonl").write_text("".join(lines))
    (storage.folder / "training_log.txt").write_text(f"log until {times[-1]}")


def log_of(storage: ObjectStorage) -> str:
    return (storage.folder / "training_log.txt").read_text()


def test_the_later_record_counts_wherever_it_was_written(here: ObjectStorage, elsewhere: ObjectStorage) -> None:
    record(here, "10:00")
    with RecordUploader(here):
        pass
    elsewhere.fetch_records()
    assert log_of(elsewhere) == "log until 10:00"
    record(elsewhere, "10:00", "10:05")
    elsewhere.send_records()
    here.fetch_records()
    assert log_of(here) == "log until 10:05"
    record(here, "10:00", "10:05", "10:06")
    here.fetch_records()
    assert log_of(here) == "log until 10:06", "a driver that was killed had not sent it yet"


def test_the_record_of_a_run_that_is_gone_goes_aside(here: ObjectStorage) -> None:
    record(here, "10:00")
    here.fetch_records()
    assert find_start(here, print) is None
    assert sorted(path.name for path in here.folder.iterdir()) == ["metrics.jsonl.old", "training_log.txt.old"]


def test_fresh_moves_the_run_aside_there_and_loses_nothing(here: ObjectStorage, store: ObjectStore) -> None:
    assert here.move_aside() is None
    for expected in ("run.old", "run.old-2"):
        keep(here, 1)
        before = store.names("runs/run")
        assert here.move_aside() == store.uri(f"runs/{expected}")
        assert store.names(f"runs/{expected}") == before and store.names("runs/run") == []
        assert find_start(here, print) is None


@pytest.mark.parametrize("survived", range(10))
def test_fresh_killed_at_any_moment_loses_nothing(
    survived: int, here: ObjectStorage, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(here, 1)
    weights = store.read("runs/run/step_1/step_1.pt")
    here.filesystem = DyingAfter(here.filesystem, survived)  # type: ignore[assignment]
    with pytest.raises(OSError, match="the power"):
        here._move(here.path, f"{here.path}.old")
    again = ObjectStorage(here.location, here.folder)
    said: list[str] = []
    with suppress(CheckpointError):
        find_start(again, said.append)
    there = {name: store.read(f"runs/{name}") for name in store.names("runs") if name.endswith("step_1.pt")}
    assert weights in there.values()
    whole = [name for name in store.names("runs") if name.endswith("step_1/manifest.json")]
    assert whole and all(f"{name.rpartition('/')[0]}/step_1.pt" in there for name in whole)


class DyingAfter:
    """A file system whose process dies after so many copies and deletions."""

    def __init__(self, filesystem: Any, moments: int) -> None:
        self._filesystem, self._moments = filesystem, moments

    def __getattr__(self, name: str) -> Any:
        if name in ("copy_file", "delete_file", "delete_dir"):
            if self._moments == 0:
                raise OSError("the power is gone")
            self._moments -= 1
        return getattr(self._filesystem, name)


def test_a_checkpoint_there_is_named_by_its_uri(here: ObjectStorage, store: ObjectStore) -> None:
    keep(here, 1, 2)
    for uri, step in {store.uri("runs/run"): "step_2", store.uri("runs/run/step_1"): "step_1"}.items():
        with on_this_machine(uri) as folder:
            assert folder.name == step
            verify(folder)
        assert not folder.exists()
    for missing in ("runs/run/step_3", "runs/other"):
        with pytest.raises(CheckpointError, match="no checkpoint there"), on_this_machine(store.uri(missing)):
            pass
    with on_this_machine("a/run") as folder:
        assert folder == Path("a/run")


@pytest.mark.parametrize("uri", ["s3:///nothing", "unknown://bucket/run", "s3://bucket/run?colour=red"])
def test_a_uri_that_pyarrow_does_not_know_is_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no storage that could be used"):
        ObjectStorage(uri, tmp_path)


def test_no_such_bucket_and_no_server_are_told(here: ObjectStorage, store: ObjectStore, tmp_path: Path) -> None:
    missing = ObjectStorage(f"s3://nobody/run{store.query}", tmp_path / "missing")
    with pytest.raises(SavantError, match=r"run\.storage_path: s3://nobody/run.* cannot be read or written"):
        with storage_errors_explained(missing), missing.in_use():
            pass
    store.stop()
    try:
        with pytest.raises(SavantError, match="onnect"), storage_errors_explained(here), here.in_use():
            pass
    finally:
        store.start()


def test_wherever_a_replacement_there_is_interrupted_the_old_or_the_new_checkpoint_is_whole(
    here: ObjectStorage, store: ObjectStore, tmp_path: Path
) -> None:
    """The storage refuses everything from its Nth change on; then it is reached again, from another machine."""
    changes = 0
    found: list[str] = []
    for allowed in range(100):
        store.filesystem.delete_dir_contents(BUCKET)
        keep(here, 1)
        changes = 0

        def refuse(method: str, path: str, allowed: int = allowed) -> None:
            nonlocal changes
            changes += method in ("PUT", "POST", "DELETE")
            if changes > allowed:
                raise PermissionError

        store.before = refuse
        write(here.folder, 1, data="new")
        with suppress(OSError):
            here.keep(here.folder / "step_1")
        store.before = lambda method, path: None
        again = ObjectStorage(here.location, tmp_path / "again")
        start = find_start(again, lambda _: None)
        assert start is not None
        found.append(read_manifest(start)["data_fingerprint"])
        assert again.complete_steps() == ["step_1"]
        shutil.rmtree(again.folder)
        if changes <= allowed:
            break
    assert len(found) > 15 and found == ["abc"] * found.count("abc") + ["new"] * found.count("new"), found


def test_what_a_failed_sending_leaves_on_the_node_is_whole_and_the_mirror_goes_on(
    here: ObjectStorage, store: ObjectStore
) -> None:
    keep(here, 1)
    for step in (2, 2, 3):
        store.before = refuse_all
        write(here.folder, step)
        with pytest.raises(OSError, match=rf"lies whole in .*step_{step}\.unsent"):
            here.keep(here.folder / f"step_{step}")
        store.before = lambda method, path: None
        assert [path.name for path in here.folder.glob("step_*")] == [f"step_{step}.unsent"]
        (here.folder / f"step_{step}.unsent").rename(here.folder / f"step_{step}")
        verify(here.folder / f"step_{step}")
        (here.folder / f"step_{step}").rename(here.folder / f"step_{step}.unsent")
    keep(here, 4)
    assert [path.name for path in here.folder.glob("step_*")] == ["step_4"]


def refuse_all(method: str, path: str) -> None:
    raise PermissionError


def test_whether_a_checkpoint_is_there_is_seen_from_the_names(
    here: ObjectStorage, store: ObjectStore, tmp_path: Path
) -> None:
    keep(here, 1, 2)
    store.requests.clear()
    for name in ("runs/run", "runs/run/step_1"):
        settings = Config().to_dict()
        settings["run"] |= {"storage_path": str(tmp_path), "init_from": store.uri(name)}
        check_before_start(Config.from_dict(settings), Disk(tmp_path))
    assert store.requests and not [path for _, path in store.requests if "step_" in path]
    for name in ("runs/run/step_3", "runs/nothing"):
        settings["run"]["init_from"] = store.uri(name)
        with pytest.raises(CheckpointError, match="no checkpoint there"):
            check_before_start(Config.from_dict(settings), Disk(tmp_path))


RANKS = """
import os, sys
from pathlib import Path
import ray.train, torch.distributed as dist
from savant_ray.worker import resume
from savant_ray.storage.run_storage import on_this_machine

nodes, rendezvous, uri = sys.argv[1].split(","), *sys.argv[2:]
rank = 0
while rank < len(nodes) - 1 and os.fork() == 0:
    rank += 1
first_child = rank < len(nodes) - 1

class Context:
    def get_local_rank(self):
        return nodes[:rank].count(nodes[rank])

    def get_node_rank(self):
        return int(nodes[rank])

ray.train.get_context = Context
dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=len(nodes))
with resume.on_each_node(on_this_machine(uri)) as folder:
    os.write(1, f"{rank} {folder} {(folder / 'step_2.pt').stat().st_size}\\n".encode())  # a line in one piece
dist.barrier()
if first_child:
    os.wait()
"""


@pytest.mark.slow
def test_the_weights_that_a_run_begins_with_are_fetched_once_per_node(
    here: ObjectStorage, store: ObjectStore, tmp_path: Path
) -> None:
    keep(here, 1, 2)
    size = (here.folder / "step_2/step_2.pt").stat().st_size
    store.requests.clear()
    command = [sys.executable, "-c", RANKS, "0,0,1", str(tmp_path / "rendezvous"), store.uri("runs/run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    read = sorted(line.split() for line in done.stdout.splitlines())
    assert [(rank, int(bytes_)) for rank, _, bytes_ in read] == [("0", size), ("1", size), ("2", size)]
    folders = [folder for _, folder, _ in read]
    assert folders[0] == folders[1] != folders[2] and not any(Path(folder).exists() for folder in folders)
    fetched = [path for method, path in store.requests if method == "GET" and path.endswith("step_2.pt")]
    assert len(fetched) == 2


def test_a_full_disk_of_this_machine_is_not_taken_for_trouble_of_the_storage(
    here: ObjectStorage, elsewhere: ObjectStorage
) -> None:
    keep(here, 1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))  # as on a full disk: no file beyond 100 bytes
    try:
        with pytest.raises(
            SavantError, match=rf"^{elsewhere.folder}, the copy of s3://.* on this machine: .*too large"
        ):
            with storage_errors_explained(elsewhere):
                find_start(elsewhere, print)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert find_start(elsewhere, print) == elsewhere.folder / "step_1"
