"""Load, train and describe a tokenizer.

Wraps Hugging Face's `tokenizers`, so that the rest of the program sees numbers and text and never asks how a special
token is called.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from savant_ray.data.content import write_aside
from savant_ray.errors import DataError
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


class Tokenizer:
    """Text ↔ token ids; a literal "<|end_of_document|>" in a text is text, never the special token."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        inner.encode_special_tokens = True  # not part of the JSON: has to be said on every load
        inner.no_padding()
        inner.no_truncation()
        self._inner = inner

    @classmethod
    def load(cls, spec: str | os.PathLike[str]) -> Tokenizer:
        """From a tokenizer.json, a folder that holds one, or a Hugging Face name such as `albert-base-v2`.

        Raises:
            DataError: there is none, or it cannot be read.
        """
        path = local_path(str(spec), "tokenizer", DataError)
        path = path / "tokenizer.json" if os.path.isdir(path) else path  # noqa: PTH112 - Path.is_dir raises for a name too long
        try:
            if os.path.isfile(path):  # noqa: PTH113
                return cls(tokenizers.Tokenizer.from_file(str(path)))
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(spec)) or path.suffix == ".json":
                raise DataError(f"tokenizer {spec}: no such tokenizer.json or folder that holds one")
            return cls(tokenizers.Tokenizer.from_pretrained(str(spec)))
        except DataError:
            raise
        except Exception as error:  # `tokenizers` raises bare Exception for a broken file and a missing model alike
            raise DataError(_why_not_loaded(spec, path, error)) from error

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """The inverse of `to_json`."""
        return cls(tokenizers.Tokenizer.from_str(text))

    def to_json(self) -> str:
        """Everything about the tokenizer as one string, to travel to workers and into checkpoints."""
        return self._inner.to_str()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a `tokenizer.json`; a reader never sees half of it."""
        write_aside(Path(path), self.to_json())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the canonical JSON: the same for the same tokenizer, however its file is laid out."""
        canonical = json.dumps(json.loads(self.to_json()), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id: what a model's vocabulary has to hold."""
        return max(self._inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def end_of_document(self) -> int:
        """The id that ends each document.

        Raises:
            DataError: the tokenizer has no token for it.
        """
        ids = self._ids_of(END_NAMES)
        if not ids:
            raise DataError(f"the tokenizer has no end-of-document token (looked for {', '.join(END_NAMES)})")
        return ids[0]

    @cached_property
    def never_sampled(self) -> frozenset[int]:
        """Padding, unknown, begin and mask tokens: no text comes from them."""
        unused = set(range(self.vocab_size)) - set(self._inner.get_vocab(with_added_tokens=True).values())
        return frozenset(self._ids_of(NEVER_SAMPLED_NAMES)) | unused

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens around them."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text; on all cores unless TOKENIZERS_PARALLELISM is `false`."""
        if any(len(text) > SEGMENT_CHARACTERS for text in texts):
            return [self._encode_long(text) for text in texts]
        return [encoding.ids for encoding in self._inner.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; special tokens and ids beyond the vocabulary have none."""
        return self._inner.decode(list(ids), skip_special_tokens=True)

    def _encode_long(self, text: str) -> list[int]:
        return [token for part in _segments(text) for token in self.encode_batch([part])[0]]

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


def _why_not_loaded(spec: str | os.PathLike[str], path: Path, error: Exception) -> str:
    if os.path.isfile(path):  # noqa: PTH113
        return f"tokenizer {path}: not a tokenizer.json ({error})"
    return (
        f"tokenizer {spec}: no such file or folder, and no Hugging Face model of that name could be fetched ({error}); "
        f"give a tokenizer.json, or `train` to learn one from the training files"
    )
