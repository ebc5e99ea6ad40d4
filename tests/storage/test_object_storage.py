"""A run in object storage: partial checkpoints are not used, nothing is lost, and all machines see the same run."""

from __future__ import annotations

import gzip
import itertools
import json
import resource
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from savant_ray.config import Config, load_config
from savant_ray.driver.checks import check_before_start
from savant_ray.driver.record_upload import RecordUploader
from savant_ray.errors import CheckpointError, SavantError, SettingsError
from savant_ray.storage.lease import LEASE
from savant_ray.storage.local import LocalStorage
from savant_ray.storage.object_store import ObjectStorage
from savant_ray.storage.ray_snapshot import SNAPSHOT
from savant_ray.storage.run_storage import local_checkpoint, run_storage, storage_errors_explained
from savant_ray.training.checkpoint import MANIFEST, left_out_file, read_manifest, verify
from savant_ray.worker.resume import load_newest
from tests.cluster.conftest import ROOT
from tests.cluster.test_starting_point import start_of, write
from tests.storage.object_store import BUCKET, ObjectStore
from tests.training.tiny import tiny_config, tiny_state


def keep(storage: ObjectStorage, *steps: int) -> None:
    for step in steps:
        write(storage.folder, step)
        storage.commit(storage.folder / f"step_{step}")


def test_an_uploaded_checkpoint_is_intact_on_another_machine(
    storage_a: ObjectStorage, storage_b: ObjectStorage
) -> None:
    keep(storage_a, 9900, 10000)
    assert start_of(storage_b) == storage_b.folder / "step_10000"
    verify(storage_b.folder / "step_10000")
    for storage in (storage_a, storage_b):
        assert [path.name for path in storage.folder.glob("step_*")] == ["step_10000"], "a mirror keeps the newest only"
    assert storage_a.checkpoints() == ["step_9900", "step_10000"]


