"""Tokenizer: loading, training, encoding and decoding.

Wraps Hugging Face's `tokenizers`, so that no other module depends on the names of special tokens.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers

from savant_ray.config import Config
from savant_ray.data.chat_template import chat_template_files, load_chat_template
from savant_ray.data.conversations import ChatTemplate
from savant_ray.errors import DataError, SettingsError
from savant_ray.locations import local_path

TOKENIZER_FILE = "tokenizer.json"
PAD, END_OF_DOCUMENT = "<|pad|>", "<|end_of_document|>"
END_NAMES = (
    *(END_OF_DOCUMENT, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>"),
    *("<|end|>", "<|im_end|>", "[EOS]", "[SEP]"),
)
PADDING_NAMES = (PAD, "<pad>", "[PAD]", "<|padding|>")
NEVER_SAMPLED_NAMES = (
    *(*PADDING_NAMES, "<unk>", "<|unk|>", "[UNK]", "<s>", "<bos>", "[BOS]", "[CLS]"),
    *("<|startoftext|>", "<|begin_of_text|>", "[MASK]", "<mask>"),
)
OTHER_FORMATS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "merges.txt", "vocab.txt")
SEGMENT_CHARACTERS = 1 << 20  # longer texts are encoded in parts
BETWEEN_WORDS = re.compile(r"(?<=\w)(?= \w)")
MAX_CHARACTER_BYTES = 4  # UTF-8
REPLACEMENT = "\ufffd"  # decoders return it for invalid bytes
MAX_CONTEXT_IDS = 16
PLACEHOLDER = 2**32 - 1  # the largest id that `tokenizers` supports, which no token of a template has

Choice = bool | Literal["auto"]
CharacterRanges = Sequence[tuple[int, int]]  # [start, stop)


class MaskedDocument(NamedTuple):
    """Ids of a document, and for each whether it is trained on."""

    ids: list[int]
    is_trained: NDArray[np.bool_]


class Tokenizer:
    """Conversion between text and token ids; "<|end_of_document|>" in a text is encoded as text.

    A document is encoded as `prefix`, the ids of its text, and `suffix`, which ends with `end_of_document`; a prompt as
    `prefix` and the ids of its text. With `add_special_tokens`, prefix and suffix are those of the template that the
    tokenizer's post-processor has for a single text, such as `[CLS] $A [SEP]`. If the template appends nothing, such as
    Llama's `<s> $A`, the suffix is the end-of-document token.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        name: str = "the tokenizer",
        end_of_document: str | None = None,
        add_special_tokens: Choice = "auto",
    ) -> None:
        """Wrap a Hugging Face tokenizer.

        Args:
            inner: the tokenizer; its padding and truncation are disabled.
            name: for messages.
            end_of_document: token of the vocabulary that ends each document, in place of the last token of the template; the
                property of the same name is its id. None: the last token of the template; without one, the first of
                `END_NAMES` that is a special token, otherwise the first in the vocabulary.
            add_special_tokens: whether to use the template; `auto`: use it if there is one.

        Raises:
            SettingsError: `end_of_document` is not in the vocabulary (the message lists similar tokens), or
                `add_special_tokens` is true without a template, or the template does not contain the text exactly once.
        """
        inner.encode_special_tokens = True  # not stored in the JSON, so it is set after every load
        inner.no_padding()
        inner.no_truncation()
        self.name = name
        self.end_name = end_of_document
        self._inner = inner
        self._chat: ChatTemplate | None = None
        self._dropped: dict[str, bool] = {}  # character -> whether the vocabulary lacks it
        self.prefix, self._template_suffix = ((), ()) if add_special_tokens is False else _template(inner, name)
        self.adds_special_tokens = bool(self.prefix or self._template_suffix)
        if add_special_tokens is True and not self.adds_special_tokens:
            raise SettingsError(
                f"data.add_special_tokens: true, but {name} has no template that adds special tokens to a text; "
                "set it to auto"
            )
        if end_of_document is not None and inner.token_to_id(end_of_document) is None:
            raise SettingsError(_unknown_token(inner, name, end_of_document))

    @classmethod
    def load(
        cls,
        spec: str | os.PathLike[str],
        end_of_document: str | None = None,
        add_special_tokens: Choice = "auto",
    ) -> Tokenizer:
        """Load a tokenizer.json, a folder that contains one, or a Hugging Face model such as `albert-base-v2`.

        A chat template is taken from `chat_template.jinja` or `tokenizer_config.json` beside it.

        Raises:
            DataError: it does not exist, cannot be read, or has no vocabulary.
            SettingsError: the vocabulary lacks `end_of_document`, or the tokenizer has no template that can be used.
        """
        path = local_path(str(spec), "tokenizer", DataError)
        path = path / TOKENIZER_FILE if os.path.isdir(path) else path  # noqa: PTH112 - Path.is_dir raises for a name too long
        is_file = os.path.isfile(path)  # noqa: PTH113
        try:
            if is_file:
                inner = tokenizers.Tokenizer.from_file(str(path))
            elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(spec)) or path.suffix == ".json":
                raise DataError(
                    f"tokenizer {spec}: no such tokenizer.json, nor a folder that contains one{_other_format(path)}"
                )
            else:
                inner = tokenizers.Tokenizer.from_pretrained(str(spec))
        except DataError:
            raise
        except BaseException as error:
            if not _is_from_tokenizers(error):
                raise
            raise DataError(_load_error(spec, path, error)) from error
        if not inner.get_vocab_size(with_added_tokens=False):
            raise DataError(f"tokenizer {spec}: it has no vocabulary, so it cannot encode any text")
        tokenizer = cls(inner, f"the tokenizer {spec}", end_of_document, add_special_tokens)
        tokenizer._chat = load_chat_template(path.parent if is_file else str(spec))
        return tokenizer

    @classmethod
    def from_json(
        cls,
        text: str,
        name: str = "the tokenizer",
        end_of_document: str | None = None,
        add_special_tokens: Choice = "auto",
    ) -> Tokenizer:
        """Build a tokenizer from the text that `to_json` returned."""
        return cls(tokenizers.Tokenizer.from_str(text), name, end_of_document, add_special_tokens)

    def with_settings(self, end_of_document: str | None = None, add_special_tokens: Choice = "auto") -> Tokenizer:
        """Return the same tokenizer with other settings; None and `auto` keep the current ones.

        Raises:
            SettingsError: the vocabulary has no such token, or the tokenizer has no template.
        """
        end = self.end_name if end_of_document is None else end_of_document
        adds = self.adds_special_tokens if add_special_tokens == "auto" else add_special_tokens
        tokenizer = Tokenizer(self._inner, self.name, end, adds)
        tokenizer._chat = self._chat
        return tokenizer

    def to_json(self) -> str:
        """Return the tokenizer as JSON, without the arguments `name`, `end_of_document` and `add_special_tokens`."""
        return self._inner.to_str()

    def prompt_json(self) -> str:
        """Return `to_json` with a template that adds only `prefix`, so that other programs encode a text as a prompt."""
        n_added = self._inner.num_special_tokens_to_add(is_pair=False)
        if n_added == 0 or (self.prefix and _template(self._inner, self.name) == (self.prefix, ())):
            return self.to_json()
        copy = tokenizers.Tokenizer.from_str(self.to_json())
        copy.post_processor = None
        if self.prefix:
            prefix = {"id": "prefix", "ids": list(self.prefix), "tokens": list(map(self.token_name, self.prefix))}
            template = processors.TemplateProcessing(single="prefix $A", pair="prefix $A $B:1", special_tokens=[prefix])
            copy.post_processor = template
        return copy.to_str()

    def files(self) -> dict[str, str]:
        """Return the files from which `load` loads the tokenizer with its chat template, as text by name."""
        return {TOKENIZER_FILE: self.to_json(), **chat_template_files(self._chat)}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON, which does not depend on the layout of the file.

        It also depends on whether the template is used, and on the end-of-document token unless earlier versions chose it by
        default, so that their token caches are used.
        """
        canonical = json.dumps(json.loads(self.to_json()), sort_keys=True, separators=(",", ":"))
        if self.adds_special_tokens:
            canonical += " with special tokens"
        earlier_default = list(self._template_suffix[-1:]) or self._ids_of(END_NAMES)
        if self._ends[:1] != earlier_default[:1]:
            canonical += f" end of document: {self.token_name(self._ends[0])}"
        return hashlib.sha256(canonical.encode()).hexdigest()

    @cached_property
    def vocab_size(self) -> int:
        """Largest id + 1, which is the smallest vocabulary size that a model can have."""
        ids = self._inner.get_vocab(with_added_tokens=True).values()
        return max([*ids, *self.prefix, *self._template_suffix], default=-1) + 1

    @cached_property
    def end_of_document(self) -> int:
        """Id of the token that ends each document.

        Raises:
            DataError: no token was set, the template has none, and the vocabulary has none with a common name.
        """
        if not self._ends:
            special = ", ".join(_special_tokens(self._inner)[:12])
            raise DataError(
                f"{self.name} has no end-of-document token with a common name ({', '.join(END_NAMES)}); set "
                "data.end_of_document to the token that ends documents"
                + f" (special tokens: {special})"
                * bool(special)
            )
        return self._ends[0]

    @cached_property
    def suffix(self) -> tuple[int, ...]:
        """Ids after the text of a document; the last one is `end_of_document`.

        Raises:
            DataError: the tokenizer has no end-of-document token.
        """
        template, end = self._template_suffix, self.end_of_document
        if template[-1:] == (end,):
            return template
        # The template's last token is another one: keep what is before `end`, or without an `end` replace the last token.
        before_end = template[: template.index(end)] if end in template else template[:-1]
        return (*before_end, end)

    def count_same_ids(self, other: Tokenizer) -> tuple[int, int]:
        """Return how many ids are the same token in `other` as in this tokenizer, and the number of ids of this one."""
        vocab, other_vocab = (t._inner.get_vocab(with_added_tokens=True) for t in (self, other))
        return sum(other_vocab.get(token) == number for token, number in vocab.items()), len(vocab)

    @cached_property
    def never_sampled(self) -> frozenset[int]:
        """Ids that must not be sampled: padding, unknown, begin and mask tokens, the prefix, and unused ids."""
        unused = set(range(self.vocab_size)) - set(self._inner.get_vocab(with_added_tokens=True).values())
        end = self._ids_of([] if self.end_name is None else [self.end_name])  # may be a padding token
        never = {*self._ids_of(NEVER_SAMPLED_NAMES), *self.prefix, *unused}
        return frozenset(never.difference(self._template_suffix, end))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special tokens, which `decode` skips."""
        return frozenset(id_ for id_, token in self._inner.get_added_tokens_decoder().items() if token.special)

    def token_name(self, token: int) -> str:
        """Return the entry of an id in the vocabulary; "" if it has none."""
        return self._inner.id_to_token(token) or ""

    def id_of(self, name: str) -> int | None:
        """Return the id of an entry of the vocabulary, None if it has no such entry."""
        number: int | None = self._inner.token_to_id(name)
        return number

    def encode_documents(self, texts: Sequence[str], special_tokens: bool = False) -> list[list[int]]:
        """Return the ids of each text as a document: `prefix`, text, `suffix`.

        With `special_tokens`, names of special tokens in the texts stand for these tokens, as a chat template writes them.

        Raises:
            DataError: as `encode_batch`, or the tokenizer has no end-of-document token.
        """
        with self._names_as_special_tokens(special_tokens):
            return [[*self.prefix, *ids, *self.suffix] for ids in self.encode_batch(texts)]

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The chat template that was found beside the file of the tokenizer; None if there is none.

        Raises:
            DataError: the tokenizer has no end-of-document token.
        """
        if self._chat is None:
            return None
        prefix, suffix = (
            "".join(self._inner.id_to_token(number) or "" for number in ids) for ids in (self.prefix, self.suffix)
        )
        special_tokens = tuple(_special_tokens(self._inner))
        return dataclasses.replace(self._chat, special_tokens=special_tokens, prefix=prefix, suffix=suffix)

    def encode_masked_documents(
        self, texts: Sequence[str], trained: Sequence[CharacterRanges | None], special_tokens: bool = False
    ) -> list[MaskedDocument]:
        """Return the ids of each text as a document, and which of them are trained on.

        `trained` has the character ranges of each text that are trained on; None: all of its ids are. An id is trained on
        if at least one of its characters is. The prefix is not, and the suffix is if a range reaches the end of the text.
        `special_tokens` is that of `encode_documents`.

        Raises:
            DataError: as `encode_documents`.
        """
        pairs = list(zip(texts, trained, strict=True))
        plain = self.encode_documents([text for text, ranges in pairs if ranges is None], special_tokens)
        all_trained = (MaskedDocument(ids, np.ones(len(ids), dtype=bool)) for ids in plain)
        with self._names_as_special_tokens(special_tokens):
            return [
                next(all_trained) if ranges is None else self._encode_masked(text, ranges) for text, ranges in pairs
            ]

    @contextmanager
    def _names_as_special_tokens(self, enabled: bool) -> Iterator[None]:
        """Encode names of special tokens in a text as these tokens, instead of as text; not thread-safe."""
        self._inner.encode_special_tokens = not enabled
        try:
            yield
        finally:
            self._inner.encode_special_tokens = True

    def encode_prompts(self, texts: Sequence[str], special_tokens: bool = False) -> list[list[int]]:
        """Return the ids of each text as a prompt: `prefix`, text; empty for a text without tokens.

        `special_tokens` is that of `encode_documents`: true for a prompt that a chat template wrote.

        Raises:
            DataError: as `encode_batch`.
        """
        with self._names_as_special_tokens(special_tokens):
            return [[*self.prefix, *ids] if ids else [] for ids in self.encode_batch(texts)]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without prefix and suffix.

        Raises:
            DataError: the tokenizer has neither tokens nor an unknown token for it.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text; uses all cores unless the variable TOKENIZERS_PARALLELISM is `false`.

        Raises:
            DataError: the tokenizer has neither tokens nor an unknown token for one of them.
        """
        if any(len(text) > SEGMENT_CHARACTERS for text in texts):
            return [[token for part in _segments(text) for token in self.encode(part)] for text in texts]
        with self._errors_as_data_error():
            return [encoding.ids for encoding in self._inner.encode_batch_fast(texts, add_special_tokens=False)]

    def dropped_characters(self, text: str) -> tuple[int, str]:
        """Return the number of characters of `text` that the tokenizer drops, and the distinct ones as a sorted string.

        Only a BPE without an unknown token drops characters. White space is not counted: many pre-tokenizers remove it.
        """
        if not self._can_drop:
            return 0, ""
        characters = set(text)
        for character in characters - self._dropped.keys():
            self._dropped[character] = self._is_dropped(character)
        missing = {character for character in characters if self._dropped[character]}
        return (sum(character in missing for character in text) if missing else 0), "".join(sorted(missing))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids; special tokens and ids outside the vocabulary are skipped."""
        return self._inner.decode(list(ids), skip_special_tokens=True)

    def decode_continuation(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """Return the text that `ids` add to the text of `prompt`, with a leading space if they begin a new word."""
        context = self.decoding_context(prompt)
        return self.decode([*context, *ids])[len(self.decode(context)) :]

    def decoding_context(self, prompt: Sequence[int]) -> list[int]:
        """Return the shortest suffix of `prompt` whose text is not empty and has only complete characters; [] if none.

        Ids that follow the prompt are decoded together with this context, because some decoders (Metaspace, WordPiece)
        drop the space in front of the first token that they decode.
        """
        for n_ids in range(1, min(len(prompt), MAX_CONTEXT_IDS) + 1):
            context = list(prompt[-n_ids:])
            text = self.decode(context)
            if text and REPLACEMENT not in text:
                return context
        return []

    @contextmanager
    def _errors_as_data_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            if not _is_from_tokenizers(error):
                raise
            raise DataError(
                f"{self.name} cannot encode the text ({error}); set data.tokenizer to one with an unknown token or "
                "byte fallback, or to auto to train one on the text"
            ) from error

    def _encode_masked(self, text: str, trained: CharacterRanges) -> MaskedDocument:
        characters = np.zeros(len(text) + 1, dtype=bool)
        for start, stop in trained:
            characters[start:stop] = True
        n_trained_before = np.concatenate(([0], np.cumsum(characters)))
        ids, is_trained = list(self.prefix), [np.zeros(len(self.prefix), dtype=bool)]
        begin = 0
        for segment in _segments(text):
            self._with_offsets.encode_special_tokens = self._inner.encode_special_tokens
            with self._errors_as_data_error():
                encoding = self._with_offsets.encode(segment, add_special_tokens=False)
            starts, stops = begin + np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
            stops = np.maximum(stops, starts + 1)  # a token that a normalizer has inserted has no characters of its own
            ids += encoding.ids
            is_trained.append(n_trained_before[stops] > n_trained_before[starts])
            begin += len(segment)
        reaches_end = max((stop for _, stop in trained), default=-1) >= len(text)
        is_trained.append(np.full(len(self.suffix), reaches_end))
        return MaskedDocument([*ids, *self.suffix], np.concatenate(is_trained))

    @cached_property
    def _with_offsets(self) -> tokenizers.Tokenizer:
        """The tokenizer without a post-processor, which may exclude spaces from the offsets of their tokens."""
        if self._inner.post_processor is None:
            return self._inner
        copy = tokenizers.Tokenizer.from_str(self.to_json())
        copy.post_processor = None
        return copy

    @cached_property
    def _ends(self) -> list[int]:
        """Id of the end-of-document token that was set; otherwise the candidates, in order of preference.

        Special tokens are first: Gemma has `</s>` as a tag of HTML, beside its special token `<eos>`.
        """
        if self.end_name is not None:
            return self._ids_of([self.end_name])
        by_name = sorted(self._ids_of(END_NAMES), key=lambda number: number not in self.special_ids)
        return list(self._template_suffix[-1:]) or by_name

    @cached_property
    def _can_drop(self) -> bool:
        settings = json.loads(self.to_json())
        model = settings["model"]
        if model.get("type", "BPE") != "BPE" or model.get("unk_token") is not None:
            return False
        is_byte_level = '"ByteLevel"' in json.dumps([settings["pre_tokenizer"], settings["normalizer"]])
        return not (is_byte_level and all(byte in model["vocab"] for byte in pre_tokenizers.ByteLevel.alphabet()))

    @cached_property
    def _affixes(self) -> tuple[str, str]:
        """Prefix of BPE tokens inside a word, and suffix of BPE tokens at the end of a word."""
        model = json.loads(self.to_json())["model"]
        return model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""

    def _is_dropped(self, character: str) -> bool:
        if character.isspace() or character == REPLACEMENT:
            return False
        if ids := self.encode(character):
            return REPLACEMENT in self.decode(ids)  # the vocabulary has only some of its bytes
        prefix, suffix = self._affixes
        forms = {before + character + after for before in ("", prefix) for after in ("", suffix)}
        return not self._ids_of(forms)

    def _ids_of(self, names: Iterable[str]) -> list[int]:
        return [number for name in names if (number := self._inner.token_to_id(name)) is not None]


class IncrementalDecoder:
    """Decoder for text that is generated token by token; it returns complete characters only.

    `prompt` contains the ids that precede the generated ones. `tokenizers.DecodeStream` is not used, because it waits
    forever for the rest of an invalid byte sequence, and an untrained model generates many of them.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._context = tokenizer.decoding_context(prompt)  # ids whose text has been returned
        self._pending: list[int] = []
        self._n_complete = 0  # complete characters of the pending ids
        self._n_waiting = 0  # ids since the last of these characters

    def push(self, token: int) -> str:
        """Add an id; return the text of all pending ids, or "" while their last character is incomplete.

        In some vocabularies an id ends one character and begins the next one, so several such ids may be pending.
        """
        self._pending.append(token)
        text = self._new_text()
        n_complete = len(text.rstrip(REPLACEMENT))
        self._n_waiting = 0 if n_complete > self._n_complete else self._n_waiting + bool(text)
        self._n_complete = n_complete
        if not text or (text.endswith(REPLACEMENT) and self._n_waiting < MAX_CHARACTER_BYTES):
            return ""
        self._context, self._pending, self._n_complete, self._n_waiting = self._pending, [], 0, 0
        return text

    def finish(self) -> str:
        """Return the text of the ids that are still pending when generation ends."""
        return self._new_text()

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._pending)[len(before) :]


