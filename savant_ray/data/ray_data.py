"""Runs Ray Data without console output; controls when rows are yielded and when an execution stops."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import DataContext

from savant_ray.ray_internals import silence_ray_data_console, stop_execution


@contextmanager
def settings(block_bytes: int = 1) -> Iterator[None]:
    """Set Ray Data's context for a `Dataset` that is created within the `with` block; the dataset keeps a copy.

    Ray Data prints nothing, because the caller displays its own progress. A task yields its rows in blocks of about
    `block_bytes`; with the default, it yields each row immediately.
    """
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.enable_auto_log_stats = False
    context.target_max_block_size = block_bytes
    silence_ray_data_console()
    with DataContext.current(context):
        yield


def rows(dataset: ray.data.Dataset) -> Generator[dict[str, Any], None, None]:
    """Yield each row of `dataset` as a dict of its columns; closing the iterator stops the execution."""
    batches: Iterator[pa.Table] = iter(
        dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)
    )
    try:
        for batch in batches:
            for row in range(batch.num_rows):
                yield {name: batch.column(name)[row] for name in batch.column_names}
    finally:
        stop_execution(dataset)
