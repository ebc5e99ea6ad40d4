"""bf16 weights that learn: each is the upper half of an fp32 number whose lower half is kept beside it.

At learning rate 2e-5 an AdamW update is smaller than half a bf16 step and is rounded away. Kahan compensation and
stochastic rounding mend that approximately. Splitting is exact at the memory of Kahan's method (2 + 2 bytes): the
optimizer joins the halves, updates in fp32, and splits again, so that bf16 weights take the very updates of fp32
weights (Split-SGD-BF16, arXiv 2005.04680). The upper half is rounded to nearest, so the lower half is signed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split(full: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 -> (the nearest bf16, ties away from zero; the int16 rest), of the same shape."""
    bits = full.view(torch.int32)
    upper = (bits + 0x8000) >> 16
    return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << 16)).to(torch.int16)


def join(upper: Tensor, lower: Tensor) -> Tensor:
    """The fp32 tensor that `split` took apart, bit for bit; in place, so the result is all the memory it takes."""
    bits = upper.view(torch.int16).to(torch.int32)
    return bits.bitwise_left_shift_(16).add_(lower).view(torch.float32)