def test_a_run_in_object_storage_can_have_any_name_that_is_valid_for_a_folder(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    name = "modèle a#b?c%20 [1] 实验"
    config = load_config(["--run.name", name, "--run.storage_path", store.uri("runs")], environment={})
    storage = run_storage(config)
    assert storage.path == f"{BUCKET}/runs/{name}" and storage.folder.name == name
    write(storage.folder, 5)
    storage.commit(storage.folder / "step_5")
    for checkpoint in (storage.location, storage.locate("step_5")):
        with local_checkpoint(checkpoint) as folder:
            assert folder.name == "step_5"
    moved = storage.move_aside()
    assert moved is not None and storage.checkpoints() == []
    with local_checkpoint(moved) as folder:
        assert folder.name == "step_5"


def test_the_manifest_is_uploaded_last_so_that_an_interrupted_upload_is_not_a_checkpoint(
    storage_a: ObjectStorage, storage_b: ObjectStorage, store: ObjectStore
) -> None:
    keep(storage_a, 1)

    def refuse_manifest(method: str, path: str) -> None:
        if method == "PUT" and path.endswith(f"step_2/{MANIFEST}"):
            raise PermissionError

    store.before = refuse_manifest
    write(storage_a.folder, 2)
    files = {file.name for file in (storage_a.folder / "step_2").iterdir()}
    store.requests.clear()
    with pytest.raises(OSError, match=r"complete in .*step_2\.unsent on this node"):
        storage_a.commit(storage_a.folder / "step_2")
    *sent, last = (path.rpartition("/")[2] for method, path in store.requests if method == "PUT" and "/step_2/" in path)
    assert {file.name for file in (storage_a.folder / "step_2.unsent").iterdir()} == files
    assert last == MANIFEST and set(sent) == files - {MANIFEST} and sent[-1] == "step_2.pt"
    assert f"step_2/{sent[0]}" in store.names("runs/run")
    messages: list[str] = []
    assert start_of(storage_b, messages.append) == storage_b.folder / "step_1"
    assert len(messages) == 1 and "set aside as step_2.damaged" in messages[0], "weights are never deleted silently"
    assert {f"step_2.damaged/{name}" for name in sent} <= set(store.names("runs/run"))
    store.write("runs/run/step_3/config.yaml", b"the power was gone before the weights were sent")
    assert start_of(storage_b, pytest.fail) == storage_b.folder / "step_1"
    assert not any(name.startswith("step_3") for name in store.names("runs/run"))


def flip(store: ObjectStore, path: str) -> None:
    content = bytearray(store.read(path))
    content[300] ^= 4
    store.write(path, bytes(content))


def test_a_damaged_checkpoint_in_object_storage_is_set_aside_and_the_next_older_one_used(
    storage_a: ObjectStorage, storage_b: ObjectStorage, store: ObjectStore
) -> None:
    keep(storage_a, 1, 2)
    flip(store, "runs/run/step_2/step_2.pt")
    messages: list[str] = []
    assert start_of(storage_b, messages.append) == storage_b.folder / "step_1"
    assert len(messages) == 1 and "SHA-256" in messages[0] and "set aside as step_2.damaged" in messages[0]
    assert "step_2.damaged/step_2.pt" in store.names("runs/run") and storage_b.checkpoints() == ["step_1"]
    flip(store, "runs/run/step_1/step_1.pt")
    shutil.rmtree(storage_b.folder)
    with pytest.raises(CheckpointError, match="no complete checkpoint of it"):
        start_of(storage_b, messages.append)


def test_a_damaged_mirror_is_downloaded_again_and_a_stale_one_deleted(
    storage_a: ObjectStorage, store: ObjectStore
) -> None:
    keep(storage_a, 1)
    mirrored = storage_a.folder / "step_1/step_1.pt"
    whole = mirrored.read_bytes()
    mirrored.write_bytes(whole[:100])
    write(storage_a.folder, 7)  # of a run that was deleted from the storage
    assert start_of(storage_a, pytest.fail) == storage_a.folder / "step_1" and mirrored.read_bytes() == whole
    assert not (storage_a.folder / "step_7").exists()


def test_rays_list_contains_the_stored_checkpoints(storage_a: ObjectStorage, store: ObjectStore) -> None:
    start_of(storage_a)
    assert SNAPSHOT not in store.names("runs/run")
    keep(storage_a, 5, 9900, 10000)
    start_of(storage_a)
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


def test_the_newer_record_is_used_wherever_it_was_written(storage_a: ObjectStorage, storage_b: ObjectStorage) -> None:
    record(storage_a, "10:00")
    with RecordUploader(storage_a):
        pass
    storage_b.fetch_records()
    assert log_of(storage_b) == "log until 10:00"
    record(storage_b, "10:00", "10:05")
    storage_b.send_records()
    storage_a.fetch_records()
    assert log_of(storage_a) == "log until 10:05"
    record(storage_a, "10:00", "10:05", "10:06")
    storage_a.fetch_records()
    assert log_of(storage_a) == "log until 10:06", "a killed driver had not uploaded it"


def test_the_record_of_the_last_owner_is_used_whatever_the_clocks_of_the_machines(
    storage_a: ObjectStorage, storage_b: ObjectStorage
) -> None:
    """The clock of machine a is two hours fast."""
    record(storage_a, "12:00", "12:05")
    storage_a.send_records()
    record(storage_a, "12:00", "12:05", "12:06")  # killed before it had uploaded the last line
    storage_b.fetch_records()
    record(storage_b, "12:00", "12:05", "10:30", "10:35")
    storage_b.send_records()
    storage_a.fetch_records()
    assert log_of(storage_a) == "log until 10:35"
    record(storage_a, "12:00", "12:05", "10:30", "10:35", "12:40")
    storage_a.fetch_records()
    assert log_of(storage_a) == "log until 12:40"


def test_the_record_of_an_earlier_run_of_that_name_is_not_mixed_with_the_present_one(
    storage_a: ObjectStorage, storage_b: ObjectStorage
) -> None:
    """The clock of the machine with the earlier run is fast, so its record has the newer last line."""
    record(storage_a, "10:00", "11:00")
    storage_a.send_records()
    assert storage_b.move_aside() is not None, "--fresh on another machine"
    record(storage_b, "10:30", "10:35")
    storage_b.send_records()
    (storage_a.folder / "samples.jsonl").write_text("of the earlier run")
    (storage_a.folder / "tensorboard").mkdir()
    storage_a.fetch_records()
    assert log_of(storage_a) == "log until 10:35"
    kept = {path.name for path in storage_a.folder.iterdir()}
    assert {"training_log.txt.old", "samples.jsonl.old", "tensorboard.old"} <= kept
    assert not {"samples.jsonl", "tensorboard"} & kept


def test_a_profile_is_stored_beside_the_checkpoints_and_moved_with_them(
    storage_a: ObjectStorage, store: ObjectStore, tmp_path: Path
) -> None:
    keep(storage_a, 1)
    trace, name = tmp_path / "trace", "profile/rank0-step2.pt.trace.json.gz"
    trace.write_bytes(gzip.compress(b"trace"))
    assert storage_a.store_file(trace, name) == store.uri(f"runs/run/{name}")
    with storage_a.filesystem.open_input_file(f"{storage_a.path}/{name}") as stored:
        assert stored.read() == trace.read_bytes(), "not compressed a second time"
    storage_a.remove_unfinished()
    assert name in store.names("runs/run") and storage_a.checkpoints() == ["step_1"]
    assert storage_a.move_aside() == store.uri("runs/run.old")
    assert name in store.names("runs/run.old")


def test_what_rewinds_have_left_out_is_read_on_another_machine_also_without_a_checkpoint(
    storage_a: ObjectStorage, storage_b: ObjectStorage, tmp_path: Path
) -> None:
    config = tiny_config()
    for left_out in ([[4, 2]], [[4, 2], [10, 3]]):
        (tmp_path / "new").write_text(json.dumps(left_out))
        storage_a.store_file(tmp_path / "new", left_out_file("1234"))
        state, other_text = tiny_state(config), tiny_state(config)
        state.data_fingerprint = "1234"
        load_newest(state, config, storage_b, allow_changes=False)
        load_newest(other_text, config, storage_b, allow_changes=False)
        assert state.left_out == tuple(map(tuple, left_out)) and other_text.left_out == ()
    storage_b.remove_unfinished()
    assert left_out_file("1234") in storage_b.file_names()


def test_the_record_of_a_deleted_run_is_set_aside(storage_a: ObjectStorage) -> None:
    record(storage_a, "10:00")
    storage_a.fetch_records()
    assert start_of(storage_a) is None
    assert sorted(path.name for path in storage_a.folder.iterdir()) == ["metrics.jsonl.old", "training_log.txt.old"]


def test_fresh_moves_a_run_in_object_storage_aside_and_loses_nothing(
    storage_a: ObjectStorage, store: ObjectStore
) -> None:
    assert storage_a.move_aside() is None
    for expected in ("run.old", "run.old-2"):
        keep(storage_a, 1)
        before = store.names("runs/run")
        assert storage_a.move_aside() == store.uri(f"runs/{expected}")
        assert store.names(f"runs/{expected}") == before and store.names("runs/run") == []
        assert start_of(storage_a) is None


@pytest.mark.parametrize("survived", range(10))
def test_fresh_killed_at_any_moment_loses_nothing(survived: int, storage_a: ObjectStorage, store: ObjectStore) -> None:
    keep(storage_a, 1)
    weights = store.read("runs/run/step_1/step_1.pt")
    changes = itertools.count()

    def die(method: str, path: str) -> None:
        """Refuse all changes after the first `survived` ones of files other than the lease."""
        if method in ("PUT", "POST", "DELETE") and not path.endswith(LEASE) and next(changes) >= survived:
            raise PermissionError

    store.before = die
    with pytest.raises(OSError, match="ACCESS_DENIED|AccessDenied|403"):
        storage_a.move_aside()
    store.before = lambda method, path: None
    again = ObjectStorage(storage_a.location, storage_a.folder)
    said: list[str] = []
    with suppress(CheckpointError):
        start_of(again, said.append)
    there = {name: store.read(f"runs/{name}") for name in store.names("runs") if name.endswith("step_1.pt")}
    assert weights in there.values()
    whole = [name for name in store.names("runs") if name.endswith("step_1/manifest.json")]
    assert whole and all(f"{name.rpartition('/')[0]}/step_1.pt" in there for name in whole)


def test_a_checkpoint_in_object_storage_can_be_named_by_its_uri(storage_a: ObjectStorage, store: ObjectStore) -> None:
    keep(storage_a, 1, 2)
    for uri, step in {store.uri("runs/run"): "step_2", store.uri("runs/run/step_1"): "step_1"}.items():
        with local_checkpoint(uri) as folder:
            assert folder.name == step
            verify(folder)
        assert not folder.exists()
    for missing in ("runs/run/step_3", "runs/other"):
        with pytest.raises(CheckpointError, match="no checkpoint there"), local_checkpoint(store.uri(missing)):
            pass
    with local_checkpoint("a/run") as folder:
        assert folder == Path("a/run")


@pytest.mark.parametrize("uri", ["s3:///nothing", "unknown://bucket/run", "s3://bucket/run?colour=red"])
def test_a_uri_that_pyarrow_does_not_support_is_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="the file system cannot be used"):
        ObjectStorage(uri, tmp_path)


