"""Prefetching: the next item of a generator is computed in a thread while the current one is used."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")


def prefetch(
    items: Generator[Item, Any, Any], initialize: Callable[[], None] = lambda: None
) -> Generator[Item, None, None]:
    """Yield the items of a generator, each computed in a thread while the one before it is used.

    `initialize` runs first in that thread. An exception of `items` is raised when its item would have been yielded.
    Closing or dropping the generator closes `items` without waiting for the thread.
    """
    executor = ThreadPoolExecutor(1, thread_name_prefix="prefetch", initializer=initialize)
    end: Any = object()
    try:
        pending = executor.submit(next, items, end)
        while (item := pending.result()) is not end:
            pending = executor.submit(next, items, end)
            yield item
    finally:
        executor.submit(items.close)
        executor.shutdown(wait=False)
