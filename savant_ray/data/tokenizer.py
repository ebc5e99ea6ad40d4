"""Load, train and describe a tokenizer.

Wraps Hugging Face's `tokenizers`, so that the rest of the program sees numbers and text and never asks how a special
token is called.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from savant_ray.config import Config
from savant_ray.data.content import write_aside
from savant_ray.errors import DataError, SettingsError
from savant_ray.locations import local_path

PAD, END_OF_DOCUMENT = "<|pad|>", "<|end_of_document|>"
END_NAMES = (
    *(END_OF_DOCUMENT, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>"),
    *("<|end|>", "<|im_end|>", "[EOS]", "[SEP]"),
)
NEVER_SAMPLED_NAMES = (
    *(PAD, "<pad>", "[PAD]", "<|padding|>", "<unk>", "<|unk|>", "[UNK]", "<s>", "<bos>", "[BOS]", "[CLS]"),
    *("<|startoftext|>", "<|begin_of_text|>", "[MASK]", "<mask>"),
)
SEGMENT_CHARACTERS = 1 << 20
BETWEEN_WORDS = re.compile(r"(?<=\w)(?= \w)")
LONGEST_CHARACTER_BYTES = 4  # UTF-8
REPLACEMENT = "\ufffd"  # what a decoder makes of bytes that are no character
PLACEHOLDER = 2**32 - 1  # the largest id that a tokenizer can have, so no token of a template

Choice = bool | Literal["auto"]


class Tokenizer:
    """Text ↔ token ids; a literal "<|end_of_document|>" in a text is text, never the special token.

    A document is `prefix`, the ids of its text, and `suffix`, which ends with `end_of_document`. A prompt is `prefix` and
    the ids of its text. With `add_special_tokens` they are those of the template that the tokenizer's post-processor has
    for a single text, such as `[CLS] $A [SEP]`. A template that puts nothing behind the text, such as Llama's `<s> $A`,
    is followed by the end-of-document token.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        name: str = "the tokenizer",
        end_of_document: str | None = None,
        add_special_tokens: Choice = "auto",
    ) -> None:
        """Wrap a tokenizer of Hugging Face's.

        Args:
            inner: its padding and truncation are switched off.
            name: for messages.
            end_of_document: a token of the vocabulary, which takes the place of the template's last one; None: the
                template's last one, or else the one that has a usual name.
            add_special_tokens: whether to use the template; `auto`: if there is one.

        Raises:
            SettingsError: the vocabulary has no such token (names those that are spelt alike), or the tokenizer has no
                template where one is asked for, or one that is not a text between special tokens.
        """
        inner.encode_special_tokens = True  # not part of the JSON: has to be said on every load
        inner.no_padding()
        inner.no_truncation()
        self.name = name
        self.end_name = end_of_document
        self._inner = inner
        self._dropped: dict[str, bool] = {}  # character -> whether the vocabulary lacks it
        self.prefix, self._template_suffix = ((), ()) if add_special_tokens is False else _template(inner, name)
        self.adds_special_tokens = bool(self.prefix or self._template_suffix)
        if add_special_tokens is True and not self.adds_special_tokens:
            raise SettingsError(
                f"data.add_special_tokens: true, but {name} has no template that puts special tokens around a text; "
                "leave it at auto"
            )
        if end_of_document is not None and inner.token_to_id(end_of_document) is None:
            raise SettingsError(_why_no_end(inner, name, end_of_document))

    @classmethod
    def load(
        cls,
        spec: str | os.PathLike[str],
        end_of_document: str | None = None,
        add_special_tokens: Choice = "auto",
    ) -> Tokenizer:
        """Load a tokenizer.json, a folder that holds one, or a Hugging Face name such as `albert-base-v2`.

        Raises:
            DataError: there is none, or it cannot be read, or it has no vocabulary.
            SettingsError: the vocabulary lacks `end_of_document`, or the tokenizer has no template that can be used.
        """
        path = local_path(str(spec), "tokenizer", DataError)
        path = path / "tokenizer.json" if os.path.isdir(path) else path  # noqa: PTH112 - Path.is_dir raises for a name too long
        try:
            if os.path.isfile(path):  # noqa: PTH113
                inner = tokenizers.Tokenizer.from_file(str(path))
            elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(spec)) or path.suffix == ".json":
                raise DataError(f"tokenizer {spec}: no such tokenizer.json or folder that holds one")
            else:
                inner = tokenizers.Tokenizer.from_pretrained(str(spec))
        except DataError:
            raise
        except BaseException as error:
            if not _is_from_tokenizers(error):
                raise
            raise DataError(_why_not_loaded(spec, path, error)) from error
        if not inner.get_vocab_size(with_added_tokens=False):
            raise DataError(f"tokenizer {spec}: it has no vocabulary, so it cannot encode any text")
        return cls(inner, f"the tokenizer {spec}", end_of_document, add_special_tokens)

    @classmethod
    def from_json(
        cls,
        text: str,
        name: str = "the tokenizer",
        end_of_document: str | None = None,
        add_special_tokens: Choice = "auto",
    ) -> Tokenizer:
        """The inverse of `to_json`, which holds none of the other arguments."""
        return cls(tokenizers.Tokenizer.from_str(text), name, end_of_document, add_special_tokens)

    def with_settings(self, end_of_document: str | None = None, add_special_tokens: Choice = "auto") -> Tokenizer:
        """Return the same tokenizer under other settings; None and `auto` keep what it has.

        Raises:
            SettingsError: the vocabulary has no such token, or the tokenizer has no template.
        """
        end = self.end_name if end_of_document is None else end_of_document
        adds = self.adds_special_tokens if add_special_tokens == "auto" else add_special_tokens
        return Tokenizer(self._inner, self.name, end, adds)

    def to_json(self) -> str:
        """Everything about the tokenizer as one string, to travel to workers and into checkpoints."""
        return self._inner.to_str()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a `tokenizer.json`; a reader never sees half of it."""
        write_aside(Path(path), self.to_json())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the canonical JSON: the same for the same tokenizer, however its file is laid out.

        Whether a template is used is part of it, and an end-of-document token that is not the one without a setting.
        """
        canonical = json.dumps(json.loads(self.to_json()), sort_keys=True, separators=(",", ":"))
        if self.adds_special_tokens:
            canonical += " with special tokens"
        if self.end_name is not None and self._ids_of([self.end_name]) != self._default_ends[:1]:
            canonical += f" end of document: {self.end_name}"
        return hashlib.sha256(canonical.encode()).hexdigest()

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id: what a model's vocabulary has to hold."""
        ids = self._inner.get_vocab(with_added_tokens=True).values()
        return max([*ids, *self.prefix, *self._template_suffix], default=-1) + 1

    @cached_property
    def end_of_document(self) -> int:
        """The id that ends each document.

        Raises:
            DataError: none was named, the template has none, and the vocabulary has none of the usual names.
        """
        ids = self._default_ends if self.end_name is None else self._ids_of([self.end_name])
        if not ids:
            special = ", ".join(_special_tokens(self._inner)[:12])
            raise DataError(
                f"{self.name} has no end-of-document token by a usual name ({', '.join(END_NAMES)}); set "
                "data.end_of_document to the token that ends documents"
                + f" (special tokens: {special})"
                * bool(special)
            )
        return ids[0]

    @cached_property
    def suffix(self) -> tuple[int, ...]:
        """The ids behind the text of a document; the last one is `end_of_document`.

        Raises:
            DataError: the tokenizer has no end-of-document token.
        """
        template, end = self._template_suffix, self.end_of_document
        if template[-1:] == (end,):
            return template
        kept = template[: template.index(end)] if end in template else template[:-1]
        return (*kept, end)

    def same_ids(self, other: Tokenizer) -> tuple[int, int]:
        """Return how many of this tokenizer's ids mean the same token in `other`, and how many there are."""
        mine, others = (each._inner.get_vocab(with_added_tokens=True) for each in (self, other))
        return sum(others.get(token) == number for token, number in mine.items()), len(mine)

    @cached_property
    def never_sampled(self) -> frozenset[int]:
        """Padding, unknown, begin and mask tokens, and the template's before a text: no text comes from them."""
        unused = set(range(self.vocab_size)) - set(self._inner.get_vocab(with_added_tokens=True).values())
        end = self._ids_of([] if self.end_name is None else [self.end_name])  # may be a padding token
        never = {*self._ids_of(NEVER_SAMPLED_NAMES), *self.prefix, *unused}
        return frozenset(never.difference(self._template_suffix, end))

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text as a document: `prefix`, text, `suffix`.

        Raises:
            DataError: as `encode_batch`, or the tokenizer has no end-of-document token.
        """
        return [[*self.prefix, *ids, *self.suffix] for ids in self.encode_batch(texts)]

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text as the beginning of a document: `prefix`, text; none for a text without tokens.

        Raises:
            DataError: as `encode_batch`.
        """
        return [[*self.prefix, *ids] if ids else [] for ids in self.encode_batch(texts)]

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens around them.

        Raises:
            DataError: the tokenizer has neither tokens nor an unknown token for it.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text; on all cores unless TOKENIZERS_PARALLELISM is `false`.

        Raises:
            DataError: the tokenizer has neither tokens nor an unknown token for one of them.
        """
        if any(len(text) > SEGMENT_CHARACTERS for text in texts):
            return [self._encode_long(text) for text in texts]
        try:
            return [encoding.ids for encoding in self._inner.encode_batch_fast(texts, add_special_tokens=False)]
        except BaseException as error:
            if not _is_from_tokenizers(error):
                raise
            raise DataError(
                f"{self.name} cannot encode the text ({error}); give data.tokenizer one that has an unknown token or "
                "byte fallback, or leave it at auto to learn one from the text"
            ) from error

    def dropped_characters(self, text: str) -> tuple[int, str]:
        """Return how many characters of the text the tokenizer leaves out silently, and each of them once.

        Only a BPE without an unknown token does so. White space does not count, since many pre-tokenizers remove it.
        """
        if not self._can_drop:
            return 0, ""
        characters = set(text)
        for character in characters - self._dropped.keys():
            self._dropped[character] = self._is_dropped(character)
        missing = {character for character in characters if self._dropped[character]}
        return (sum(character in missing for character in text) if missing else 0), "".join(sorted(missing))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; special tokens and ids beyond the vocabulary have none."""
        return self._inner.decode(list(ids), skip_special_tokens=True)

    def _encode_long(self, text: str) -> list[int]:
        return [token for part in _segments(text) for token in self.encode_batch([part])[0]]

    @cached_property
    def _default_ends(self) -> list[int]:
        """What can end a document where the settings name no token, the preferred one first."""
        return list(self._template_suffix[-1:]) or self._ids_of(END_NAMES)

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
        """What the entries of a BPE begin with inside a word, and end with at its end."""
        model = json.loads(self.to_json())["model"]
        return model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""

    def _is_dropped(self, character: str) -> bool:
        if character.isspace() or character == REPLACEMENT:
            return False
        if ids := self.encode(character):
            return REPLACEMENT in self.decode(ids)  # the vocabulary has some of its bytes only
        prefix, suffix = self._affixes
        forms = {before + character + after for before in ("", prefix) for after in ("", suffix)}
        return not self._ids_of(forms)

    def _ids_of(self, names: Iterable[str]) -> list[int]:
        return [found for name in names if (found := self._inner.token_to_id(name)) is not None]


