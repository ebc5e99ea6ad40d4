"""Compiles the recurrent block where the machine can: one graph serves all loops of a kind."""

from __future__ import annotations

import shutil
import sysconfig
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from savant_ray.model.transformer import UniversalTransformer
from savant_ray.training.precision import Precision

SHAPES = 64  # micro-batch sizes that may be compiled before PyTorch falls back to eager


def compile_block(
    model: UniversalTransformer, setting: bool | str, device: torch.device, precision: Precision
) -> str | None:
    """Applies `training.compile`; returns what the user should know.

    "auto": where a compiler is found and it pays, which in fp32 on a CPU it does not (measured, docs/LOG.md: 0 to 4 %
    faster after half a minute of compiling).

    Each shape gets a graph of its own (`dynamic=False`), so that a run and its resumption run the same kernels.
    """
    if setting is False or (setting == "auto" and device.type == "cpu" and precision == "fp32"):
        return None
    missing = _missing_tools(device)
    if missing and setting == "auto":
        return f"{missing} not found: training runs uncompiled (slower, same results up to rounding)"
    torch._dynamo.config.recompile_limit = SHAPES
    model.recurrent_block.compile(dynamic=False)
    return "compiling the model: the first step takes up to a minute longer"


def uncompiled(model: UniversalTransformer) -> AbstractContextManager[None]:
    """Runs the block as it is written, compiled or not; the stance of a model that is not would import the compiler."""
    if model.recurrent_block._compiled_call_impl is None:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _missing_tools(device: torch.device) -> str | None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        return "g++"
    if device.type == "cpu" and not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Python.h (package python3-dev)"
    return None
