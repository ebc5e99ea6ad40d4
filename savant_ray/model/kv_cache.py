"""Key-value cache for generation, one for each loop.

All loops share one block, but each has other inputs and therefore its own keys and values. A windowed loop keeps the last
`window_size` of them. A global loop keeps all in a buffer that doubles when it is full; generation can therefore continue
past `max_seq_len`, since neither rotary embeddings nor a model without positions have a maximum length.

Shapes: B batch, H heads, T new tokens, S visible tokens, D head_dim.
"""

from __future__ import annotations

from torch import Tensor


class KeyValueCache:
    """Keys and values of all loops.

    Args:
        windows: how many tokens back each loop attends, None = to the beginning.
        padding_B: number of padding tokens at the beginning of each row.

    Attributes:
        length: number of tokens that all loops have cached.
    """

    def __init__(self, windows: list[int | None], padding_B: Tensor | None = None) -> None:
        self.length, self.padding_B = 0, padding_B
        self._loops = [_LoopCache(window) for window in windows]

    def append(self, loop: int, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values of new tokens and return all that the new tokens can attend to, `[B, H, S, D]`.

        S is T plus the number of cached tokens, of which a windowed loop returns at most its window.
        """
        return self._loops[loop].append(k_BHTD, v_BHTD)


class _LoopCache:
    def __init__(self, window: int | None) -> None:
        self._window = window
        self._length = 0
        self._buffers: tuple[Tensor, ...] | None = None  # keys, values

    def append(self, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        if self._window is not None:
            self._discard_old(self._window)
        end = self._length + k_BHTD.shape[2]
        buffers = self._buffers_of_size(end, k_BHTD, v_BHTD)
        for buffer, new in zip(buffers, (k_BHTD, v_BHTD), strict=True):
            buffer[:, :, self._length : end] = new
        first = 0 if self._window is None else max(0, self._length - self._window)
        self._length = end
        return buffers[0][:, :, first:end], buffers[1][:, :, first:end]

    def _discard_old(self, window: int) -> None:
        """Move the last `window` entries to the front once as many old ones precede them (amortized O(1))."""
        if self._buffers is None or self._length < 2 * window:
            return
        for buffer in self._buffers:
            buffer[:, :, :window] = buffer[:, :, self._length - window : self._length].clone()
        self._length = window

    def _buffers_of_size(self, end: int, *like: Tensor) -> tuple[Tensor, ...]:
        if self._buffers is None or self._buffers[0].shape[2] < end:
            capacity = max(64, 2 * end)
            grown = tuple(x.new_empty(*x.shape[:2], capacity, x.shape[3]) for x in like)
            for new, old in zip(grown, self._buffers or (), strict=False):
                new[:, :, : self._length] = old[:, :, : self._length]
            self._buffers = grown
        return self._buffers
