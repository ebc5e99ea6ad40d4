"""Ray Data under our settings: silent, and every row handed over as soon as it is there."""

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
    """For the creation of a `Dataset`, which takes the context of that moment with it.

    Nothing is printed: the caller shows its own progress. A task hands its rows over when they come to `block_bytes`:
    by default each at once.
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
    """The rows of `dataset`; closing the iterator stops its tasks."""
    batches: Iterator[pa.Table] = iter(
        dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)
    )
    try:
        for batch in batches:
            for row in range(batch.num_rows):
                yield {name: batch.column(name)[row] for name in batch.column_names}
    finally:
        stop_execution(dataset)
