"""Experiment trackers that receive the record during training.

tracking   the thread that sends new lines of the record to a tracker
mlflow     MLflow
wandb      Weights & Biases
"""

from __future__ import annotations

from importlib.util import find_spec

from savant_ray.config import ReportingConfig
from savant_ray.errors import SettingsError
from savant_ray.reporting.trackers.tracking import TrackerFollower


def open_trackers(config: ReportingConfig, run: str) -> list[TrackerFollower]:
    """Return a follower of the record for each tracker in the settings, not yet connected.

    Raises:
        SettingsError: a tracker's package is not installed.
    """
    followers = []
    if config.mlflow is not None:
        _require("mlflow")
        from savant_ray.reporting.trackers.mlflow import Mlflow

        followers.append(TrackerFollower("MLflow", Mlflow(config.mlflow, run)))
    if config.wandb is not None:
        _require("wandb")
        from savant_ray.reporting.trackers.wandb import Wandb

        followers.append(TrackerFollower("Weights & Biases", Wandb(config.wandb, run)))
    return followers


def _require(package: str) -> None:
    spec = find_spec(package)
    if spec is not None and spec.origin is not None:
        return
    # Python imports a plain folder of that name, such as the one in which wandb writes its logs, as a namespace package.
    folder = (
        ""
        if spec is None
        else f" (the folder {next(iter(spec.submodule_search_locations or ['']))} is not the package)"
    )
    raise SettingsError(
        f"reporting.{package}: the package {package} is not installed{folder}; to install it, run "
        f"`pip install 'savant-ray[{package}]'` (in a checkout `pip install -e '.[{package}]'`)"
    )