def test_a_missing_bucket_and_a_missing_server_are_reported(
    storage_a: ObjectStorage, store: ObjectStore, tmp_path: Path
) -> None:
    missing = ObjectStorage(f"s3://nobody/run{store.query}", tmp_path / "missing")
    with pytest.raises(SavantError, match=r"run\.storage_path: s3://nobody/run.* cannot be read or written"):
        with storage_errors_explained(missing), missing.in_use():
            pass
    store.stop()
    try:
        with pytest.raises(SavantError, match="onnect"), storage_errors_explained(storage_a), storage_a.in_use():
            pass
    finally:
        store.start()


def test_if_a_replacement_in_object_storage_is_interrupted_anywhere_the_old_or_the_new_checkpoint_is_intact(
    storage_a: ObjectStorage, store: ObjectStore, tmp_path: Path
) -> None:
    """The storage fails from its Nth change on; then another machine reads it."""
    changes = 0
    found: list[str] = []
    for allowed in range(100):
        store.filesystem.delete_dir_contents(BUCKET)
        keep(storage_a, 1)
        changes = 0

        def refuse(method: str, path: str, allowed: int = allowed) -> None:
            nonlocal changes
            changes += method in ("PUT", "POST", "DELETE")
            if changes > allowed:
                raise PermissionError

        store.before = refuse
        write(storage_a.folder, 1, data="new")
        with suppress(OSError):
            storage_a.commit(storage_a.folder / "step_1")
        store.before = lambda method, path: None
        again = ObjectStorage(storage_a.location, tmp_path / "again")
        start = start_of(again, lambda _: None)
        assert start is not None
        found.append(read_manifest(start)["data_fingerprint"])
        assert again.checkpoints() == ["step_1"]
        shutil.rmtree(again.folder)
        if changes <= allowed:
            break
    assert len(found) > 15 and found == ["abc"] * found.count("abc") + ["new"] * found.count("new"), found


