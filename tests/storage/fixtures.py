"""An object store, and a run in it as two machines access it.

Imports are in the fixtures: this module is a plugin, which pytest imports before it distributes tests to processes, and
torch and Ray take seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from savant_ray.storage.object_store import ObjectStorage
    from tests.storage.object_store import ObjectStore


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    """An S3 server on the loopback interface."""
    from tests.storage.object_store import CREDENTIALS, running_store

    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        with running_store() as store:
            yield store


@pytest.fixture
def store(server: ObjectStore) -> ObjectStore:
    """The server, reset and without objects."""
    from tests.storage.object_store import BUCKET

    server.filesystem.delete_dir_contents(BUCKET)
    server.conditions, server.before = "enforced", lambda method, path: None
    server.requests.clear()
    return server


@pytest.fixture
def storage_a(store: ObjectStore, tmp_path: Path) -> ObjectStorage:
    """A run in object storage, as one machine accesses it."""
    from savant_ray.storage.object_store import ObjectStorage

    return ObjectStorage(store.uri("runs/run"), tmp_path / "machine-a")


@pytest.fixture
def storage_b(store: ObjectStore, tmp_path: Path) -> ObjectStorage:
    """The same run, as another machine accesses it."""
    from savant_ray.storage.object_store import ObjectStorage

    return ObjectStorage(store.uri("runs/run"), tmp_path / "machine-b")
