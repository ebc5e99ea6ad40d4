"""Decodes an answer while it is generated, and detects where it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from savant_ray.data.conversations import ConversationError, Message, conversation_prompt, end_of_answer
from savant_ray.data.tokenizer import IncrementalDecoder, Tokenizer
from savant_ray.inference.decoder import NewTokens

NEXT_QUESTION = "\nQuestion:"  # without a chat template, a model may continue an answer with it


class TurnEnd(NamedTuple):
    """Texts and tokens before which an answer ends."""

    texts: tuple[str, ...] = ()
    tokens: frozenset[int] = frozenset()


def turn_end(tokenizer: Tokenizer) -> TurnEnd:
    """Return what ends an answer in a conversation: the first special token that the chat template writes after it.

    If it writes only text there, such as a token that the vocabulary lacks, this text ends the answer; without a chat
    template the next question does. The end-of-document token ends every answer as well.
    """
    if tokenizer.chat_template is None:
        return TurnEnd(texts=(NEXT_QUESTION,))
    try:
        end = end_of_answer(tokenizer.chat_template)
    except ConversationError:  # the template will refuse each message for the same reason
        return TurnEnd()
    (ids,) = tokenizer.encode_prompts([end], special_tokens=True)
    special = [token for token in ids[len(tokenizer.prefix) :] if token in tokenizer.special_ids]
    return TurnEnd(tokens=frozenset(special[:1]), texts=() if special or not end.strip() else (end.strip(),))


def conversation_ids(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Return the ids of a conversation up to the next answer; empty if it has no tokens.

    Raises:
        ConversationError: as `conversation_prompt`.
        DataError: as `Tokenizer.encode_prompts`.
    """
    template = tokenizer.chat_template
    text = conversation_prompt(messages, template)
    return tokenizer.encode_prompts([text], special_tokens=template is not None)[0]


class AnswerText:
    """The text of an answer. With `strips`, it begins with its first character that is not white space.

    A chat template may write a space before an answer. If the answer had it too, it would be there twice when the answer is
    a part of the next prompt.

    Attributes:
        n_tokens: number of generated tokens, without a token of `end`.
        is_stopped: whether a text or token of `end` has been found.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], end: TurnEnd, strips: bool = False) -> None:
        self._decoder, self._end, self._held = IncrementalDecoder(tokenizer, prompt), end, ""
        self._strips = strips
        self.n_tokens, self.is_stopped = 0, False

    def push(self, new: NewTokens) -> str:
        """Return the text that new tokens add; hold back what may be the beginning of one of `end.texts`."""
        for token in new.ids:
            if token in self._end.tokens:
                self._held += self._decoder.finish()
                self.is_stopped = True
                return self._take(len(self._held))
            self.n_tokens += 1
            self._held += self._decoder.push(token)
            if self._find_stop():
                return self._take(len(self._held))
        if new.is_last:
            self._held += self._decoder.finish()
            self._find_stop()
            return self._take(len(self._held))
        return self._take(len(self._held) - self._n_held_back())

    def _find_stop(self) -> bool:
        found = [index for stop in self._end.texts if (index := self._held.find(stop)) >= 0]
        if found:
            self._held, self.is_stopped = self._held[: min(found)], True
        return self.is_stopped

    def _n_held_back(self) -> int:
        """Return the length of the longest end of the held text with which one of `end.texts` begins."""
        lengths = range(1, len(self._held) + 1)  # a stop of a request may be much longer
        return max((n for n in lengths if any(stop.startswith(self._held[-n:]) for stop in self._end.texts)), default=0)

    def _take(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        if self._strips:
            text = text.lstrip()
            self._strips = not text
        return text
