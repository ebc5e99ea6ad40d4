"""Optimizer state of bitsandbytes' AdamW8bit: read and write it without bitsandbytes.

The state of a tensor of 4,096 elements or more has both moments as 8-bit codes:

    state1, state2    uint8, the parameter's shape: codes of the first and the second moment
    qmap1, qmap2      [256] fp32: the value of each code
    absmax1, absmax2  [blocks] fp32: the scale of each block of consecutive elements

Then `moment = qmap[code] * absmax[block]`, which is the fp32 product that bitsandbytes computes. A smaller tensor has
fp32 `state1` and `state2` and no maps or scales. `step` is an int. Current versions of bitsandbytes put the other keys
into a nested dict (`NESTED`), older versions store them beside `step`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from savant_ray.optim.adamw import MOMENTS

NESTED = "__bnb_optimizer_quant_state__"
CODES = 256
BLOCK_SIZES = (256, 2048)  # elements per scale, in current and in older versions


def from_adamw8bit(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return a parameter's state with the keys and fp32 moments of `torch.optim.AdamW`.

    The states of other optimizers, and states whose codes, maps and scales have inconsistent sizes, are returned without
    nesting but otherwise unchanged.
    """
    flat = {**entry, **entry.get(NESTED, {})}
    flat.pop(NESTED, None)
    try:
        moments = {name: _moment(flat, number) for number, name in enumerate(MOMENTS, start=1)}
        return {"step": flat["step"], **moments}
    except (KeyError, ValueError):
        return flat


def to_adamw8bit(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return a parameter's AdamW state with the keys of AdamW8bit, in the flat layout that all its versions load.

    The moments stay in fp32, which AdamW8bit uses for small tensors, so nothing is rounded. AdamW8bit continues in fp32
    and needs 8 bytes per weight for them instead of 2.
    """
    moments = {f"state{number}": entry[name].float() for number, name in enumerate(MOMENTS, start=1)}
    return {"step": int(entry["step"]), **moments}


def _moment(flat: Mapping[str, Any], number: int) -> Tensor:
    """Dequantize moment 1 or 2.

    Raises:
        KeyError: a part of the state is missing.
        ValueError: the sizes of the parts are inconsistent.
    """
    codes: Tensor = flat[f"state{number}"]
    if codes.dtype != torch.uint8:
        return codes.float()
    values, scales = flat[f"qmap{number}"].float(), flat[f"absmax{number}"].float()
    sizes = [size for size in BLOCK_SIZES if scales.shape == (-(-codes.numel() // size),)]
    if not sizes or values.shape != (CODES,):
        raise ValueError(f"{codes.numel()} codes, {values.numel()} values and {scales.numel()} scales")
    moment: Tensor = values[codes.flatten().int()]  # a uint8 index would be a mask
    moment *= scales.repeat_interleave(sizes[0])[: codes.numel()]
    return moment.reshape(codes.shape)
