"""Brings the driver's own files (record, samples, log) to where the run is kept, beside training."""

from __future__ import annotations

import sys
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from savant_ray.errors import describe
from savant_ray.storage.protocol import RunStorage


class Courier:
    """One journey at a time; the last when the launch ends."""

    def __init__(self, storage: RunStorage) -> None:
        self._storage = storage
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="courier")
        self._journey: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def send(self) -> None:
        """Sets out, unless the last journey is not over; what fails is taken along the next time."""
        if self._journey is None or self._journey.done():
            self._journey = self._pool.submit(self._storage.send_records)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._pool.shutdown()
        try:
            self._storage.send_records()
        except Exception as refusal:  # training is over: nothing that happens here may change how it ended
            print(f"WARNING: record and log stay in {self._storage.folder}: {describe(refusal)}", file=sys.stderr)
