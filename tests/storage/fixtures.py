"""An object store, and a run in it as two machines access it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from savant_ray.storage.object_store import ObjectStorage
from tests.storage.object_store import BUCKET, CREDENTIALS, ObjectStore, running_store


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    """An S3 server on the loopback interface."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        with running_store() as store:
            yield store


@pytest.fixture
def store(server: ObjectStore) -> ObjectStore:
    """The server, reset and without objects."""
    server.filesystem.delete_dir_contents(BUCKET)
    server.conditions, server.before = "enforced", lambda method, path: None
    server.requests.clear()
    return server


@pytest.fixture
def storage_a(store: ObjectStore, tmp_path: Path) -> ObjectStorage:
    """A run in object storage, as one machine accesses it."""
    return ObjectStorage(store.uri("runs/run"), tmp_path / "machine-a")


@pytest.fixture
def storage_b(store: ObjectStore, tmp_path: Path) -> ObjectStorage:
    """The same run, as another machine accesses it."""
    return ObjectStorage(store.uri("runs/run"), tmp_path / "machine-b")
