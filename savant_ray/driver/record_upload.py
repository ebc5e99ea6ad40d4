"""Uploads the driver's own files (record, samples, log, settings) to object storage, while training continues."""

from __future__ import annotations

import sys
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from savant_ray.errors import describe
from savant_ray.storage.protocol import RunStorage


class RecordUploader:
    """Uploads the files in a background thread, at most one upload at a time, and once more when the attempt ends."""

    def __init__(self, storage: RunStorage) -> None:
        self._storage = storage
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="record-upload")
        self._running: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def upload(self) -> None:
        """Start an upload unless one is running; if it fails, the next one uploads the same files."""
        if self._running is None or self._running.done():
            self._running = self._pool.submit(self._storage.send_records)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._pool.shutdown()
        try:
            self._storage.send_records()
        except Exception as upload_error:  # training has ended: an upload that fails must not change its exit code
            print(
                f"WARNING: record and log could not be uploaded and remain in {self._storage.folder}: "
                f"{describe(upload_error)}",
                file=sys.stderr,
            )
