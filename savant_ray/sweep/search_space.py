"""Reads a search space: settings, and how Ray Tune chooses their values."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice, product
from pathlib import Path
from typing import Any

from ray import tune

from savant_ray.config import Config, all_settings, setting_errors
from savant_ray.errors import SettingsError
from savant_ray.settings.yaml_text import YamlError, key_lines, load_yaml
from savant_ray.sweep.trial import with_settings

DISTRIBUTIONS = (
    *("uniform", "quniform", "loguniform", "qloguniform", "randn", "qrandn"),
    *("randint", "qrandint", "lograndint", "qlograndint", "choice", "grid_search"),
)  # functions of ray.tune
CHOSEN_BY_SWEEP = ("run.name", "run.storage_path")  # settings that the sweep sets for each trial
# The list in the file is their only argument; for other distributions it is the list of their arguments.
TAKES_A_LIST = ("choice", "grid_search")
MAX_COMBINATIONS = 1000  # that are checked; one takes about a millisecond
MAX_PROBLEMS = 10  # in a message
EXAMPLE = "such as training.learning_rate: {loguniform: [0.0001, 0.01]} or training.optimizer: {choice: [adamw, muon]}"


def read_space(path: Path, config: Config) -> dict[str, Any]:
    """Return the search space of a YAML file: Ray Tune's distribution of each setting. `config` has the other settings.

    Raises:
        SettingsError: the file cannot be read, an entry is not a setting with a distribution, or a trial could get values
            that are not allowed.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = load_yaml(text)
    except (OSError, ValueError, YamlError) as error:
        reason = str(getattr(error, "strerror", None) or error).strip()
        raise SettingsError(f"--space {path}: {reason}") from error
    if not isinstance(content, Mapping) or not content:
        raise SettingsError(f"--space {path}: has no settings; {EXAMPLE}")
    lines = key_lines(text)
    places = {name: f"--space {path}:{f' line {lines[name]}:' if name in lines else ''} {name}" for name in content}
    space = {name: _distribution(places[name], name, entry) for name, entry in content.items()}
    values = {name: _values_to_check(*next(iter(entry.items()))) for name, entry in content.items()}
    problems = [*dict.fromkeys(_problems(values, places, config.to_dict()))]
    if problems:
        more = [f"and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
        raise SettingsError("\n".join([*problems[:MAX_PROBLEMS], *more]))
    return space


def _problems(
    values: Mapping[str, Sequence[Any]], places: Mapping[str, str], settings: dict[str, Any]
) -> Iterator[str]:
    """Yield the errors of the first `MAX_COMBINATIONS` combinations, and of others that contain each value at least once."""
    longest = max(map(len, values.values()))
    with_each_value = ([choices[i % len(choices)] for choices in values.values()] for i in range(longest))
    for combination in chain(with_each_value, islice(product(*values.values()), MAX_COMBINATIONS)):
        changes = dict(zip(values, combination, strict=True))
        yield from setting_errors(with_settings(settings, changes), places)


def _values_to_check(distribution: str, arguments: list[Any]) -> Sequence[Any]:
    """Return values of a distribution: all of a list or a short range of integers, otherwise the smallest and the largest.

    A normal distribution has no bounds, so only its mean is returned.
    """
    if distribution in TAKES_A_LIST:
        return arguments
    if distribution.endswith("randn"):
        return [float(arguments[0])]
    lower, upper = arguments[:2]
    step = arguments[2] if distribution.startswith("q") and len(arguments) > 2 else None
    if not distribution.endswith("randint"):
        return [float(lower), float(upper) if step else math.nextafter(upper, lower)]
    step = int(step or 1)
    last = int(upper) - (step == 1)  # Tune excludes `upper` unless the step is larger than 1
    integers = range(-(-int(lower) // step) * step, last + 1, step)
    return integers if len(integers) <= MAX_COMBINATIONS else (integers[0], integers[-1])


def _distribution(place: str, name: str, entry: Any) -> Any:
    names = [row.name for row in all_settings()]
    if name not in names:
        raise SettingsError(f"{place}: no such setting{_suggestion(str(name), names)}")
    if name in CHOSEN_BY_SWEEP:
        raise SettingsError(f"{place}: the sweep names the runs and their folder, so it cannot be varied")
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise SettingsError(f"{place}: needs one distribution, {EXAMPLE}")
    ((distribution, arguments),) = entry.items()
    if distribution not in DISTRIBUTIONS:
        raise SettingsError(
            f"{place}: {distribution}: no such distribution{_suggestion(str(distribution), DISTRIBUTIONS)}"
        )
    if not isinstance(arguments, list) or not arguments:
        raise SettingsError(f"{place}: {distribution} needs a list, {EXAMPLE}")
    try:
        function = getattr(tune, distribution)
        if distribution in TAKES_A_LIST:
            return function(arguments)
        domain = function(*arguments)
        domain.sample()  # Tune checks some arguments, such as the bounds of randint, only when it samples
        return domain
    except (TypeError, ValueError, ArithmeticError, AssertionError) as error:
        raise SettingsError(f"{place}: {distribution}: {error}") from error


def _suggestion(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""
