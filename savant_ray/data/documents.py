"""Makes documents of records: fields, templates, conversations, filters, and the split into training and validation text.

A `DocumentRule` is a pure function of a record, except for `limit`, which counts documents. It is built from the settings of
a source (`rule_of`) and is part of the identity of a token cache.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal, NamedTuple

from savant_ray.config import HeldOutConfig, Scalar, SourceConfig, TrainOn, parse_template
from savant_ray.data.conversations import (
    AUTO,
    SYSTEM_FIELDS,
    ChatTemplate,
    ConversationError,
    Message,
    find_messages,
    plain_form,
)
from savant_ray.data.records import MISSING, InvalidRecordError, Record, is_blank, json_type, look_up
from savant_ray.data.sources import SourceFile
from savant_ray.data.tokenizer import MaskedDocument, Tokenizer

DEFAULT_FIELD = "text"
# What data sets call the text, in upper or lower case.
LIKELY_FIELDS = (DEFAULT_FIELD, "content", "body", "document", "raw_content")
QUESTION_FIELDS = ("question", "prompt", "query", "instruction", "input")
ANSWER_FIELDS = ("answer", "completion", "response", "output")
MAX_NAMED_FIELDS = 8  # in a message
MAX_NAME_CHARACTERS = 40

_BOOLEAN_TEXTS = {True: ("true", "yes", "on"), False: ("false", "no", "off")}


class Document(NamedTuple):
    """What a record contributes: a document, a problem, or neither (blank, or left out by a filter)."""

    number: int
    text: str = ""
    problem: str = ""
    trained: tuple[tuple[int, int], ...] | None = None  # character ranges whose tokens are trained on; None: all
    filtered: bool = False  # left out by `filter` or `sample`
    special_tokens: bool = False  # names of special tokens in the text stand for these tokens: a chat template wrote it
    is_duplicate: bool = False  # left out because its text has occurred before
    is_conversation: bool = False  # whether the record was rendered as a conversation, or could not be
    is_other_split: bool = False  # left out because it belongs to the other of training and validation text


class _Text(NamedTuple):
    text: str
    trained: tuple[tuple[int, int], ...] | None = None
    special_tokens: bool = False
    is_conversation: bool = False


_TextFunction = Callable[[dict[str, Any]], _Text]


@dataclass(frozen=True)
class DocumentRule:
    """How a source's records become documents; by default the text is the field `text`, or a conversation.

    At most one of `text`, `template` and `messages` is set. Rules with the same `repr` give the same documents.
    """

    text: str | None = None  # name of a field; a.b is the field b of the object a
    template: str | None = None  # "Question: {question}"
    messages: str | None = None  # name of a field, or "auto"
    train_on: TrainOn = "assistant"  # of conversations
    chat_template: ChatTemplate | None = None  # None: conversations are written in the plain form
    min_chars: int = 0
    max_chars: int | None = None
    equals: tuple[tuple[str, Scalar], ...] = ()  # names of fields and their values
    sample: float = 1.0  # fraction of the documents
    limit: int | None = None  # number of documents; None: all
    held_out: float = 0.0  # fraction of the documents that is validation text
    split: Literal["training", "validation"] = "training"  # which of the two to take

    @property
    def for_texts(self) -> DocumentRule:
        """The rule without the fields that affect conversations only, unless `messages` is set."""
        return self if self.messages is not None else replace(self, train_on="assistant", chat_template=None)

    @property
    def fields(self) -> frozenset[str] | None:
        """Names of the fields that a table has to be read for; None: all, because a document may depend on any.

        `SYSTEM_FIELDS` are among them with `messages`, and need not exist.
        """
        if self.template is not None:
            names = {name for _, name in parse_template(self.template) if name is not None}
        elif self.messages == AUTO or (self.messages is None and self.text is None):
            return None
        elif self.messages is not None:
            names = {self.messages, *SYSTEM_FIELDS}
        else:
            names = {self.text or DEFAULT_FIELD}
        return frozenset(names.union(name for name, _ in self.equals))

    def documents(self, records: Iterable[Record]) -> Iterator[Document]:
        """Yield the document of each record; stop after `limit` documents, counted before the split."""
        remaining = self.limit
        if remaining == 0:
            return
        text_of = self._text_function()
        for record in records:
            document = self._document(record, text_of)
            if document.text and remaining is not None:
                remaining -= 1
            if document.text and self.held_out:
                is_validation = _is_chosen(document.text, self.held_out, purpose=b"validation")
                if is_validation != (self.split == "validation"):
                    document = Document(record.number, is_conversation=document.is_conversation, is_other_split=True)
            yield document
            if remaining == 0:
                return

    def count(self, records: Iterable[Record]) -> int:
        """Return the number of documents that count towards `limit`, at most `limit`."""
        return sum(1 for document in replace(self, held_out=0.0).documents(records) if document.text)

    def _document(self, record: Record, text_of: _TextFunction) -> Document:
        """Return the document of a record, before the split."""
        if record.value is None:
            return Document(record.number, problem=record.problem)
        if not all(_is_equal(look_up(record.value, name), expected) for name, expected in self.equals):
            return Document(record.number, filtered=True)
        try:
            text, trained, special_tokens, is_conversation = text_of(record.value)
        except (InvalidRecordError, ConversationError) as error:
            is_conversation = isinstance(error, ConversationError)
            return Document(record.number, problem=_printable(str(error)), is_conversation=is_conversation)
        left_out = Document(record.number, filtered=True, is_conversation=is_conversation)
        if len(text) < self.min_chars or (self.max_chars is not None and len(text) > self.max_chars):
            return left_out
        if self.sample < 1 and not _is_chosen(text, self.sample, purpose=b"sample"):
            return left_out
        return Document(
            record.number, text, trained=trained, special_tokens=special_tokens, is_conversation=is_conversation
        )

    def _text_function(self) -> _TextFunction:
        """Return the function that returns the text of a record or raises an error with the reason why there is none."""
        if self.template is not None:
            return _from_template(self.template)
        if self.messages is not None:
            return self._conversation
        if (name := self.text) is not None:
            return lambda value: _Text(_field_text(value, name))
        return self._text_or_conversation

    def _text_or_conversation(self, value: dict[str, Any]) -> _Text:
        if not isinstance(value.get(DEFAULT_FIELD), str) and (messages := find_messages(value)) is not None:
            return self._rendered(messages)
        return _Text(_field_text(value, DEFAULT_FIELD))

    def _conversation(self, value: dict[str, Any]) -> _Text:
        field = self.messages or AUTO
        if (messages := find_messages(value, field)) is not None:
            return self._rendered(messages)
        if field != AUTO:
            raise InvalidRecordError(_missing(value, field))
        raise InvalidRecordError(
            'no conversation in "messages", "conversations", "instruction" and "output" or "prompt" and "completion" '
            f"(found: {_names(value)})"
        )

    def _rendered(self, messages: Sequence[Message]) -> _Text:
        for number, message in enumerate(messages, start=1):
            _refuse_surrogates(f"message {number}", message["content"], ConversationError)
        rendered = plain_form(messages) if self.chat_template is None else self.chat_template.render(messages)
        if is_blank(rendered.text):
            raise ConversationError("the chat template gives an empty text")
        _refuse_surrogates("the conversation", rendered.text, ConversationError)
        trained = rendered.answers if self.train_on == "assistant" else None
        return _Text(rendered.text, trained, special_tokens=self.chat_template is not None, is_conversation=True)


TEXT_RULE = DocumentRule()


def encode(documents: Sequence[Document], tokenizer: Tokenizer) -> list[MaskedDocument]:
    """Return the ids of documents with a text, and which of them are trained on.

    Raises:
        DataError: as `Tokenizer.encode_masked_documents`.
    """
    encoded: list[MaskedDocument] = []
    for special_tokens, group in groupby(documents, key=lambda document: document.special_tokens):
        texts, trained = zip(*((document.text, document.trained) for document in group), strict=True)
        encoded += tokenizer.encode_masked_documents(texts, trained, special_tokens)
    return encoded


class SourceText(NamedTuple):
    """Files, and the rule by which their records become documents."""

    files: Sequence[SourceFile]
    rule: DocumentRule = TEXT_RULE


def rule_of(
    settings: SourceConfig | HeldOutConfig,
    chat_template: ChatTemplate | None = None,
    held_out: float | None = None,
    split: Literal["training", "validation"] = "training",
) -> DocumentRule:
    """Return the rule for a source or for validation text in files.

    `held_out` is the fraction of the documents of all sources that is validation text; None: it is in other files.
    """
    is_text = settings.text is not None or settings.template is not None
    rule = DocumentRule(
        text=settings.text,
        template=settings.template,
        messages=settings.messages,
        # A setting without effect on any record must not change the identity of a token cache.
        train_on="assistant" if is_text else settings.train_on or "assistant",
        chat_template=None if is_text else chat_template,
    )
    if not isinstance(settings, SourceConfig):
        return rule
    return replace(
        rule,
        min_chars=settings.filter.min_chars or 0,
        max_chars=settings.filter.max_chars,
        equals=tuple(sorted((settings.filter.equals or {}).items())),
        sample=settings.sample,
        limit=settings.limit,
        held_out=held_out or 0.0,
        split=split,
    )


def validation_texts(
    held_out: HeldOutConfig,
    files: Sequence[SourceFile],
    sources: Iterable[tuple[SourceConfig, Sequence[SourceFile]]],
    chat_template: ChatTemplate | None,
) -> Iterator[SourceText]:
    """Yield the validation text: `files`, or with `held_out.fraction` the held-out documents of each source."""
    if held_out.fraction is None:
        yield SourceText(files, rule_of(held_out, chat_template))
        return
    for source, source_files in sources:
        yield SourceText(source_files, rule_of(source, chat_template, held_out.fraction, "validation"))


def _from_template(template: str) -> _TextFunction:
    parts = parse_template(template)

    def fill(value: dict[str, Any]) -> _Text:
        texts: list[str] = []
        for literal, name in parts:
            texts.append(literal)
            if name is not None:
                texts.append(_template_value(value, name))
        text = "".join(texts)
        if is_blank(text):
            raise InvalidRecordError("all fields of the template are empty")
        return _Text(text)

    return fill


def _field_text(value: dict[str, Any], name: str) -> str:
    """Return the text in a field.

    Raises:
        InvalidRecordError: there is no such field, or it is not a string or blank, or not valid Unicode.
    """
    text = look_up(value, name)
    if not isinstance(text, str) or is_blank(text):
        if text is MISSING:
            raise InvalidRecordError(_missing(value, name) + _advice(value))
        state = "empty" if isinstance(text, str) else f"{json_type(text)}, not a string"
        raise InvalidRecordError(f'"{name}" is {state}')
    _refuse_surrogates(f'"{name}"', text)
    return text


def _template_value(value: dict[str, Any], name: str) -> str:
    """Return the text of a field in a template; numbers and booleans are written as in JSON."""
    found = look_up(value, name)
    if isinstance(found, str):
        _refuse_surrogates(f'"{name}"', found)
        return found
    if found is MISSING:
        raise InvalidRecordError(_missing(value, name))
    if isinstance(found, float) and not math.isfinite(found):
        raise InvalidRecordError(f'"{name}" is not a finite number')
    if not isinstance(found, bool | int | float):
        raise InvalidRecordError(f'"{name}" is {json_type(found)}, not a string, number or boolean')
    try:
        return json.dumps(found)
    except ValueError as error:  # an integer of more digits than Python converts
        raise InvalidRecordError(f'"{name}" is an integer with too many digits') from error


def _is_equal(found: Any, expected: Scalar) -> bool:
    """Return whether values are equal as in JSON, where true is not 1; a number or boolean can be a text, as in CSV.

    A text is a boolean as in YAML, which reads `lang: no` as false.
    """
    if isinstance(found, str) and not isinstance(expected, str):
        text = found.strip().lower()
        return text in _BOOLEAN_TEXTS[expected] if isinstance(expected, bool) else text == json.dumps(expected)
    return isinstance(found, bool) == isinstance(expected, bool) and bool(found == expected)


def _missing(value: dict[str, Any], name: str) -> str:
    return f'no "{name}" field (found: {_names(value)})'


def _advice(value: dict[str, Any]) -> str:
    """Return what to set if other fields obviously have the text."""
    if "role" in value or "from" in value:
        return "; it is a message, and a record has to be a conversation"
    texts = {name.strip().lower(): name for name, text in value.items() if isinstance(text, str) and text.strip()}
    likely = [texts[name] for name in LIKELY_FIELDS if texts.get(name, DEFAULT_FIELD) != DEFAULT_FIELD]
    if len(likely) == 1:
        return f"; if {likely[0]} has the text, set text: {likely[0]}"
    numbers = {name.strip().lower(): name for name, number in value.items() if isinstance(number, bool | int | float)}
    known = texts | numbers  # a template writes both
    question, answer = ([known[name] for name in names if name in known] for names in (QUESTION_FIELDS, ANSWER_FIELDS))
    if question and answer:
        return f'; set a template, such as "Question: {{{question[0]}}}\\nAnswer: {{{answer[0]}}}"'
    for name, items in value.items():
        if isinstance(items, list) and items and isinstance(items[0], dict):
            if "role" in items[0] or "from" in items[0]:
                return f"; if {name} is a conversation, set messages: {name}"
            return f"; if the records are the elements of {name}, write this array to a file of its own"
    return ""


def _names(value: dict[str, Any]) -> str:
    return ", ".join(name[:MAX_NAME_CHARACTERS] for name in sorted(value)[:MAX_NAMED_FIELDS]) or "nothing"


def _printable(text: str) -> str:
    """Return `text` with control characters and lone surrogates as escape sequences."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _refuse_surrogates(name: str, text: str, refusal: type[Exception] = InvalidRecordError) -> None:
    """Raise `refusal` if UTF-8 cannot hold the text."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise refusal(f"{name} contains half a surrogate pair ({half})") from None


def _is_chosen(text: str, fraction: float, purpose: bytes) -> bool:
    """Return whether the hash of a text is among the first `fraction` of all hashes, which differ by `purpose`."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=purpose).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64
