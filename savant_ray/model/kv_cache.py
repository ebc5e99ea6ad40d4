"""Keys and values per recurrent loop.

The block is one, but each of its loops sees other inputs, so each loop has keys and values of its own. A windowed
loop keeps the last `window_size` of them; a global loop keeps all, in a buffer that doubles when it is full, so that
generation may go on past `max_seq_len` (the model has no positions, or rotary ones, which have no end).

Shapes: B batch, H heads, T new tokens, S tokens in reach, D head_dim.
"""

from __future__ import annotations

from torch import Tensor


class KeyValueCache:
    """Grows with the tokens it is given; `windows[i]` is how far loop i looks back, None = to the beginning.

    `padding_B`: the first so many tokens of each row are padding. `length` counts what all loops have been given.
    """

    def __init__(self, windows: list[int | None], padding_B: Tensor | None = None) -> None:
        self.length, self.padding_B = 0, padding_B
        self._loops = [_LoopCache(window) for window in windows]

    def append(self, loop: int, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """The loop's keys and values `[B, H, S, D]` that the new tokens can reach, the new ones at the end.

        S = T + what was there before, but at most the loop's window of it.
        """
        return self._loops[loop].append(k_BHTD, v_BHTD)


class _LoopCache:
    def __init__(self, window: int | None) -> None:
        self._window = window
        self._length = 0
        self._buffers: tuple[Tensor, ...] | None = None  # keys, values

    def append(self, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        if self._window is not None:
            self._forget(self._window)
        end = self._length + k_BHTD.shape[2]
        buffers = self._with_room(end, k_BHTD, v_BHTD)
        for buffer, new in zip(buffers, (k_BHTD, v_BHTD), strict=True):
            buffer[:, :, self._length : end] = new
        first = 0 if self._window is None else max(0, self._length - self._window)
        self._length = end
        return buffers[0][:, :, first:end], buffers[1][:, :, first:end]

    def _forget(self, window: int) -> None:
        """Moves the last `window` entries to the front, once the buffer holds as many dead ones (amortised O(1))."""
        if self._buffers is None or self._length < 2 * window:
            return
        for buffer in self._buffers:
            buffer[:, :, :window] = buffer[:, :, self._length - window : self._length].clone()
        self._length = window

    def _with_room(self, end: int, *like: Tensor) -> tuple[Tensor, ...]:
        if self._buffers is None or self._buffers[0].shape[2] < end:
            capacity = max(64, 2 * end)
            grown = tuple(x.new_empty(*x.shape[:2], capacity, x.shape[3]) for x in like)
            for new, old in zip(grown, self._buffers or (), strict=False):
                new[:, :, : self._length] = old[:, :, : self._length]
            self._buffers = grown
        return self._buffers
