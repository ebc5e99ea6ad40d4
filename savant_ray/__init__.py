"""savant_ray trains Savant, a small recurrent-depth language model, as a Ray Train job.

    import savant_ray
    result = savant_ray.train("quickstart")

The public names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from savant_ray.api import Result, train
    from savant_ray.config import Config
    from savant_ray.errors import SavantError

__version__ = "0.1.0"
__all__ = ["Config", "Result", "SavantError", "__version__", "train"]

_MODULES = {"Config": "config", "Result": "api", "SavantError": "errors", "train": "api"}


def __getattr__(name: str) -> Any:
    """Load a public name."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"savant_ray.{_MODULES[name]}"), name)
