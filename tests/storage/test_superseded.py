"""A process that no longer owns a run cannot change checkpoints, list or record of the new owner."""

from __future__ import annotations

import json
import pickle
import shutil
import threading
from pathlib import Path

import pytest
import torch

from savant_ray.errors import SavantError
from savant_ray.events import Event
from savant_ray.storage.lease import LEASE
from savant_ray.storage.local import LocalStorage
from savant_ray.storage.object_store import ObjectStorage
from savant_ray.storage.ray_snapshot import SNAPSHOT
from savant_ray.storage.run_storage import local_checkpoint
from savant_ray.storage.tolerant_file_system import tolerant_file_system
from savant_ray.training.checkpoint import MANIFEST, TOKENIZER, verify
from savant_ray.worker import saving
from savant_ray.worker.resume import newest_name
from savant_ray.worker.saving import Saver
from tests.cluster.test_starting_point import start_of, write
from tests.storage.object_store import ObjectStore
from tests.storage.test_lease import taken
from tests.storage.test_object_storage import record
from tests.worker.test_saving import content


@pytest.fixture
def worker(storage_a: ObjectStorage, tmp_path: Path) -> ObjectStorage:
    """Storage of a worker whose driver had the lease, lost its connection and does not renew it."""
    with taken(storage_a):
        sent = pickle.loads(pickle.dumps(storage_a))
        storage_a.expect_late_writes()
    sent.folder = tmp_path / "worker"
    return sent


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving.ray.train, "report", lambda *_, **__: None)


def save(storage: ObjectStorage, step: int, data: str) -> None:
    """Write and upload a checkpoint; `data` distinguishes it from another one of that step."""
    write(storage.folder, step, data=data)
    storage.commit(storage.folder / f"step_{step}")


def fingerprint(folder: Path) -> str:
    verify(folder)
    return str(json.loads((folder / MANIFEST).read_bytes())["data_fingerprint"])


def objects(store: ObjectStore, *names: str) -> dict[str, bytes]:
    """Return the files whose names begin so; without the lock, whose owner changes it every few seconds."""
    paths = (path for path in store.names("runs/run") if path.startswith(names) and path != ".lock")
    return {path: store.read(f"runs/run/{path}") for path in paths}


def newest(storage: ObjectStorage, tmp_path: Path) -> str:
    """Return the content of the newest checkpoint as a machine without a mirror finds it."""
    shutil.rmtree(tmp_path / "fresh", ignore_errors=True)
    start = start_of(ObjectStorage(storage.location, tmp_path / "fresh", storage.owner), lambda _: None)
    return "nothing" if start is None else f"{start.name} of {fingerprint(start)}"


def test_a_superseded_worker_saves_nothing_and_names_the_new_owner(
    worker: ObjectStorage, storage_b: ObjectStorage, store: ObjectStore, tmp_path: Path
) -> None:
    with taken(storage_b):
        save(storage_b, 500, "new")
        before = objects(store, "step_")
        with pytest.raises(SavantError, match=r"has taken the run over.*is complete in .*step_500\.unsent"):
            save(worker, 500, "old")
        with pytest.raises(SavantError, match="has taken the run over"):
            save(worker, 510, "old")
        with pytest.raises(SavantError, match="has taken the run over"):
            newest_name(worker)  # as in a worker that Ray restarts
        assert objects(store, "step_") == before
    assert newest(storage_b, tmp_path) == "step_500 of new"


@pytest.mark.parametrize(
    "moment", [*(pytest.param(file, marks=pytest.mark.rare) for file in ("config.yaml", "step_500.pt")), MANIFEST]
)
def test_an_upload_that_was_running_when_the_run_was_taken_over_does_not_change_new_checkpoints(
    moment: str, worker: ObjectStorage, storage_b: ObjectStorage, store: ObjectStore, tmp_path: Path
) -> None:
    """The worker was suspended during a request, after it had checked who owns the run."""
    suspended, may_continue = threading.Event(), threading.Event()

    def suspend(method: str, path: str) -> None:
        if path == f"runs/run/step_500/{moment}" and not suspended.is_set():
            suspended.set()
            may_continue.wait(20)

    def send() -> None:
        try:
            save(worker, 500, "old")
        except SavantError:
            outcomes.append("refused")

    save(worker, 490, "old")
    outcomes: list[str] = []
    store.before = suspend
    thread = threading.Thread(target=send)
    thread.start()
    assert suspended.wait(20)
    with taken(storage_b):
        start_of(storage_b, lambda _: None)
        save(storage_b, 500, "new")
        kept = objects(store, "step_500.1")
        assert len(kept) == 5
        may_continue.set()
        thread.join()
        assert objects(store, "step_500.1") == kept
        assert newest(storage_b, tmp_path) == "step_500 of new"
        assert outcomes == ([] if moment == MANIFEST else ["refused"]), "after its last check it commits"
        with local_checkpoint(store.uri("runs/run")) as folder:
            assert fingerprint(folder) == "new"
        storage_b.delete("step_500")
        assert not objects(store, "step_500/", "step_500.1/"), "the owner deletes the remains of both"


