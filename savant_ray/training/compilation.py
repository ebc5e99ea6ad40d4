"""Compiles the recurrent block where the machine can: one graph serves all loops of a kind."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import torch

from savant_ray.model.transformer import UniversalTransformer

SHAPES = 64  # micro-batch sizes that may be compiled before PyTorch falls back to eager


def compile_block(model: UniversalTransformer, setting: bool | str, device: torch.device) -> str | None:
    """Applies `training.compile` ("auto" = where a compiler is found); returns what the user should know.

    Each shape gets a graph of its own (`dynamic=False`), so that a run and its resumption run the same kernels.
    """
    if setting is False:
        return None
    missing = _missing_tools(device)
    if missing and setting == "auto":
        return f"{missing} not found: training runs uncompiled (slower, same results up to rounding)"
    torch._dynamo.config.recompile_limit = SHAPES
    model.recurrent_block.compile(dynamic=False)
    return "compiling the model: the first step takes up to a minute longer"


def _missing_tools(device: torch.device) -> str | None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        return "g++"
    if device.type == "cpu" and not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Python.h (package python3-dev)"
    return None
