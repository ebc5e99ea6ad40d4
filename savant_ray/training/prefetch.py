"""The next step's share is fetched into pinned host memory while this one is computed."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")


def one_ahead(
    items: Generator[Item, Any, Any], prepare: Callable[[], None] = lambda: None
) -> Generator[Item, None, None]:
    """The same items, each asked for in a thread once the one before it is there; `prepare` runs first in that thread.

    An error of `items` is raised where the item would have come. Closed, or dropped, it closes `items` without waiting.
    """
    fetcher = ThreadPoolExecutor(1, thread_name_prefix="one-ahead", initializer=prepare)
    end: Any = object()
    try:
        pending = fetcher.submit(next, items, end)
        while (item := pending.result()) is not end:
            pending = fetcher.submit(next, items, end)
            yield item
    finally:
        fetcher.submit(items.close)
        fetcher.shutdown(wait=False)
