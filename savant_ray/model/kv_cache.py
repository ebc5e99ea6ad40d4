"""Key-value cache for generation: a ring buffer of keys and one of values for each loop.

All loops share one block, but each has different inputs and therefore its own keys and values. The token at position p is
stored in slot `p % size`. A windowed loop has at most `window_size + 1` slots, so that a new token overwrites the one that
leaves the window. The buffers of a global loop double when they are full; generation can therefore continue past
`max_seq_len`, since neither rotary embeddings nor a model without positions have a maximum length. The order of the slots
does not matter, because keys are rotated before they are stored and softmax does not depend on the order of its inputs.

A single new token is added by operations that read the position from a device tensor. With `static_shapes` their shapes and
addresses also stay the same until `reserve` or `select` replaces the buffers, so that a CUDA graph of them can be replayed.
Without it, the token attends only to the slots in use, which is less work.

Shapes: B batch, H heads, T new tokens, S visible tokens or slots, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from savant_ray.model.attention import Mask, Masks, cached_masks, ring_mask

MIN_CAPACITY = 256  # slots; growing copies the buffers and, on a GPU, needs a new CUDA graph


class KeyValueCache:
    """Keys and values of all loops.

    Args:
        is_global: for each loop, whether it attends to all tokens.
        window_size: how many tokens back the other loops attend.
        device: the device of the model.
        padding_B: number of padding tokens at the beginning of each row, on the device.
        static_shapes: whether a single new token attends to all slots, with those that are not in use masked.

    Attributes:
        length: number of tokens that all loops have cached. Code that replays a CUDA graph of `decode` has to set it.
        position_1: the same number as a device tensor `[1]`.
    """

    def __init__(
        self,
        is_global: list[bool],
        window_size: int,
        device: torch.device,
        padding_B: Tensor | None = None,
        static_shapes: bool = False,
    ) -> None:
        self.length, self.position_1 = 0, torch.zeros(1, dtype=torch.int64, device=device)
        self._is_global, self._window_size, self._padding_B = is_global, window_size, padding_B
        self._static_shapes = static_shapes
        self._capacity = 0  # slots of a global loop
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}  # loop -> keys, values [B, H, S, D]
        self._slots: dict[bool, Tensor] = {}  # whether the loop is global -> slot [1] of a single new token

    def reserve(self, n_new: int) -> bool:
        """Make room for `n_new` more tokens and return whether buffers were replaced."""
        if self.length + n_new <= self._capacity:
            return False
        self._capacity = max(MIN_CAPACITY, 2 * (self.length + n_new))
        grown = {}
        for loop, (keys, values) in self._buffers.items():
            if keys.shape[2] < self._size(self._is_global[loop]):
                grown[loop] = (self._grown(loop, keys), self._grown(loop, values))
        self._buffers |= grown
        return bool(grown)

    def begin(self, n_new: int) -> Masks:
        """Prepare for `n_new` tokens and return their masks over the keys that `append` returns."""
        self.reserve(n_new)
        device = self.position_1.device
        if n_new > 1:
            return cached_masks(n_new, self.length, self._window_size, self._padding_B, device)
        self._slots = {True: self.position_1, False: self.position_1 % self._size(False)}
        if self._padding_B is None and not self._static_shapes:
            return Masks(Mask(None), Mask(None))
        return Masks(
            *(
                ring_mask(self.position_1, self._n_visible(is_global), self._size(is_global), self._padding_B)
                for is_global in (True, False)
            )
        )

    def append(self, loop: int, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values of the new tokens and return all that these can attend to, `[B, H, S, D]`.

        For one token, S are slots. For several, S are the cached tokens followed by the new ones, in order; a windowed loop
        returns at most the last `window_size` of the cached ones.
        """
        if loop not in self._buffers:
            self._buffers[loop] = (self._empty(loop, k_BHTD), self._empty(loop, v_BHTD))
        keys, values = self._buffers[loop]
        if k_BHTD.shape[2] > 1:
            return self._append_several(loop, keys, k_BHTD), self._append_several(loop, values, v_BHTD)
        is_global = self._is_global[loop]
        keys.index_copy_(2, self._slots[is_global], k_BHTD)
        values.index_copy_(2, self._slots[is_global], v_BHTD)
        n_visible = self._n_visible(is_global)
        return keys[:, :, :n_visible], values[:, :, :n_visible]

    def advance(self, n_new: int) -> None:
        """Count `n_new` tokens that all loops have appended."""
        self.length += n_new
        self.position_1 += n_new

    def select(self, rows: Tensor) -> None:
        """Keep only these rows of the batch, given by their indices."""
        self._padding_B = None if self._padding_B is None else self._padding_B[rows]
        for loop in self._buffers:
            keys, values = self._buffers[loop]
            self._buffers[loop] = (keys[rows], values[rows])

    def _size(self, is_global: bool) -> int:
        """Return the number of slots of a loop."""
        return self._capacity if is_global else min(self._capacity, self._window_size + 1)

    def _n_visible(self, is_global: bool) -> int:
        """Return the number of slots that a single new token attends to."""
        size = self._size(is_global)
        return size if self._static_shapes else min(size, self.length + 1)

    def _empty(self, loop: int, like_BHTD: Tensor) -> Tensor:
        """Return a new buffer; of zeros if unused slots are read, since a NaN times an attention weight of 0 is NaN."""
        batch, heads, _, head_dim = like_BHTD.shape
        shape = (batch, heads, self._size(self._is_global[loop]), head_dim)
        return like_BHTD.new_zeros(shape) if self._static_shapes else like_BHTD.new_empty(shape)

    def _grown(self, loop: int, buffer_BHSD: Tensor) -> Tensor:
        """Return a larger buffer with the same tokens. One that is below its maximum size has not wrapped around."""
        grown_BHSD = self._empty(loop, buffer_BHSD)
        grown_BHSD[:, :, : self.length] = buffer_BHSD[:, :, : self.length]
        return grown_BHSD

    def _append_several(self, loop: int, buffer_BHSD: Tensor, new_BHTD: Tensor) -> Tensor:
        size, n_new = buffer_BHSD.shape[2], new_BHTD.shape[2]
        end = self.length + n_new
        visible_BHSD = new_BHTD
        if self.length:
            first = 0 if self._is_global[loop] else max(0, self.length - self._window_size)
            cached = torch.arange(first, self.length, device=buffer_BHSD.device) % size
            visible_BHSD = torch.cat([buffer_BHSD.index_select(2, cached), new_BHTD], dim=2)
        n_kept = min(n_new, size)
        kept = torch.arange(end - n_kept, end, device=buffer_BHSD.device) % size
        buffer_BHSD.index_copy_(2, kept, new_BHTD[:, :, n_new - n_kept :])
        return visible_BHSD