class IncrementalDecoder:
    """Text while it is generated: `push` returns what is complete, never half a character.

    `tokenizers.DecodeStream` holds back bytes that never become a character for ever; an untrained model makes many.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []  # already said; some decoders need them to know about a leading space
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """The text that `token` completes; "" while a character is unfinished."""
        self._held.append(token)
        text = self._new_text()
        if not text or (text.endswith("\ufffd") and len(self._held) < LONGEST_CHARACTER_BYTES):
            return ""
        self._before, self._held = self._held, []
        return text

    def finish(self) -> str:
        """What is still held back when generation ends."""
        return self._new_text()

    def _new_text(self) -> str:
        said = self._tokenizer.decode(self._before)
        return self._tokenizer.decode(self._before + self._held)[len(said) :]


def with_tokenizer_settings(config: Config, tokenizer: Tokenizer | None) -> Config:
    """Return the settings with the end-of-document token and the use of special tokens that were chosen.

    None stands for a tokenizer that is still to be learnt.
    """
    chosen: dict[str, object] = {"add_special_tokens": tokenizer is not None and tokenizer.adds_special_tokens}
    if tokenizer is not None:
        chosen["end_of_document"] = tokenizer.end_name
    return config.model_copy(update={"data": config.data.model_copy(update=chosen)})


def train_tokenizer(texts: Iterator[str], vocab_size: int = 32_000) -> Tokenizer:
    """A byte-level BPE learnt from `texts`: any text is encodable, and every digit is a token of its own.

    Digits are split one by one, because arithmetic is learnt that way; a space before a number belongs to its first digit.
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
    """A very long text in parts, as one encoding takes about a hundred times its text in memory.

    Cut in front of a space between words, where pre-tokenizers cut as well, so that the ids stay the same.
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
    """Return the ids that the post-processor puts before and behind a single text.

    Its kind does not matter: it is asked what it makes of a text whose only token is a placeholder.

    Raises:
        SettingsError: the text is not in it exactly once.
    """
    if inner.post_processor is None:
        return (), ()
    probe = tokenizers.Tokenizer(models.WordLevel({"x": PLACEHOLDER}))
    probe.post_processor = inner.post_processor
    ids = tuple(probe.encode("x", add_special_tokens=True).ids)
    if ids.count(PLACEHOLDER) != 1:
        raise SettingsError(
            f"data.add_special_tokens: {name} has a template for special tokens that does not hold the text exactly once; "
            "set it to false to do without"
        )
    middle = ids.index(PLACEHOLDER)
    return ids[:middle], ids[middle + 1 :]


def _is_from_tokenizers(error: BaseException) -> bool:
    """Whether `tokenizers` raised it: a bare Exception, or a Rust panic, which is no Exception."""
    is_panic = type(error).__name__ == "PanicException"
    return is_panic or (isinstance(error, Exception) and not isinstance(error, MemoryError))


def _why_not_loaded(spec: str | os.PathLike[str], path: Path, error: BaseException) -> str:
    if os.path.isfile(path):  # noqa: PTH113
        return f"tokenizer {path}: not a tokenizer.json ({error})"
    return (
        f"tokenizer {spec}: no such file or folder, and no Hugging Face model of that name could be fetched ({error}); "
        f"give a tokenizer.json, or `auto` to learn one from the training files"
    )


def _why_no_end(inner: tokenizers.Tokenizer, name: str, wanted: str) -> str:
    special = _special_tokens(inner)
    others = [token for token in inner.get_vocab(with_added_tokens=True) if len(token) > 2 and not token[0].isalnum()]
    close = difflib.get_close_matches(wanted, special) or difflib.get_close_matches(wanted, others) or special[:12]
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return f"data.end_of_document: {wanted!r} is not in the vocabulary of {name}{hint}"


def _special_tokens(inner: tokenizers.Tokenizer) -> list[str]:
    return [str(token.content) for token in inner.get_added_tokens_decoder().values() if token.special]
