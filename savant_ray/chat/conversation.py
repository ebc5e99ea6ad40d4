"""A conversation with a model: its messages, prompts that fit into the context, and answers as they are generated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import NamedTuple

import orjson

from savant_ray.config import Config, SourceConfig
from savant_ray.data.conversations import ConversationError, Message, conversation_prompt
from savant_ray.data.documents import rule_of
from savant_ray.data.record_reader import documents
from savant_ray.data.source_files import find_files, path_list
from savant_ray.data.tokenizer import Tokenizer
from savant_ray.errors import SavantError
from savant_ray.inference.answer_text import AnswerText, TurnEnd, conversation_ids, turn_end
from savant_ray.inference.decoder import NewTokens
from savant_ray.inference.generate import generate
from savant_ray.inference.sampling import Sampling
from savant_ray.locations import is_uri
from savant_ray.model.transformer import UniversalTransformer

SAMPLED_DOCUMENTS = 20  # of a source, to find out whether its records are conversations


class Turn(NamedTuple):
    """A message of the user, and the answer."""

    question: str
    answer: str


class Conversation:
    """A conversation with a model. With `continues_text`, each message is instead a text of its own to continue.

    A prompt contains the system message and as many of the newest turns as fit beside the tokens reserved for the answer:
    `max_new_tokens`, but at most half of the context.

    Attributes:
        continues_text: whether messages are texts to continue instead of questions to answer.
        turns: all turns, including those that no longer fit into the context.
        system: the system message; "" if there is none.
        temperature: sampling temperature of the next answer.
        n_loops: number of times that the recurrent block is applied in the next answer.
        context: maximum number of tokens of prompt and answer.
        notes: messages for the user about the last answer, such as that it is incomplete.
    """

    def __init__(
        self,
        model: UniversalTransformer,
        tokenizer: Tokenizer,
        config: Config,
        continues_text: bool = False,
        max_new_tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        """Start a conversation without messages.

        Args:
            model: the model that answers.
            tokenizer: that of the model, with its chat template, if any.
            config: settings of the checkpoint.
            continues_text: see above.
            max_new_tokens: maximum length of an answer, tokens; None: `validation.max_new_tokens`.
            seed: the n-th answer, counted from 0, is sampled with `seed + n`.
        """
        self.continues_text, self.turns, self.system = continues_text, list[Turn](), ""
        self.temperature, self.n_loops = config.validation.temperature, config.model.n_loops
        self.context, self.notes = config.model.max_seq_len, list[str]()
        self._model, self._tokenizer = model, tokenizer
        self._max_new_tokens = config.validation.max_new_tokens if max_new_tokens is None else max_new_tokens
        self._next_seed = seed
        self._template = None if continues_text else tokenizer.chat_template
        self._first_turn = 0  # index of the oldest turn that a prompt may contain
        self._turn_end = TurnEnd() if continues_text else turn_end(tokenizer)

    def set_system(self, text: str) -> None:
        """Use a system message from now on; "" removes it.

        Raises:
            SavantError: the model continues text, or the chat template refuses or ignores system messages.
        """
        if self.continues_text:
            raise SavantError(
                "a model that continues text takes no system message; --conversation makes it answer messages"
            )
        question = {"role": "user", "content": "Question"}
        try:
            has_effect = not text or self._text([_system(text), question]) != self._text([question])
        except ConversationError as error:
            raise SavantError(f"the system message cannot be used: {error}") from error
        if not has_effect:
            raise SavantError("the chat template of the checkpoint ignores system messages")
        self.system = text

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self.turns.clear()
        self._first_turn = 0

    def ask(self, message: str, stop_requested: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Yield the answer in pieces as it is generated, and then add the turn to the conversation.

        The answer ends early once `stop_requested` returns True. An empty answer is not added, nor is one that the chat
        template refuses.

        Raises:
            SavantError: the message is too long for the context, or has no tokens, or the chat template refuses it.
        """
        self.notes = []
        prompt = self._prompt(message)
        limit = min(self._max_new_tokens, self.context - len(prompt))
        sampling = Sampling.for_tokenizer(self._tokenizer, limit, self.temperature, self._next_seed)
        self._next_seed += 1
        answer = ""
        for piece in self._pieces(prompt, sampling, stop_requested):
            answer += piece
            yield piece
        if answer.strip():
            self._add(Turn(message, answer if self.continues_text else answer.strip()))
        else:
            self.notes.append("the answer is empty, so the message is not part of the conversation")

    def to_jsonl(self) -> str:
        """Return the conversation as one record, or each continued text as a record, as `data.sources` reads them."""
        if self.continues_text:
            records: list[dict[str, object]] = [{"text": turn.question + turn.answer} for turn in self.turns]
        else:
            records = [{"messages": [*self._system_messages(), *_messages(self.turns)]}] if self.turns else []
        return "".join(orjson.dumps(record).decode() + "\n" for record in records)

    def _prompt(self, message: str) -> list[int]:
        """Return the tokens of the prompt, and leave out the oldest turns if it would be too long.

        Raises:
            SavantError: as `ask`.
        """
        room = self.context - min(self._max_new_tokens, max(1, self.context // 2))
        first = len(self.turns)
        prompt = self._encode([], message)
        if not prompt:
            raise SavantError("the message has no tokens")
        if len(prompt) > room:
            system = " with the system message" if self.system else ""
            raise SavantError(
                f"the message{system} is too long: {len(prompt):,} tokens; the context of the model is {self.context:,} "
                f"tokens, {self.context - room:,} of them for the answer"
            )
        # Adds earlier turns until one does not fit. Those that were left out once stay out.
        while not self.continues_text and first > self._first_turn:
            longer = self._encode(self.turns[first - 1 :], message)
            if len(longer) > room:
                if not self._first_turn:
                    self.notes.append(
                        f"the conversation has become longer than the context of {self.context:,} tokens; "
                        "from now on the oldest turns are left out"
                    )
                self._first_turn = first
                break
            prompt, first = longer, first - 1
        return prompt

    def _encode(self, turns: Sequence[Turn], message: str) -> list[int]:
        """Return the tokens of a prompt.

        Raises:
            SavantError: the chat template refuses the messages, or the tokenizer has no token for them.
        """
        if self.continues_text:
            return self._tokenizer.encode_prompts([message])[0]
        question = {"role": "user", "content": message}
        try:
            return conversation_ids(self._tokenizer, [*self._system_messages(), *_messages(turns), question])
        except ConversationError as error:
            raise SavantError(f"the message cannot be sent: {error}") from error

    def _text(self, messages: Sequence[Message]) -> str:
        return conversation_prompt(messages, self._template)

    def _system_messages(self) -> list[Message]:
        return [_system(self.system)] if self.system else []

    def _pieces(self, prompt: Sequence[int], sampling: Sampling, stop_requested: Callable[[], bool]) -> Iterator[str]:
        """Yield the text of an answer. In a conversation, strip leading white space, and end with the assistant's turn."""
        text = AnswerText(self._tokenizer, prompt, self._turn_end, strips=not self.continues_text)
        for new_tokens in self._tokens(prompt, sampling, stop_requested):
            if piece := text.push(new_tokens):
                yield piece
            if text.is_stopped:
                return

    def _tokens(
        self, prompt: Sequence[int], sampling: Sampling, stop_requested: Callable[[], bool]
    ) -> Iterator[NewTokens]:
        tokens = generate(self._model, prompt, sampling, self.n_loops)
        for n_tokens, token in enumerate(tokens, start=1):
            yield NewTokens([token], is_last=False)
            if stop_requested():
                self.notes.append("stopped")
                break
            if n_tokens == sampling.max_new_tokens:
                self.notes.append(f"the answer has reached its maximum length, {n_tokens:,} tokens")
        yield NewTokens([], is_last=True)

    def _add(self, turn: Turn) -> None:
        """Add a turn, unless the chat template refuses its answer, such as one with the name of a special token."""
        if not self.continues_text:
            try:
                self._text([*self._system_messages(), *_messages([turn]), {"role": "user", "content": "Question"}])
            except ConversationError as error:
                self.notes.append(f"the answer cannot become part of the conversation: {error}")
                return
        self.turns.append(turn)


def is_for_conversations(config: Config, tokenizer: Tokenizer) -> bool:
    """Return whether a model with these settings answers messages instead of continuing text.

    It does if it has a chat template, or if a training source has conversations: its settings say so, or some of the first
    documents in its local files are conversations. Missing files count as text.
    """
    return tokenizer.chat_template is not None or any(
        _has_conversations(source, config, tokenizer) for source in config.data.sources
    )


def _has_conversations(source: SourceConfig, config: Config, tokenizer: Tokenizer) -> bool:
    if source.messages is not None:
        return True
    if source.text is not None or source.template is not None or any(map(is_uri, path_list(source.path))):
        return False
    with suppress(SavantError):
        files = find_files(source, config.data.cache_dir, notify=lambda message: None)
        first = islice(documents(files, rule=rule_of(source, tokenizer.chat_template)), SAMPLED_DOCUMENTS)
        return any(document.is_conversation for document in first)
    return False


def _system(text: str) -> Message:
    return {"role": "system", "content": text}


def _messages(turns: Sequence[Turn]) -> Iterator[Message]:
    for turn in turns:
        yield {"role": "user", "content": turn.question}
        yield {"role": "assistant", "content": turn.answer}