def test_a_superseded_controller_deletes_no_checkpoint_and_writes_no_list(
    worker: ObjectStorage, storage_b: ObjectStorage, store: ObjectStore
) -> None:
    save(worker, 490, "old")
    filesystem = pickle.loads(pickle.dumps(tolerant_file_system(worker.filesystem, worker)))
    with taken(storage_b):
        save(storage_b, 500, "new")
        store.write(f"runs/run/{SNAPSHOT}", b"new")
        before = objects(store, "")
        for step in (490, 500):
            filesystem.delete_dir(f"{worker.path}/step_{step}")
        with filesystem.open_output_stream(f"{worker.path}/{SNAPSHOT}") as file:
            file.write(b"old")
        record(worker, "10:00")
        with pytest.raises(OSError, match="another process trains this run"):
            worker.send_records()
        assert objects(store, "") == before
        wrapped = tolerant_file_system(storage_b.filesystem, storage_b)
        for step in (490, 500):
            wrapped.delete_dir(f"{worker.path}/step_{step}")
        assert not objects(store, "step_")


def test_a_deletion_that_was_running_when_the_run_was_taken_over_deletes_no_checkpoint_of_the_new_owner(
    worker: ObjectStorage, storage_b: ObjectStorage, store: ObjectStore, tmp_path: Path
) -> None:
    save(worker, 490, "old")
    suspended, may_continue = threading.Event(), threading.Event()

    def suspend(method: str, path: str) -> None:
        if method == "DELETE" and not suspended.is_set():
            suspended.set()
            may_continue.wait(20)

    store.before = suspend
    thread = threading.Thread(target=lambda: worker.delete("step_490"))
    thread.start()
    assert suspended.wait(20)
    with taken(storage_b):
        save(storage_b, 490, "new")
        may_continue.set()
        thread.join()
        assert newest(storage_b, tmp_path) == "step_490 of new"


def test_checkpoints_have_the_documented_names_if_every_process_of_the_run_ended(
    storage_a: ObjectStorage, storage_b: ObjectStorage, store: ObjectStore
) -> None:
    for storage, step in ((storage_a, 1), (storage_b, 2), (storage_a, 3)):
        with taken(storage):
            save(storage, step, "x")
    assert {name.partition("/")[0] for name in store.names("runs/run")} == {"step_1", "step_2", "step_3"}


def test_a_run_resumes_from_checkpoints_of_either_owner_and_sets_aside_a_damaged_one(
    worker: ObjectStorage, storage_b: ObjectStorage, store: ObjectStore, tmp_path: Path
) -> None:
    save(worker, 490, "old")
    save(worker, 500, "old")
    with taken(storage_b):
        save(storage_b, 500, "new")
        assert storage_b.checkpoints() == ["step_490", "step_500"]
        with local_checkpoint(store.uri("runs/run/step_500.1")) as folder:
            assert folder.name == "step_500" and fingerprint(folder) == "new"
    assert "step_500/manifest.json" not in store.names("runs/run"), "the newer copy has replaced it"
    damaged = bytearray(store.read("runs/run/step_500.1/step_500.pt"))
    damaged[300] ^= 4
    store.write("runs/run/step_500.1/step_500.pt", bytes(damaged))
    messages: list[str] = []
    with taken(storage_b):
        shutil.rmtree(storage_b.folder / "step_500")
        assert start_of(storage_b, messages.append) == storage_b.folder / "step_490"
    assert len(messages) == 1 and "set aside as step_500.damaged" in messages[0]


def outlived(folder: Path) -> LocalStorage:
    """Storage of a worker whose driver has died, in a local folder that another process now uses."""
    first = LocalStorage(folder)
    with first.in_use():
        worker: LocalStorage = pickle.loads(pickle.dumps(first))
    return worker


@pytest.mark.usefixtures("no_ray")
def test_in_a_local_folder_a_superseded_worker_saves_and_deletes_nothing(tmp_path: Path) -> None:
    worker = outlived(tmp_path)
    write(tmp_path, 500, data="new")
    events: list[Event] = []
    with LocalStorage(tmp_path).in_use():
        saver = Saver(worker, {}, [], events.append)
        saver.begin(500, "periodic", lambda: content(500), {})
        with pytest.raises(SavantError, match="another process trains this run now"):
            saver.finish()
        assert saver.finish() and not events, "it is raised once"
        tolerant_file_system(None, worker).delete_dir(f"{tmp_path}/step_500")
        assert fingerprint(tmp_path / "step_500") == "new"
    worker.folder.joinpath(LEASE).unlink()
    worker.check_owner()


@pytest.mark.usefixtures("no_ray")
def test_in_a_local_folder_a_checkpoint_that_was_being_written_when_the_run_was_taken_over_is_discarded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, torch_save = outlived(tmp_path), torch.save

    def slowly(*arguments: object) -> None:
        torch_save(*arguments)
        monkeypatch.setattr(torch, "save", torch_save)
        with LocalStorage(tmp_path).in_use():
            pass

    monkeypatch.setattr(torch, "save", slowly)
    saver = Saver(worker, {}, [], lambda event: 0)
    saver.begin(500, "periodic", lambda: content(500), {})
    with pytest.raises(SavantError, match="another process trains this run now"):
        saver.finish()
    assert not list(tmp_path.glob("step_*"))


def test_the_tokenizer_of_a_run_that_was_taken_over_is_found_for_init_from(
    storage_a: ObjectStorage, storage_b: ObjectStorage, store: ObjectStore, tmp_path: Path
) -> None:
    with taken(storage_a):
        save(storage_a, 500, "old")
        storage_a.expect_late_writes()
    with taken(storage_b):
        save(storage_b, 500, "new")
    for name in ("runs/run", "runs/run/step_500"):
        store.requests.clear()
        with local_checkpoint(store.uri(name), [MANIFEST, TOKENIZER]) as folder:
            assert json.loads((folder / MANIFEST).read_bytes())["data_fingerprint"] == "new"
            verify(folder, TOKENIZER)
        assert not [path for method, path in store.requests if method == "GET" and path.endswith(".pt")]
