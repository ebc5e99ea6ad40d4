"""Reads a search space: settings, and how Ray Tune chooses their values."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import tune

from savant_ray.config import all_settings
from savant_ray.errors import SettingsError
from savant_ray.settings.yaml_text import YamlError, load_yaml

DISTRIBUTIONS = (
    *("uniform", "quniform", "loguniform", "qloguniform", "randn", "qrandn"),
    *("randint", "qrandint", "lograndint", "qlograndint", "choice", "grid_search"),
)  # functions of ray.tune
OF_THE_SWEEP = ("run.name", "run.storage_path")  # settings of each trial that the sweep chooses
TAKES_A_LIST = ("choice", "grid_search")
SHAPE = "such as training.learning_rate: {loguniform: [0.0001, 0.01]} or training.optimizer: {choice: [adamw, muon]}"


def read_space(path: Path) -> dict[str, Any]:
    """Return the search space of a YAML file by setting, as Ray Tune takes it.

    Raises:
        SettingsError: the file cannot be read, or an entry is not a setting with a distribution.
    """
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, YamlError) as error:
        reason = str(getattr(error, "strerror", None) or error).strip()
        raise SettingsError(f"--space {path}: {reason}") from error
    if not isinstance(content, Mapping) or not content:
        raise SettingsError(f"--space {path}: has no settings; {SHAPE}")
    return {name: _distribution(f"--space {path}: {name}", name, entry) for name, entry in content.items()}


def _distribution(place: str, name: str, entry: Any) -> Any:
    names = [row.name for row in all_settings()]
    if name not in names:
        raise SettingsError(f"{place}: no such setting{_suggestion(str(name), names)}")
    if name in OF_THE_SWEEP:
        raise SettingsError(f"{place}: the sweep names the runs and their folder, so it cannot be varied")
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise SettingsError(f"{place}: needs one distribution, {SHAPE}")
    ((distribution, arguments),) = entry.items()
    if distribution not in DISTRIBUTIONS:
        raise SettingsError(
            f"{place}: {distribution}: no such distribution{_suggestion(str(distribution), DISTRIBUTIONS)}"
        )
    if not isinstance(arguments, list) or not arguments:
        raise SettingsError(f"{place}: {distribution} needs a list, {SHAPE}")
    try:
        function = getattr(tune, distribution)
        if distribution in TAKES_A_LIST:
            return function(arguments)
        domain = function(*arguments)
        domain.sample()  # checks what Tune does not check before, such as the bounds of randint
        return domain
    except (TypeError, ValueError, ArithmeticError, AssertionError) as error:
        raise SettingsError(f"{place}: {distribution}: {error}") from error


def _suggestion(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""
