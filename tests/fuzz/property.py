"""A check of many generated cases, the same for pytest and for `make fuzz`."""

from __future__ import annotations

import atexit
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

AT_ONCE = 1_000  # cases of one seed: hypothesis remembers all that it has tried
Check = Callable[..., None]


@dataclass(frozen=True)
class Property:
    """What holds, for what is generated; of N cases asked for it takes one in `one_in`, as they differ in cost."""

    check: Check
    generated: str
    one_in: int
    strategies: dict[str, SearchStrategy[Any]]

    @property
    def name(self) -> str:
        """The check's name as a sentence."""
        return self.check.__name__.removeprefix("test_").replace("_", " ")

    def run(self, cases: int) -> Iterator[int]:
        """Tries `cases` cases, the same each time, and yields the number of those done; raises what the first raises."""
        done = 0

        def counted(**values: Any) -> None:
            nonlocal done
            done += 1
            self.check(**values)

        for start in range(0, cases, AT_ONCE):
            trial = _configured(min(AT_ONCE, cases - start))(given(**self.strategies)(counted))
            seed(start)(trial)()
            yield done


PROPERTIES: list[Property] = []


def holds_for(
    generated: str, quick: int = 100, one_in: int = 1, **strategies: SearchStrategy[Any]
) -> Callable[[Check], Check]:
    """Makes a test with `quick` cases of a check, and registers it for `make fuzz`."""

    def decorate(check: Check) -> Check:
        PROPERTIES.append(Property(check, generated, one_in, strategies))
        return _configured(quick, derandomize=True)(given(**strategies)(check))

    return decorate


@cache
def scratch() -> Path:
    """A folder of this process, removed at its end; in memory where there is such a disk."""
    memory = Path("/dev/shm")
    folder = tempfile.TemporaryDirectory(prefix="fuzz", dir=memory if memory.is_dir() else None)
    atexit.register(folder.cleanup)
    return Path(folder.name)


def _configured(cases: int, derandomize: bool = False) -> settings:
    return settings(
        max_examples=cases,
        derandomize=derandomize,
        deadline=None,
        database=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
