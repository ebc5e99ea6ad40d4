"""A real S3 server on loopback, and what it holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow.fs as pafs
from moto.server import ThreadedMotoServer

from tests.cluster.conftest import free_port

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}
BUCKET = "bucket"


class ObjectStore:
    """Keeps its objects while it is stopped, as a network that is gone for a while."""

    def __init__(self) -> None:
        self.port = free_port()
        self.query = f"?endpoint_override=127.0.0.1:{self.port}&scheme=http"
        self._server: ThreadedMotoServer | None = None

    def start(self) -> None:
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self._server.start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
        self._server = None

    def uri(self, path: str) -> str:
        return f"s3://{BUCKET}/{path}{self.query}"

    @property
    def filesystem(self) -> pafs.FileSystem:
        return pafs.FileSystem.from_uri(f"s3://{BUCKET}{self.query}&allow_bucket_creation=true")[0]

    def names(self, path: str) -> list[str]:
        """Everything below `bucket/<path>`, relative to it, but empty folders."""
        top = f"{BUCKET}/{path}"
        infos = self.filesystem.get_file_info(pafs.FileSelector(top, recursive=True, allow_not_found=True))
        return sorted(info.path[len(top) + 1 :] for info in infos if info.type == pafs.FileType.File)

    def read(self, path: str) -> bytes:
        with self.filesystem.open_input_stream(f"{BUCKET}/{path}") as file:
            return bytes(file.read())

    def write(self, path: str, content: bytes) -> None:
        with self.filesystem.open_output_stream(f"{BUCKET}/{path}") as file:
            file.write(content)


@contextmanager
def running_store() -> Iterator[ObjectStore]:
    """The credentials of every client have to be in its environment."""
    store = ObjectStore()
    store.start()
    try:
        store.filesystem.create_dir(BUCKET)
        yield store
    finally:
        store.stop()
