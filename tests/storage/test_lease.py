"""The lease of a run in object storage: at most one process trains a run, and a dead process does not block it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
from werkzeug.serving import make_server

from savant_ray.errors import SavantError
from savant_ray.storage import lease as lease_module
from savant_ray.storage.conditional_write import PlainObject, VersionConflictError, conditional_object
from savant_ray.storage.lease import LEASE, leased
from savant_ray.storage.object_store import ObjectStorage
from tests.cluster.conftest import wait_for
from tests.storage.object_store import BUCKET, ObjectStore
from tests.storage.test_object_storage import record


@pytest.fixture
def short_lease_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "RENEWAL_SECONDS", 0.1)
    monkeypatch.setattr(lease_module, "EXPIRY_SECONDS", 2.0)
    monkeypatch.setattr(lease_module, "SETTLE_SECONDS", 0.1)


def is_lost(storage: ObjectStorage) -> bool:
    try:
        storage.refuse_if_lost()
    except SavantError:
        return True
    return False


@pytest.mark.usefixtures("short_lease_times")
def test_a_run_that_another_process_uses_is_refused_on_any_machine(
    storage_a: ObjectStorage, storage_b: ObjectStorage, store: ObjectStore
) -> None:
    with storage_a.in_use():
        with pytest.raises(SavantError, match=f"in use by process {os.getpid()} on {socket.gethostname()}"):
            with storage_b.in_use():
                pass
        with pytest.raises(SavantError, match="in use"), storage_a.in_use():
            pass
    assert LEASE not in store.names("runs/run")
    with storage_b.in_use():
        pass


@pytest.mark.usefixtures("short_lease_times")
def test_a_process_that_lost_its_lease_stops_and_changes_nothing_in_the_run(
    storage_a: ObjectStorage, storage_b: ObjectStorage, store: ObjectStore
) -> None:
    record(storage_a, "10:00")
    with storage_a.in_use():
        storage_a.refuse_if_lost()
        taken = json.dumps({"token": "x", "process": 7, "host": "another-machine", "beat": 1}).encode()
        store.write(f"runs/run/{LEASE}", taken)
        wait_for(lambda: is_lost(storage_a), 20)
        with pytest.raises(SavantError, match="process 7 on another-machine has taken the run over"):
            storage_a.refuse_if_lost()
        with pytest.raises(OSError, match="another process trains this run"):
            storage_a.send_records()
        assert store.read(f"runs/run/{LEASE}") == taken
    assert store.read(f"runs/run/{LEASE}") == taken and store.names("runs/run") == [LEASE]


@pytest.mark.usefixtures("short_lease_times")
def test_the_lease_of_a_dead_process_is_taken_over(storage_a: ObjectStorage, store: ObjectStore) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    messages: list[str] = []
    for host in (socket.gethostname(), "another-machine"):
        mark = {"token": "x", "process": gone.pid, "host": host, "beat": 3}
        store.write(f"runs/run/{LEASE}", json.dumps(mark).encode())
        with leased(storage_a.filesystem, storage_a.path, messages.append):
            assert json.loads(store.read(f"runs/run/{LEASE}"))["process"] == os.getpid()
    assert len(messages) == 1 and "process" in messages[0] and "on another-machine may still train" in messages[0]


@contextmanager
def taken(storage: ObjectStorage) -> Iterator[ObjectStorage]:
    """Take the run over without waiting for the lease to expire, and release it at the end of the `with` block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease_module, "EXPIRY_SECONDS", 0.0)
        patch.setattr(lease_module, "SETTLE_SECONDS", 0.0)
        use = storage.in_use(lambda _: None)
        use.__enter__()
    try:
        yield storage
    finally:
        use.__exit__(None, None, None)


