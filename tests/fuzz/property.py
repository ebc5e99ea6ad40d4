"""Checks that are run with many generated cases, by pytest and by `make fuzz`."""

from __future__ import annotations

import atexit
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

CASES_PER_SEED = 1_000  # limits memory, because hypothesis keeps all cases of a run
Check = Callable[..., None]


@dataclass(frozen=True)
class Property:
    """A check that holds for all generated input; of N requested cases, one in `one_in` is run, because costs differ."""

    check: Check
    generated: str
    one_in: int
    strategies: dict[str, SearchStrategy[Any]]

    @property
    def name(self) -> str:
        """Return the name of the check as a sentence."""
        return self.check.__name__.removeprefix("test_").replace("_", " ")

    def run(self, cases: int) -> Iterator[int]:
        """Run `cases` cases, always the same ones; yield the number done so far. Raises the error of the first failure."""
        done = 0

        def counted(**values: Any) -> None:
            nonlocal done
            done += 1
            self.check(**values)

        for start in range(0, cases, CASES_PER_SEED):
            trial = _configured(min(CASES_PER_SEED, cases - start))(given(**self.strategies)(counted))
            seed(start)(trial)()
            yield done


PROPERTIES: list[Property] = []
INPUTS: Counter[str] = Counter()  # read so far, by what has read them, for the table of `make fuzz`


def holds_for(
    generated: str, quick: int = 100, one_in: int = 1, **strategies: SearchStrategy[Any]
) -> Callable[[Check], Check]:
    """Turn a check into a test with `quick` cases, and register it for `make fuzz`."""

    def decorate(check: Check) -> Check:
        PROPERTIES.append(Property(check, generated, one_in, strategies))
        return _configured(quick, derandomize=True)(given(**strategies)(check))

    return decorate


@cache
def scratch() -> Path:
    """Return a temporary folder of this process, in /dev/shm if it exists; it is removed when the process exits."""
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