def test_a_checkpoint_whose_upload_failed_is_intact_on_the_node_and_the_mirror_remains_usable(
    storage_a: ObjectStorage, store: ObjectStore
) -> None:
    keep(storage_a, 1)
    for step in (2, 2, 3):
        store.before = refuse_all
        write(storage_a.folder, step)
        with pytest.raises(OSError, match=rf"is complete in .*step_{step}\.unsent"):
            storage_a.commit(storage_a.folder / f"step_{step}")
        store.before = lambda method, path: None
        assert [path.name for path in storage_a.folder.glob("step_*")] == [f"step_{step}.unsent"]
        (storage_a.folder / f"step_{step}.unsent").rename(storage_a.folder / f"step_{step}")
        verify(storage_a.folder / f"step_{step}")
        (storage_a.folder / f"step_{step}").rename(storage_a.folder / f"step_{step}.unsent")
    keep(storage_a, 4)
    assert [path.name for path in storage_a.folder.glob("step_*")] == ["step_4"]


def refuse_all(method: str, path: str) -> None:
    raise PermissionError


def test_checking_that_a_checkpoint_exists_downloads_nothing(
    storage_a: ObjectStorage, store: ObjectStore, tmp_path: Path
) -> None:
    keep(storage_a, 1, 2)
    store.requests.clear()
    for name in ("runs/run", "runs/run/step_1"):
        settings = Config().to_dict()
        settings["run"] |= {"storage_path": str(tmp_path), "init_from": store.uri(name)}
        check_before_start(Config.from_dict(settings), LocalStorage(tmp_path))
    assert store.requests and not [path for _, path in store.requests if "step_" in path]
    for name in ("runs/run/step_3", "runs/nothing"):
        settings["run"]["init_from"] = store.uri(name)
        with pytest.raises(CheckpointError, match="no checkpoint there"):
            check_before_start(Config.from_dict(settings), LocalStorage(tmp_path))


RANKS = """
import os, sys
from pathlib import Path
import ray.train, torch.distributed as dist
from savant_ray.worker import resume
from savant_ray.storage.run_storage import local_checkpoint

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
with resume.on_each_node(local_checkpoint(uri)) as folder:
    os.write(1, f"{rank} {folder} {(folder / 'step_2.pt').stat().st_size}\\n".encode())  # in one write
dist.barrier()
if first_child:
    os.wait()
"""


@pytest.mark.slow
def test_initial_weights_are_downloaded_once_per_node(
    storage_a: ObjectStorage, store: ObjectStore, tmp_path: Path
) -> None:
    keep(storage_a, 1, 2)
    size = (storage_a.folder / "step_2/step_2.pt").stat().st_size
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


def test_a_full_local_disk_is_not_reported_as_an_error_of_the_storage(
    storage_a: ObjectStorage, storage_b: ObjectStorage
) -> None:
    keep(storage_a, 1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))  # as on a full disk: no file beyond 100 bytes
    try:
        with pytest.raises(
            SavantError, match=rf"^{storage_b.folder}, the copy of s3://.* on this machine: .*too large"
        ):
            with storage_errors_explained(storage_b):
                start_of(storage_b)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert start_of(storage_b) == storage_b.folder / "step_1"