def starters(store: ObjectStore, folder: Path, number: int) -> list[str]:
    """Start the run `number` times simultaneously, on different machines; return "trains" or the error of each.

    All have read the lease before any of them writes it.
    """
    outcomes: list[str] = []
    all_have_read, all_have_tried = threading.Barrier(number), threading.Barrier(number)
    seen: set[int] = set()

    def pause(method: str, path: str) -> None:
        thread = threading.get_ident()
        if method == "PUT" and path.endswith(LEASE) and thread not in seen and len(seen) < number:
            seen.add(thread)
            all_have_read.wait(20)

    def start(machine: int) -> None:
        storage = ObjectStorage(store.uri("runs/run"), folder / f"machine-{machine}")
        try:
            with storage.in_use(lambda _: None):
                outcomes.append("trains")
                all_have_tried.wait(20)
        except SavantError as refusal:
            outcomes.append(str(refusal))
            all_have_tried.wait(20)

    store.before = pause
    threads = [threading.Thread(target=start, args=(machine,)) for machine in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


@pytest.mark.parametrize("left_behind", [None, {"token": "x", "process": 7, "host": "another-machine", "beat": 3}])
def test_if_processes_start_a_run_simultaneously_exactly_one_trains_even_with_slow_writes(
    left_behind: dict[str, object] | None, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "EXPIRY_SECONDS", 0.2)
    monkeypatch.setattr(lease_module, "RENEWAL_SECONDS", 0.1)
    monkeypatch.setattr(lease_module, "SETTLE_SECONDS", 0.0)
    if left_behind is not None:
        store.write(f"runs/run/{LEASE}", json.dumps(left_behind).encode())
    outcomes = starters(store, tmp_path, 3)
    assert outcomes.count("trains") == 1
    assert [outcome for outcome in outcomes if "in use by process" not in outcome] == ["trains"]


@pytest.mark.usefixtures("short_lease_times")
@pytest.mark.parametrize("conditions", ["ignored", "refused"])
def test_a_storage_without_conditional_writes_is_reported_and_a_run_in_use_is_refused(
    conditions: str, storage_a: ObjectStorage, storage_b: ObjectStorage, store: ObjectStore
) -> None:
    store.conditions = conditions
    messages: list[str] = []
    with storage_a.in_use(messages.append):
        assert len(messages) == 1 and "no conditional writes" in messages[0] and "Start this run once" in messages[0]
        with pytest.raises(SavantError, match="in use by process"), storage_b.in_use(messages.append):
            pass
    assert store.names("runs/run") == []
    with storage_b.in_use(messages.append):
        storage_b.check_owner()


@pytest.mark.usefixtures("short_lease_times")
def test_without_conditional_writes_the_last_writer_acquires_the_lease(tmp_path: Path) -> None:
    filesystem = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    filesystem.create_dir("run")
    with leased(filesystem, "run", pytest.fail) as first:
        with pytest.raises(SavantError, match="in use"), leased(filesystem, "run", lambda _: None):
            pass
        first.refuse_if_lost()
    with leased(filesystem, "run", pytest.fail):
        pass


def test_a_claim_is_never_read_as_released_while_it_is_being_written(tmp_path: Path) -> None:
    """A file that is opened for writing is empty for a moment, and its reader must not take it for a released lease."""
    claim = PlainObject(pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()), "claim")
    claim.write(b"claim", None)
    done = threading.Event()

    def renew() -> None:
        while not done.wait(0.0005):
            claim.write(b"claim", None)

    writer = threading.Thread(target=renew)
    writer.start()
    try:
        assert {claim.read()[0] for _ in range(2000)} == {b"claim"}
    finally:
        done.set()
        writer.join()


def test_a_lease_whose_writer_died_while_writing_it_is_acquired(tmp_path: Path) -> None:
    (tmp_path / LEASE).touch()
    with leased(pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()), ".", pytest.fail) as lease:
        assert json.loads((tmp_path / LEASE).read_text())["token"] == lease.owner.token
    assert not (tmp_path / LEASE).exists()


