"""The lease that takes a lock's place in object storage: one process trains a run, and a dead one holds none."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest

from savant_ray.cluster import lease as lease_module
from savant_ray.cluster.lease import LEASE, leased
from savant_ray.cluster.object_storage import ObjectStorage
from savant_ray.errors import SavantError
from tests.cluster.conftest import wait_for
from tests.cluster.object_store import ObjectStore
from tests.cluster.test_object_storage import record


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lease_module, "SILENCE_SECONDS", 2.0)
    monkeypatch.setattr(lease_module, "SETTLE_SECONDS", 0.1)


@pytest.mark.usefixtures("impatient")
def test_a_run_in_use_is_refused_wherever_it_is_in_use(
    here: ObjectStorage, elsewhere: ObjectStorage, store: ObjectStore
) -> None:
    with here.in_use():
        with pytest.raises(SavantError, match=f"in use by process {os.getpid()} on {socket.gethostname()}"):
            with elsewhere.in_use():
                pass
        with pytest.raises(SavantError, match="in use"), here.in_use():
            pass
    assert LEASE not in store.names("runs/run")
    with elsewhere.in_use():
        pass


@pytest.mark.usefixtures("impatient")
def test_a_run_that_was_taken_over_while_the_storage_was_not_reached_stops_and_leaves_it_alone(
    here: ObjectStorage, elsewhere: ObjectStorage, store: ObjectStore
) -> None:
    record(here, "10:00")
    with here.in_use():
        here.refuse_if_lost()
        taken = json.dumps({"token": "x", "process": 7, "host": "another-machine", "beat": 1}).encode()
        store.write(f"runs/run/{LEASE}", taken)
        wait_for(lambda: here._lease is not None and here._lease._winner, 20)
        with pytest.raises(SavantError, match="process 7 on another-machine has taken the run over"):
            here.refuse_if_lost()
        with pytest.raises(OSError, match="another process trains this run"):
            here.send_records()
        assert store.read(f"runs/run/{LEASE}") == taken
    assert store.read(f"runs/run/{LEASE}") == taken and store.names("runs/run") == [LEASE]


@pytest.mark.usefixtures("impatient")
def test_a_dead_run_holds_no_lease(here: ObjectStorage, store: ObjectStore) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    said: list[str] = []
    for host in (socket.gethostname(), "another-machine"):
        mark = {"token": "x", "process": gone.pid, "host": host, "beat": 3}
        store.write(f"runs/run/{LEASE}", json.dumps(mark).encode())
        with leased(here.filesystem, here.path, said.append):
            assert json.loads(store.read(f"runs/run/{LEASE}"))["process"] == os.getpid()
    assert len(said) == 1 and "process" in said[0] and "on another-machine may still train" in said[0]
