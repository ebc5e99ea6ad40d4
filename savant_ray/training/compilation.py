"""Compiles the recurrent block where the machine can: one graph serves all loops of a kind."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from savant_ray.model.flex import SHAPES, has_python_headers
from savant_ray.model.transformer import UniversalTransformer
from savant_ray.training.precision import Precision


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
    missing = _missing_tools()
    if missing and setting == "auto":
        return f"{missing} not found: training runs uncompiled (slower, same results up to rounding)"
    torch._dynamo.config.recompile_limit = SHAPES
    model.recurrent_block.compile(dynamic=False)
    return "compiling the model: the first step takes up to a minute longer"


@contextmanager
def uncompiled(model: UniversalTransformer) -> Iterator[None]:
    """Runs the block as it is written, compiled or not.

    Attention stays compiled on a GPU: the stance "force_eager" would make it hold all scores at once.
    """
    block = model.recurrent_block
    compiled, block._compiled_call_impl = block._compiled_call_impl, None
    try:
        yield
    finally:
        block._compiled_call_impl = compiled


def _missing_tools() -> str | None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        return "g++"
    return None if has_python_headers() else "Python.h (package python3-dev)"