def test_a_holder_that_continues_after_its_lease_was_taken_over_stops(
    storage_a: ObjectStorage, storage_b: ObjectStorage, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder is suspended, as by Ctrl+Z, and continues when the run has another owner."""
    monkeypatch.setattr(lease_module, "RENEWAL_SECONDS", 1.0)  # a renewal during the takeover would prevent it
    with storage_a.in_use():
        with taken(storage_b):
            wait_for(lambda: is_lost(storage_a), 20)
            with pytest.raises(SavantError, match="has taken the run over"):
                storage_a.refuse_if_lost()
            with pytest.raises(SavantError, match="has taken the run over"):
                storage_a.check_owner()
            storage_b.check_owner()
    assert json.loads(store.read(f"runs/run/{LEASE}"))["released"] == "clean", "the first process does not change it"


def test_the_epoch_is_incremented_if_workers_may_still_write_and_never_decreases(
    storage_a: ObjectStorage, storage_b: ObjectStorage, store: ObjectStore
) -> None:
    def epoch(storage: ObjectStorage) -> int:
        assert storage.owner is not None
        return storage.owner.epoch

    with taken(storage_a):
        assert epoch(storage_a) == 0
    with taken(storage_a):
        assert epoch(storage_a) == 0, "the previous owner has ended its workers"
        with taken(storage_b):
            assert epoch(storage_b) == 1, "the previous owner may have workers"
    with taken(storage_a):
        assert epoch(storage_a) == 1
        storage_a.expect_late_writes()
    with taken(storage_b):
        assert epoch(storage_b) == 2
    record(storage_b, "10:00")
    storage_b.send_records()
    assert storage_b.move_aside() is not None
    with taken(storage_a):
        assert epoch(storage_a) == 2, "--fresh does not decrease it"
    store.write("runs/run/step_5.4/manifest.json", b"{}")
    storage_a.filesystem.delete_file(f"{storage_a.path}/{LEASE}")
    with taken(storage_a):
        assert epoch(storage_a) == 4, "removing the lease does not decrease it"


def test_a_lease_that_was_deleted_by_hand_is_written_again(
    storage_a: ObjectStorage, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "RENEWAL_SECONDS", 0.05)
    with storage_a.in_use():
        storage_a.filesystem.delete_file(f"{storage_a.path}/{LEASE}")
        storage_a.check_owner()
        wait_for(lambda: LEASE in store.names("runs/run"), 20)
        storage_a.refuse_if_lost()
        assert storage_a.owner is not None and storage_a.owner.token in store.read(f"runs/run/{LEASE}").decode()


@pytest.mark.usefixtures("short_lease_times")
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b'"x"', b'{"epoch": "x", "process": "y", "beat": null}', b"\xff"]
)
def test_an_invalid_lease_is_replaced(content: bytes, storage_a: ObjectStorage, store: ObjectStore) -> None:
    store.write(f"runs/run/{LEASE}", content)
    with storage_a.in_use(lambda _: None):
        storage_a.check_owner()
        assert storage_a.owner is not None and storage_a.owner.token in store.read(f"runs/run/{LEASE}").decode()


def test_a_process_of_another_container_or_machine_of_the_same_name_is_not_considered_dead(
    storage_a: ObjectStorage, store: ObjectStore, short_lease_times: None
) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    mark = {"token": "x", "process": gone.pid, "host": socket.gethostname(), "machine": "another", "beat": 3}
    store.write(f"runs/run/{LEASE}", json.dumps(mark).encode())
    messages: list[str] = []
    with storage_a.in_use(messages.append):
        assert len(messages) == 1 and "may still train" in messages[0]


def test_conditional_writes_use_the_access_keys_of_an_aws_profile(
    storage_a: ObjectStorage, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "keys").write_text("[work]\naws_access_key_id = test\naws_secret_access_key = test%\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    monkeypatch.setenv("AWS_PROFILE", "work")
    found = conditional_object(storage_a.filesystem, f"{BUCKET}/runs/run/object")
    assert found is not None
    found.write(b"1", None)
    with pytest.raises(VersionConflictError):
        found.write(b"2", None)
    assert store.read("runs/run/object") == b"1"


class Generations:
    """The part of Google Cloud Storage that a lease needs: objects with generations and conditional writes."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[int, bytes]] = {}

    def __call__(self, request: dict[str, Any], respond: Callable[..., Any]) -> list[bytes]:
        path = request["PATH_INFO"]
        generation, content = self.objects.get(path, (0, b""))
        if request["REQUEST_METHOD"] == "PUT":
            if request.get("HTTP_X_GOOG_IF_GENERATION_MATCH") not in (None, str(generation)):
                respond("412 Precondition Failed", [])
                return [b""]
            generation, content = generation + 10, request["wsgi.input"].read(int(request["CONTENT_LENGTH"]))
            self.objects[path] = generation, content
        if not generation:
            respond("404 Not Found", [])
            return [b""]
        headers = {"x-goog-generation": str(generation), "ETag": f'"{generation}"', "Content-Length": str(len(content))}
        respond("200 OK", [*headers.items(), ("Last-Modified", "Thu, 26 Nov 2026 09:21:38 GMT")])
        return [content]


def test_google_cloud_storage_has_conditional_writes_by_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    server = make_server("127.0.0.1", 0, Generations(), threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    account = {"gcs_base_url": f"http://127.0.0.1:{server.port}", "disable_oauth": True}
    account |= dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(account))
    filesystem, _ = pafs.FileSystem.from_uri("gs://bucket/runs")
    first, second = (conditional_object(filesystem, "bucket/runs/run/.lock") for _ in range(2))
    assert first is not None and second is not None and first.read() == second.read() == (b"", None)
    version = first.write(b"first", None)
    assert first.is_conditional(b"first")
    with pytest.raises(VersionConflictError):
        second.write(b"second", None)
    content, seen = second.read()
    assert content == b"first"
    second.write(b"taken over", seen)
    with pytest.raises(VersionConflictError):
        first.write(b"renewed", version)
    assert first.read()[0] == b"taken over"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/runs/run",
        "s3://bucket/runs/run?region=eu-west-1",
        "s3://bucket/runs/run?endpoint_override=http://127.0.0.1:PORT",
        "s3://bucket/runs/run?endpoint_override=localhost:PORT&scheme=http&region=us-east-1",
        "s3://test:test@bucket/runs/run?endpoint_override=127.0.0.1:PORT&scheme=http",
    ],
)
def test_conditional_writes_go_to_the_server_that_the_uri_or_the_environment_names(
    uri: str, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "PORT" not in uri:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{store.port}")
    storage = ObjectStorage(uri.replace("PORT", str(store.port)), tmp_path / "run")
    with storage.in_use(pytest.fail):  # no message about missing conditional writes
        assert LEASE in store.names("runs/run")
        storage.check_owner()