def text_pieces(tokenizer: Tokenizer, document: MaskedDocument) -> list[tuple[str, bool]]:
    """Return the text of a document, divided where training on it begins or ends, and whether each piece is trained on.

    Special tokens appear by name. A character of several tokens is trained on if one of them is.
    """
    special = {*tokenizer.special_ids, *tokenizer.prefix, *tokenizer.suffix}
    pieces: list[tuple[str, bool]] = []
    decoder, is_any_trained = IncrementalDecoder(tokenizer), False
    for token, is_trained in zip(document.ids, document.is_trained.tolist(), strict=True):
        if token in special:
            pieces += [(decoder.finish(), is_any_trained), (tokenizer.token_name(token), is_trained)]
            decoder, is_any_trained = IncrementalDecoder(tokenizer), False
            continue
        is_any_trained |= is_trained
        if text := decoder.push(token):
            pieces.append((text, is_any_trained))
            is_any_trained = False
    pieces.append((decoder.finish(), is_any_trained))
    runs = itertools.groupby((piece for piece in pieces if piece[0]), key=lambda piece: piece[1])
    return [("".join(text for text, _ in run), is_trained) for is_trained, run in runs]


def with_tokenizer_settings(config: Config, tokenizer: Tokenizer | None) -> Config:
    """Return the settings with `end_of_document` and `add_special_tokens` set to those of the tokenizer.

    `tokenizer` is None if it is yet to be trained; trained tokenizers add no special tokens.
    """
    chosen: dict[str, object] = {"add_special_tokens": tokenizer is not None and tokenizer.adds_special_tokens}
    if tokenizer is not None:
        chosen["end_of_document"] = tokenizer.end_name
    return config.model_copy(update={"data": config.data.model_copy(update=chosen)})


