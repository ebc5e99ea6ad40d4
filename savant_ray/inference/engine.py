"""Runs a decoder for requests of an asyncio event loop."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Collection
from concurrent.futures import ThreadPoolExecutor

from savant_ray.inference.decoder import Decoder, NewTokens
from savant_ray.inference.sampling import Sampling

# The first token of an answer is delivered immediately, and the last ones at its end. In between there are at most 10
# deliveries per second for an answer and 40 for all, because each costs Ray and HTTP as much as a step of a small decoder.
DELIVERY_SECONDS = 0.1
DELIVERY_SECONDS_PER_ANSWER = 0.025


class _StreamedAnswer:
    """An answer to a request.

    Attributes:
        new: generated tokens that are not delivered yet.
        due: time from which the next delivery is allowed.
        delivered: tokens that the request has not consumed yet, or the error that ended decoding.
    """

    def __init__(self, prompt: list[int], sampling: Sampling, end_tokens: Collection[int]) -> None:
        self.prompt, self.sampling, self.end_tokens, self.answer_id = prompt, sampling, end_tokens, -1
        self.new, self.is_last, self.due = list[int](), False, 0.0
        self.delivered: asyncio.Queue[NewTokens | Exception] = asyncio.Queue()

    def add(self, tokens: NewTokens) -> None:
        """Add new tokens, up to one that ends the answer."""
        for token in tokens.ids:
            self.new.append(token)
            if token in self.end_tokens:
                self.is_last = True
                return
        self.is_last = tokens.is_last

    def take_new(self) -> NewTokens:
        """Return the new tokens."""
        new, self.new = self.new, []
        return NewTokens(new, self.is_last)


class Engine:
    """Runs a decoder in a thread. Requests join the batch before its next token, on a GPU before its next group of tokens.

    A request leaves the batch when its answer ends or it is canceled. Must be created in a running event loop.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._joining: list[_StreamedAnswer] = []
        self._leaving: list[_StreamedAnswer] = []
        self._answers: dict[int, _StreamedAnswer] = {}  # in progress, by their id in the decoder
        self._changes = asyncio.Event()  # requests join or leave
        self._task = asyncio.get_running_loop().create_task(self._run())

    @property
    def error(self) -> BaseException | None:
        """The exception that ended decoding, None if it runs."""
        return self._task.exception() if self._task.done() else None

    async def tokens(
        self, prompt: list[int], sampling: Sampling, end_tokens: Collection[int] = ()
    ) -> AsyncIterator[NewTokens]:
        """Yield the tokens of an answer as they are delivered; `end_tokens` end it, in addition to the end of the document.

        Raises:
            RuntimeError: decoding has failed.
        """
        answer = _StreamedAnswer(prompt, sampling, end_tokens)
        if self.error is not None:
            raise RuntimeError(f"decoding has failed: {self.error}") from self.error
        self._joining.append(answer)
        self._changes.set()
        try:
            while not isinstance(new := await answer.delivered.get(), Exception):
                yield new
                if new.is_last:
                    return
            raise RuntimeError(f"decoding has failed: {new}") from new
        finally:
            self._leaving.append(answer)
            self._changes.set()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        joining: list[_StreamedAnswer] = []
        try:
            with ThreadPoolExecutor(1, "decoder") as thread:
                while True:
                    if not self._answers:
                        await self._changes.wait()
                    self._changes.clear()
                    leaving, self._leaving = self._leaving, []
                    joining = [answer for answer in self._joining if answer not in leaving]
                    self._joining = []
                    for answer, tokens in await loop.run_in_executor(thread, self._decode, joining, leaving):
                        answer.delivered.put_nowait(tokens)
        except Exception as error:
            for answer in {*self._answers.values(), *joining, *self._joining}:
                answer.delivered.put_nowait(error)
            raise

    def _decode(
        self, joining: list[_StreamedAnswer], leaving: list[_StreamedAnswer]
    ) -> list[tuple[_StreamedAnswer, NewTokens]]:
        """Decode until tokens are to be delivered or requests join or leave; return what is to be delivered.

        Prompts of similar length are processed together.
        """
        for answer in leaving:
            self._remove(answer)
        joining.sort(key=lambda answer: len(answer.prompt))
        for _, group in itertools.groupby(joining, key=lambda answer: len(answer.prompt).bit_length()):
            answers = list(group)
            answer_ids = self._decoder.add(
                [answer.prompt for answer in answers], [answer.sampling for answer in answers]
            )
            for answer, answer_id in zip(answers, answer_ids, strict=True):
                answer.answer_id = answer_id
                self._answers[answer_id] = answer
        deliveries: list[tuple[_StreamedAnswer, NewTokens]] = []
        while self._answers and not deliveries and not self._changes.is_set():
            new_tokens = self._decoder.next_tokens()
            now = time.monotonic()
            for answer_id, tokens in new_tokens.items():
                answer = self._answers[answer_id]
                answer.add(tokens)
                if answer.is_last or now >= answer.due:
                    answer.due = now + max(DELIVERY_SECONDS, DELIVERY_SECONDS_PER_ANSWER * len(self._answers))
                    deliveries.append((answer, answer.take_new()))
                if answer.is_last:
                    self._remove(answer)
        return deliveries

    def _remove(self, answer: _StreamedAnswer) -> None:
        if self._answers.pop(answer.answer_id, None):
            self._decoder.remove(answer.answer_id)
