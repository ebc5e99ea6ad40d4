"""A small copy of the Hugging Face Hub on the loopback interface, with one data set."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

MAIN, OLD, COPY = "a" * 40, "b" * 40, "c" * 40
Files = dict[str, bytes]


@dataclass
class Hub:
    """Revisions of one data set, `owner/name`, by commit; `downloaded` are the files that were requested."""

    commits: dict[str, Files]
    refs: dict[str, str]
    downloaded: list[str] = field(default_factory=list)
    status: int = 200  # of every answer that is not 200

    def answer(self, path: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        """Answer a request as the Hub does."""
        if self.status != 200:
            return self.status, {"X-Error-Code": "GatedRepo"} if self.status == 403 else {}, b"{}"
        if not re.match("/(api/)?datasets/owner/name", path):
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        revision, _, name = path.partition("/revision/" if path.startswith("/api/") else "/resolve/")[2].partition("/")
        if path.startswith("/api/"):
            revision, name = unquote(path.partition("/revision/")[2]), ""
        commit = self.refs.get(unquote(revision), unquote(revision))
        if commit not in self.commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        files = self.commits[commit]
        if not name:
            listed = [{"rfilename": file, "size": len(content)} for file, content in files.items()]
            return 200, {}, json.dumps({"id": "owner/name", "sha": commit, "siblings": listed}).encode()
        if name not in files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"
        self.downloaded.append(name)
        etag = f'"{sha256(files[name]).hexdigest()}"'
        return 200, {"X-Repo-Commit": commit, "ETag": etag, "Accept-Ranges": "bytes"}, files[name]


@contextmanager
def served_hub() -> Iterator[tuple[Hub, str]]:
    """Serve a Hub with one data set; yield it and its address."""
    served = Hub(
        {
            MAIN: {"data/train-00000-of-00002.parquet": b"one", "data/train-00001-of-00002.parquet": b"two"},
            OLD: {"data/train-00000-of-00001.parquet": b"old"},
        },
        {"main": MAIN, "v1.0": OLD},
    )

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = served.answer(unquote(urlparse(self.path).path), dict(self.headers))
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield served, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
