"""Runs a decoder for requests of an asyncio event loop."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator

from savant_ray.inference.decoder import Decoder, NewTokens
from savant_ray.inference.sampling import Sampling

# Between deliveries of tokens, except for the first and the last ones of an answer. Each delivery takes the interpreter lock
# away from the decoder, and a server sends a chunk for it.
DELIVERY_SECONDS = 0.1


class _Answer:
    """A request; `new` and `changed` belong to the event loop, the others to the thread."""

    def __init__(self, prompt: list[int], sampling: Sampling) -> None:
        self.prompt, self.sampling, self.number, self.has_begun = prompt, sampling, -1, False
        self.new: list[NewTokens] = []
        self.changed = asyncio.Event()


class Engine:
    """Runs a decoder in a thread. Requests of an event loop join at the next token, and leave when they are canceled.

    To be created in the event loop.

    Attributes:
        error: what ended the thread.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.error: Exception | None = None
        self._decoder, self._loop = decoder, asyncio.get_running_loop()
        self._wakes = threading.Condition()
        self._joining: list[_Answer] = []
        self._leaving: list[_Answer] = []
        self._answers: dict[int, _Answer] = {}  # in progress, by their number in the decoder
        self._waiting: set[_Answer] = set()  # of the event loop
        threading.Thread(target=self._run, name="decoder", daemon=True).start()

    @property
    def n_answers(self) -> int:
        """Number of answers in progress."""
        return len(self._answers)

    async def tokens(self, prompt: list[int], sampling: Sampling) -> AsyncIterator[NewTokens]:
        """Yield the tokens of an answer, all that have been delivered at once.

        Raises:
            RuntimeError: decoding has failed.
        """
        answer = _Answer(prompt, sampling)
        self._waiting.add(answer)
        self._change(self._joining, answer)
        try:
            is_last = False
            while not is_last:
                if self.error is None:
                    await answer.changed.wait()
                if self.error is not None:
                    raise RuntimeError(f"decoding has failed: {self.error}") from self.error
                answer.changed.clear()
                new, answer.new = answer.new, []
                is_last = new[-1].is_last
                yield NewTokens([token for tokens in new for token in tokens.ids], is_last)
        finally:
            self._waiting.discard(answer)
            self._change(self._leaving, answer)

    def _change(self, answers: list[_Answer], answer: _Answer) -> None:
        with self._wakes:
            answers.append(answer)
            self._wakes.notify()

    def _run(self) -> None:
        new: list[tuple[_Answer, NewTokens]] = []
        due = 0.0
        try:
            while True:
                self._update()
                new += [(self._answers[number], tokens) for number, tokens in self._decoder.next_tokens().items()]
                now = time.monotonic()
                if now >= due or any(tokens.is_last or not answer.has_begun for answer, tokens in new):
                    for answer, tokens in new:
                        answer.has_begun = True
                        if tokens.is_last:
                            self._answers.pop(answer.number, None)
                    self._loop.call_soon_threadsafe(_deliver, new)
                    new, due = [], now + DELIVERY_SECONDS
        except Exception as error:
            self.error = error
            self._loop.call_soon_threadsafe(self._wake_all)

    def _wake_all(self) -> None:
        for answer in self._waiting:
            answer.changed.set()

    def _update(self) -> None:
        """Wait until there are requests, and let them join and leave; prompts of similar length are processed together."""
        with self._wakes:
            self._wakes.wait_for(lambda: self._joining or self._leaving or self._answers)
            joining = sorted(set(self._joining) - set(self._leaving), key=lambda answer: len(answer.prompt))
            leaving = self._leaving[:]
            self._joining.clear()
            self._leaving.clear()
        for answer in leaving:
            if self._answers.pop(answer.number, None):
                self._decoder.remove(answer.number)
        for _, group in itertools.groupby(joining, key=lambda answer: len(answer.prompt).bit_length()):
            answers = list(group)
            numbers = self._decoder.add([answer.prompt for answer in answers], [answer.sampling for answer in answers])
            for answer, number in zip(answers, numbers, strict=True):
                answer.number = number
                self._answers[number] = answer


def _deliver(new: list[tuple[_Answer, NewTokens]]) -> None:
    for answer, tokens in new:
        answer.new.append(tokens)
        answer.changed.set()
