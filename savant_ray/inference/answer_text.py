"""The text of an answer while it is generated, up to a text that ends it."""

from __future__ import annotations

from collections.abc import Sequence

from savant_ray.data.tokenizer import IncrementalDecoder, Tokenizer
from savant_ray.inference.decoder import NewTokens


class AnswerText:
    """The text of an answer, which ends before the first of the texts in `stops`.

    Attributes:
        n_tokens: number of tokens up to there.
        is_stopped: whether one of `stops` has been found.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self._decoder, self._stops, self._held = IncrementalDecoder(tokenizer, prompt), stops, ""
        self.n_tokens, self.is_stopped = 0, False

    def push(self, new: NewTokens) -> str:
        """Return the text that new tokens add, without an end that may be the beginning of a stop."""
        for token in new.ids:
            self.n_tokens += 1
            self._held += self._decoder.push(token)
            if self._find_stop():
                return self._take(len(self._held))
        if new.is_last:
            self._held += self._decoder.finish()
            self._find_stop()
            return self._take(len(self._held))
        beginnings = (stop[:length] for stop in self._stops for length in range(len(stop)))
        n_held = max((len(beginning) for beginning in beginnings if self._held.endswith(beginning)), default=0)
        return self._take(len(self._held) - n_held)

    def _find_stop(self) -> bool:
        found = [index for stop in self._stops if (index := self._held.find(stop)) >= 0]
        if found:
            self._held, self.is_stopped = self._held[: min(found)], True
        return self.is_stopped

    def _take(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text
