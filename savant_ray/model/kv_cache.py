"""Key-value cache for generation: a ring buffer of keys and one of values for each loop.

All loops share one block, but each has different inputs and therefore its own keys and values. Each row of the batch has its
own position: its token at position p is stored in slot `p % size`. A windowed loop has at most `window_size + 1` slots, so
that a new token overwrites the one that leaves the window. The buffers of a global loop double when they are full;
generation can therefore continue past `max_seq_len`, since neither rotary embeddings nor a model without positions have a
maximum length. The order of the slots does not matter, because keys are rotated before they are stored and softmax does not
depend on the order of its inputs.

First the prompts are added, in parts of any size. They are padded on the right, where causal attention hides the padding
from the tokens. Then each row is extended by one token at a time, and rows can be replaced by those of another cache.

A single new token is added by operations that read the positions from a device tensor. With `static_shapes` their shapes and
addresses also stay the same until `reserve` or `select` replaces the buffers, so that a CUDA graph of them can be replayed.
Without it, the token attends only to the slots that the longest row uses, which is less work.

Shapes: B batch, H heads, T new tokens, S visible tokens or slots, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from savant_ray.model.attention import Mask, Masks, cached_masks, slot_mask

MIN_CAPACITY = 256  # slots; growing copies the buffers and, on a GPU, needs a new CUDA graph


class KeyValueCache:
    """Keys and values of all loops.

    Args:
        is_global: for each loop, whether it attends to all tokens.
        window_size: how many tokens back the other loops attend.
        prompt_lengths: number of tokens of each row's prompt.
        device: the device of the model.
        static_shapes: whether a single new token attends to all slots, with those that are not in use masked.

    Attributes:
        length: number of cached tokens of the longest row in use, without those that are being appended.
        position_B: number of tokens of each row, on the device.
    """

    def __init__(
        self,
        is_global: list[bool],
        window_size: int,
        prompt_lengths: Sequence[int],
        device: torch.device,
        static_shapes: bool = False,
    ) -> None:
        self.length, self.position_B = 0, torch.zeros(len(prompt_lengths), dtype=torch.int64, device=device)
        self._is_global, self._window_size, self._static_shapes = is_global, window_size, static_shapes
        self._prompt_lengths_B = torch.tensor(prompt_lengths, device=device)
        self._missing = max(prompt_lengths)  # tokens of the longest prompt that are not cached yet
        self._has_one_length = min(prompt_lengths) == max(prompt_lengths)
        self._capacity = 0  # slots of a global loop
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}  # loop -> keys, values [B, H, S, D]
        self._slots: dict[bool, Tensor] = {}  # whether the loop is global -> slot of a single new token [B, 1, 1, 1]

    @property
    def reads_prompts(self) -> bool:
        """Whether the next tokens belong to the prompts."""
        return self._missing > 0

    def reserve(self, n_new: int) -> bool:
        """Make room for `n_new` more tokens and return whether buffers were replaced.

        Buffers shrink if the longest row would fit into a quarter of them.
        """
        needed = self.length + max(n_new, self._missing)
        if needed <= self._capacity <= max(MIN_CAPACITY, 4 * needed):
            return False
        self._capacity = max(MIN_CAPACITY, 2 * needed)
        resized = {
            loop: (self._resized(loop, keys), self._resized(loop, values))
            for loop, (keys, values) in self._buffers.items()
            if keys.shape[2] != self._size(self._is_global[loop])
        }
        self._buffers |= resized
        return bool(resized)

    def begin(self, n_new: int) -> Masks:
        """Prepare for `n_new` tokens and return their masks over the keys that `append` returns."""
        if self.length + n_new > self._capacity:
            self.reserve(n_new)
        if self.reads_prompts:
            return cached_masks(n_new, self.length, self._window_size, self.position_B.device)
        positions = self.position_B[:, None, None, None]
        self._slots = {is_global: positions % self._size(is_global) for is_global in (True, False)}
        if self._has_one_length and not self._static_shapes:
            return Masks(Mask(None), Mask(None))
        return Masks(*(slot_mask(self.position_B, self._n_visible(is_global)) for is_global in (True, False)))

    def append(self, loop: int, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values of the new tokens and return all that these can attend to, `[B, H, S, D]`.

        For a token after the prompts, S are slots. For prompts, S are the cached tokens followed by the new ones, in order;
        a windowed loop returns at most the last `window_size` of the cached ones.
        """
        if loop not in self._buffers:
            self._buffers[loop] = (self._empty(loop, k_BHTD), self._empty(loop, v_BHTD))
        keys, values = self._buffers[loop]
        if self.reads_prompts:
            return self._append_prompts(loop, keys, k_BHTD), self._append_prompts(loop, values, v_BHTD)
        is_global = self._is_global[loop]
        slots = self._slots[is_global].expand(k_BHTD.shape)
        keys.scatter_(2, slots, k_BHTD)
        values.scatter_(2, slots, v_BHTD)
        n_visible = self._n_visible(is_global)
        return keys[:, :, :n_visible], values[:, :, :n_visible]

    def last_tokens(self, x_BTD: Tensor) -> Tensor:
        """Return the state of the last new token of each row, `[B, D]`, of a padding token if its prompt ended before."""
        n_new = x_BTD.shape[1]
        if n_new == 1 or (self._has_one_length and n_new == self._missing):
            return x_BTD[:, -1]
        last_B = (self._prompt_lengths_B - self.length - 1).clamp(0, n_new - 1)
        return x_BTD[torch.arange(len(x_BTD), device=x_BTD.device), last_B]

    def advance(self, n_new: int) -> None:
        """Count `n_new` tokens that all loops have appended."""
        self.length += n_new
        self.position_B += n_new
        if self.reads_prompts:
            self.position_B.clamp_(max=self._prompt_lengths_B)
            self._missing -= n_new

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Set the number of cached tokens of each row, 0 for a row that is not in use.

        To be called when that changes, and after a CUDA graph of `decode` is replayed.
        """
        self.length, self._has_one_length = max(lengths), min(lengths) == max(lengths)

    def select(self, rows: Sequence[int]) -> None:
        """Replace the batch by these rows of it, given by their indices; a row may be repeated."""
        index = torch.tensor(rows, device=self.position_B.device)
        self.position_B = self.position_B[index]
        self._buffers = {loop: (keys[index], values[index]) for loop, (keys, values) in self._buffers.items()}

    def replace(self, rows: Sequence[int], other: KeyValueCache) -> None:
        """Overwrite these rows, in place, by those of another cache, after `reserve` has made room for their lengths."""
        index = torch.tensor(rows, device=self.position_B.device)
        self.position_B[index] = other.position_B
        for loop, buffers in self._buffers.items():
            for buffer_BHSD, other_BHSD in zip(buffers, other._buffers[loop], strict=True):
                n_slots = min(buffer_BHSD.shape[2], other_BHSD.shape[2])
                buffer_BHSD[index, :, :n_slots] = other_BHSD[:, :, :n_slots]
                buffer_BHSD[index, :, n_slots:] = 0  # a NaN of the old row times an attention weight of 0 is NaN

    def _size(self, is_global: bool) -> int:
        """Return the number of slots of a loop."""
        return self._capacity if is_global else min(self._capacity, self._window_size + 1)

    def _n_visible(self, is_global: bool) -> int:
        """Return the number of slots that a single new token attends to."""
        size = self._size(is_global)
        return size if self._static_shapes else min(size, self.length + 1)

    def _empty(self, loop: int, like_BHTD: Tensor) -> Tensor:
        """Return a new buffer; of zeros, since unused slots are read, and a NaN times an attention weight of 0 is NaN."""
        batch, heads, _, head_dim = like_BHTD.shape
        return like_BHTD.new_zeros((batch, heads, self._size(self._is_global[loop]), head_dim))

    def _resized(self, loop: int, buffer_BHSD: Tensor) -> Tensor:
        """Return a buffer of another size with the same tokens.

        No row in use has wrapped around: a windowed loop below its maximum size has one slot for each token.
        """
        resized_BHSD = self._empty(loop, buffer_BHSD)
        n_slots = min(buffer_BHSD.shape[2], resized_BHSD.shape[2])
        resized_BHSD[:, :, :n_slots] = buffer_BHSD[:, :, :n_slots]
        return resized_BHSD

    def _append_prompts(self, loop: int, buffer_BHSD: Tensor, new_BHTD: Tensor) -> Tensor:
        size, n_new, device = buffer_BHSD.shape[2], new_BHTD.shape[2], buffer_BHSD.device
        visible_BHSD = new_BHTD
        if self.length:
            first = 0 if self._is_global[loop] else max(0, self.length - self._window_size)
            cached = torch.arange(first, self.length, device=device) % size
            visible_BHSD = torch.cat([buffer_BHSD.index_select(2, cached), new_BHTD], dim=2)
        # The slots of a row get the last of its tokens that belong there. Their indices among the new ones are negative for
        # slots that keep a token of an earlier part.
        n_slots = min(size, self.length + n_new)
        last_B1 = (self._prompt_lengths_B[:, None] - self.length).clamp(max=n_new) - 1
        new_BS = last_B1 - (last_B1 + self.length - torch.arange(n_slots, device=device)) % size
        source = new_BS.clamp(min=0)[:, None, :, None].expand(-1, new_BHTD.shape[1], -1, new_BHTD.shape[3])
        slots_BHSD = buffer_BHSD[:, :, :n_slots]
        slots_BHSD.copy_(torch.where((new_BS >= 0)[:, None, :, None], new_BHTD.gather(2, source), slots_BHSD))
        return visible_BHSD
