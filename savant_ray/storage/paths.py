"""Makes the paths in a run's settings absolute."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from savant_ray.config import Config, HeldOutConfig
from savant_ray.errors import SettingsError
from savant_ray.locations import absolute_path, is_uri, local_path, printable

SQLITE = "sqlite:///"  # an absolute path follows as `sqlite:////data/mlflow.db`


def with_absolute_paths(config: Config, input_folder: Path, output_folder: Path) -> Config:
    """Return settings whose paths are absolute; `file:` URIs become paths, other URIs are unchanged.

    Text and tokenizer are relative to `input_folder`; run folder, token cache, `run.init_from`, `run.continue_from` and an
    SQLite database of MLflow to `output_folder`. Absolute paths are unchanged.

    Raises:
        SettingsError: a setting cannot be a path (`~` of an unknown user, NUL, not UTF-8), or `data.cache_dir` is a URI,
            whose files cannot be memory-mapped.
    """
    if is_uri(config.data.cache_dir):
        raise SettingsError(
            f"data.cache_dir: {printable(config.data.cache_dir)} is a URI; give a folder that every node reaches, "
            "such as /mnt/shared"
        )
    run: dict[str, Any] = {"storage_path": _absolute(config.run.storage_path, output_folder, "run.storage_path")}
    for name in ("init_from", "continue_from"):
        if (path := getattr(config.run, name)) is not None:
            run[name] = _absolute(path, output_folder, f"run.{name}")
    data: dict[str, Any] = {
        "cache_dir": _absolute(config.data.cache_dir, output_folder, "data.cache_dir"),
        "validation": _absolute_validation(config.data.validation, input_folder),
        "sources": [
            source.model_copy(update={"path": _absolute(source.path, input_folder, f"data.sources[{number}].path")})
            for number, source in enumerate(config.data.sources)
        ],
    }
    if not config.data.trains_tokenizer:
        data["tokenizer"] = _absolute_tokenizer(config.data.tokenizer, input_folder)
    reporting = {"mlflow": _absolute_database(config.reporting.mlflow, output_folder)}
    return config.model_copy(
        update={
            "run": config.run.model_copy(update=run),
            "data": config.data.model_copy(update=data),
            "reporting": config.reporting.model_copy(update=reporting),
        }
    )


def _absolute(path: str | list[str], folder: Path, setting: str) -> str | list[str]:
    if isinstance(path, list):
        return [absolute_path(item, folder, f"{setting}[{number}]") for number, item in enumerate(path)]
    return absolute_path(path, folder, setting)


def _absolute_database(uri: str | None, folder: Path) -> str | None:
    """Return `sqlite:///mlflow.db` with an absolute path, and any other address unchanged."""
    path = uri.removeprefix(SQLITE) if uri is not None else ""
    return uri if path == uri or path.startswith(("/", ":")) or not path else f"{SQLITE}{folder / path}"


def _absolute_validation(validation: str | list[str] | HeldOutConfig, folder: Path) -> str | list[str] | HeldOutConfig:
    if not isinstance(validation, HeldOutConfig):
        return _absolute(validation, folder, "data.validation")
    if validation.path is None:
        return validation
    return validation.model_copy(update={"path": _absolute(validation.path, folder, "data.validation.path")})


def _absolute_tokenizer(tokenizer: str, folder: Path) -> str:
    """Return the absolute path of `data.tokenizer`; a URI, or a relative path that does not exist, is unchanged.

    The latter is the name of a Hugging Face model.
    """
    if is_uri(tokenizer):
        return tokenizer
    path = local_path(tokenizer, "data.tokenizer")
    is_path = path.is_absolute() or os.path.exists(folder / path)  # noqa: PTH110 - Path.exists raises for a name too long
    return str(folder / path) if is_path else tokenizer