def train_tokenizer(texts: Iterator[str], vocab_size: int = 32_000) -> Tokenizer:
    """Train a byte-level BPE on `texts`; it can encode any text.

    Each digit is a token of its own, which makes arithmetic easier to learn; a space before a number is part of the token
    of its first digit.
    """
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r" ?\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return Tokenizer(inner)


def _segments(text: str) -> Iterator[str]:
    """Yield a very long text in parts, because encoding takes about a hundred times the memory of the text.

    Parts end before a space between two words, where pre-tokenizers split as well, so the ids are the same. In a text
    without such spaces, parts end anywhere, and the ids at the cuts may differ.
    """
    begin = 0
    while len(text) - begin > SEGMENT_CHARACTERS:
        end = begin + SEGMENT_CHARACTERS
        space = BETWEEN_WORDS.search(text, end - SEGMENT_CHARACTERS // 8, end)
        end = space.start() if space else end
        yield text[begin:end]
        begin = end
    yield text[begin:]


def _template(inner: tokenizers.Tokenizer, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that the post-processor adds before and after a single text.

    They are determined by processing a placeholder token, which works for all types of post-processors.

    Raises:
        SettingsError: the result does not contain the text exactly once.
    """
    if inner.post_processor is None:
        return (), ()
    probe = tokenizers.Tokenizer(models.WordLevel({"x": PLACEHOLDER}))
    probe.post_processor = inner.post_processor
    ids = tuple(probe.encode("x", add_special_tokens=True).ids)
    if ids.count(PLACEHOLDER) != 1:
        raise SettingsError(
            f"data.add_special_tokens: {name} has a special tokens template that does not contain the text exactly once; "
            "set it to false to use no template"
        )
    middle = ids.index(PLACEHOLDER)
    return ids[:middle], ids[middle + 1 :]


def _is_from_tokenizers(error: BaseException) -> bool:
    """Return whether `tokenizers` can have raised the error: an Exception, or a Rust panic, which is not an Exception."""
    is_panic = type(error).__name__ == "PanicException"
    return is_panic or (isinstance(error, Exception) and not isinstance(error, MemoryError))


def _load_error(spec: str | os.PathLike[str], path: Path, error: BaseException) -> str:
    if os.path.isfile(path):  # noqa: PTH113
        hint = _other_format(path)
        if "did not match any variant" in str(error):  # of the models, normalizers, … that the package has
            hint = f"; if it is one, a newer version of the package tokenizers than {tokenizers.__version__} has written it"
        return f"tokenizer {path}: not a tokenizer.json ({error}){hint}"
    return (
        f"tokenizer {spec}: no such file or folder, and no Hugging Face model of that name could be fetched ({error}); "
        "set it to a tokenizer.json; a new run can also train one on its text (`auto`)"
    )


def _other_format(path: Path) -> str:
    """Return what to do if `path`, or beside a `tokenizer.json` another file, is a tokenizer in another format."""
    names = sorted(OTHER_FORMATS) if path.name == TOKENIZER_FILE else [path.name]
    found = [name for name in names if name in OTHER_FORMATS and (path.parent / name).is_file()]
    if not found:
        return ""
    return (
        f"; {' and '.join(found)} {'is' if len(found) == 1 else 'are'} in another format. Of a model's folder, "
        "`transformers` makes a tokenizer.json: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )


def _unknown_token(inner: tokenizers.Tokenizer, name: str, token: str) -> str:
    special = _special_tokens(inner)
    others = [entry for entry in inner.get_vocab(with_added_tokens=True) if len(entry) > 2 and not entry[0].isalnum()]
    close = difflib.get_close_matches(token, special) or difflib.get_close_matches(token, others) or special[:12]
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return f"data.end_of_document: {token!r} is not in the vocabulary of {name}{hint}"


def _special_tokens(inner: tokenizers.Tokenizer) -> list[str]:
    return [str(token.content) for token in inner.get_added_tokens_decoder().values() if token.special]
