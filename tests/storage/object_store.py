"""An S3 server (moto) on the loopback interface."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow.fs as pafs
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import BaseWSGIServer, make_server

from tests.cluster.conftest import free_port

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}
BUCKET = "bucket"


class ObjectStore:
    """The server. It keeps its objects while it is stopped, so stopping it simulates a network outage."""

    def __init__(self) -> None:
        self.port = free_port()
        self.query = f"?endpoint_override=127.0.0.1:{self.port}&scheme=http"
        self.conditions = "enforced"  # or "ignored", or "refused"
        # Called in the server before each request. PermissionError makes it respond 403, which clients do not retry.
        self.before: Callable[[str, str], None] = lambda method, path: None
        self.requests: list[tuple[str, str]] = []
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server: BaseWSGIServer | None = None

    def start(self) -> None:
        self._server = make_server("127.0.0.1", self.port, self._answer, True, request_handler=MotoRequestHandler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        self._server = None

    def _answer(self, request: dict[str, Any], respond: Callable[..., Any]) -> Iterable[bytes]:
        call = (request["REQUEST_METHOD"], request["PATH_INFO"].removeprefix(f"/{BUCKET}/"))
        self.requests.append(call)
        try:
            self.before(*call)
        except PermissionError:
            respond("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<Error><Code>AccessDenied</Code></Error>"]
        conditions = [name for name in ("HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH") if call[0] == "PUT" and name in request]
        if conditions and self.conditions == "refused":
            respond("501 Not Implemented", [("Content-Type", "application/xml")])
            return [b"<Error><Code>NotImplemented</Code></Error>"]
        if self.conditions == "ignored":
            request = {name: value for name, value in request.items() if name not in conditions}
        return list(self._app(request, respond))

    def uri(self, path: str) -> str:
        return f"s3://{BUCKET}/{path}{self.query}"

    @property
    def filesystem(self) -> pafs.FileSystem:
        return pafs.FileSystem.from_uri(f"s3://{BUCKET}{self.query}&allow_bucket_creation=true")[0]

    def names(self, path: str) -> list[str]:
        """Return all objects below `bucket/<path>`, relative to it, except empty folders."""
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
    """Start the server and put its credentials into the environment."""
    store = ObjectStore()
    store.start()
    try:
        store.filesystem.create_dir(BUCKET)
        store.filesystem.delete_dir_contents(
            BUCKET
        )  # moto's objects belong to the process, so a new server still has them
        yield store
    finally:
        store.stop()
