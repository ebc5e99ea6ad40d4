"""Loss masks from character ranges to the token cache: each token keeps its flag, and plain text is stored as before."""

from __future__ import annotations

import itertools
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, processors

from savant_ray.data import tokenizer as module
from savant_ray.data.cache_builder import refuse_if_all_masked
from savant_ray.data.documents import Document
from savant_ray.data.packing import pack
from savant_ray.data.shard_writer import shard_name
from savant_ray.data.stream import StepStream, StreamPlan
from savant_ray.data.token_cache import Manifest
from savant_ray.data.tokenizer import MaskedDocument, Tokenizer, text_pieces, train_tokenizer
from savant_ray.errors import DataError
from savant_ray.model.loss import IGNORED, next_token_targets
from tests.data.albert_like import CLS, FOLDER, SEP
from tests.data.without_ray import cache_of

TEXT = "Question: 2 + 2 = ?\nAnswer: 4, naïve 漢字 😀."
Ranges = tuple[tuple[int, int], ...]


def byte_fallback() -> tokenizers.Tokenizer:
    """Return a BPE as Llama's: a prepended space, and characters outside the vocabulary as bytes."""
    vocabulary = {"<unk>": 0, "</s>": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    vocabulary |= {piece: 258 + n for n, piece in enumerate(["▁", *"Answer:2", "▁A", "▁An", "er"])}
    merges = [("▁", "A"), ("▁A", "n"), ("e", "r")]
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return inner


def trimmed() -> tokenizers.Tokenizer:
    """Return a byte-level BPE whose post-processor excludes spaces from offsets, as GPT-2's does."""
    inner = tokenizers.Tokenizer.from_str(train_tokenizer(iter([TEXT, "Question: Answer"] * 20), 320).to_json())
    inner.post_processor = processors.ByteLevel(trim_offsets=True)
    return inner


def word_level() -> tokenizers.Tokenizer:
    """Return a tokenizer by words with two tokens around each text."""
    words = ["<unk>", "[CLS]", "<s>", "[SEP]", "</s>", "Question", "Answer", "2", "4", "+", ":"]
    ids = {word: number for number, word in enumerate(words)}
    inner = tokenizers.Tokenizer(models.WordLevel(ids, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(words[:5])
    special = [(name, ids[name]) for name in ("[CLS]", "<s>", "[SEP]", "</s>")]
    inner.post_processor = processors.TemplateProcessing(single="[CLS] <s> $A [SEP] </s>", special_tokens=special)
    return inner


MAKERS = {
    "bytes": lambda: train_tokenizer(iter(()), 258),
    "byte-level BPE": lambda: train_tokenizer(iter([TEXT, "Question: Answer"] * 20), 320),
    "trimmed offsets": lambda: Tokenizer(trimmed()),
    "byte fallback": lambda: Tokenizer(byte_fallback()),
    "ALBERT": lambda: Tokenizer.load(FOLDER),
    "words": lambda: Tokenizer(word_level()),
}
EACH = pytest.mark.parametrize("kind", MAKERS)


@cache
def made(kind: str) -> Tokenizer:
    return MAKERS[kind]()


def encode(kind: str, text: str, ranges: Ranges | None) -> MaskedDocument:
    (document,) = made(kind).encode_masked_documents([text], [ranges])
    return document


def trained_part(tokenizer: Tokenizer, document: MaskedDocument) -> list[str]:
    return [text for text, is_trained in text_pieces(tokenizer, document) if is_trained]


@st.composite
def masked_texts(draw: st.DrawFn) -> tuple[str, Ranges]:
    """Return a text with disjoint character ranges of it."""
    text = draw(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" aé漢\n"), min_size=1, max_size=40))
    ends = sorted(draw(st.sets(st.integers(0, len(text)), max_size=6)))
    return text, tuple(zip(ends[::2], ends[1::2], strict=False))


@settings(deadline=None)
@given(masked_texts())
def test_with_a_token_per_byte_the_bytes_of_the_trained_characters_are_trained(example: tuple[str, Ranges]) -> None:
    text, ranges = example
    characters = np.zeros(len(text), dtype=bool)
    for start, stop in ranges:
        characters[start:stop] = True
    expected = np.repeat(characters, [len(character.encode()) for character in text]).tolist()
    reaches_end = any(stop == len(text) for _, stop in ranges)
    assert encode("bytes", text, ranges).is_trained.tolist() == [*expected, reaches_end]


@EACH
@settings(deadline=None)
@given(example=masked_texts())
def test_a_mask_changes_no_token_and_ranges_add_up(kind: str, example: tuple[str, Ranges]) -> None:
    text, ranges = example
    tokenizer = made(kind)
    together = encode(kind, text, ranges)
    assert [together.ids] == tokenizer.encode_documents([text])
    assert len(together.is_trained) == len(together.ids)
    separate = [encode(kind, text, (one,)).is_trained for one in ranges]
    assert np.array_equal(together.is_trained, np.logical_or.reduce([np.zeros(len(together.ids), bool), *separate]))


@EACH
def test_a_mask_of_the_complete_text_leaves_out_the_prefix_only_and_an_empty_one_all_tokens(kind: str) -> None:
    prefix = len(made(kind).prefix)
    complete = encode(kind, TEXT, ((0, len(TEXT)),))
    assert complete.is_trained.tolist() == [False] * prefix + [True] * (len(complete.ids) - prefix)
    assert encode(kind, TEXT, None).is_trained.all()
    assert not encode(kind, TEXT, ()).is_trained.any()


@EACH
def test_the_end_of_a_document_is_trained_on_if_the_end_of_the_text_is(kind: str) -> None:
    tokenizer, n = made(kind), len(made(kind).suffix)
    start = TEXT.index("Answer")
    assert encode(kind, TEXT, ((start, len(TEXT)),)).is_trained[-n:].all()
    inner = encode(kind, TEXT, ((0, 8), (start, len(TEXT) - 1))).is_trained
    assert not inner[-n:].any() and not inner[: len(tokenizer.prefix)].any()
    if kind == "ALBERT":
        assert encode(kind, TEXT, ((start, len(TEXT)),)).ids[0] == CLS
        assert encode(kind, TEXT, ((start, len(TEXT)),)).ids[-1] == SEP


@pytest.mark.parametrize("kind", ["words", "trimmed offsets", "ALBERT"])
def test_names_of_special_tokens_in_a_text_are_text_with_a_mask_as_well(kind: str) -> None:
    text = "Question [SEP] <|end_of_document|>[CLS]"
    assert [encode(kind, text, ((0, 8),)).ids] == made(kind).encode_documents([text])


@pytest.mark.parametrize("kind", ["byte-level BPE", "trimmed offsets", "byte fallback"])
def test_a_token_is_trained_on_if_one_of_its_characters_is_and_a_space_belongs_to_its_token(kind: str) -> None:
    text = "Question: Answer"
    space = text.index(" A")
    only_space, with_word = (encode(kind, text, (pair,)) for pair in ((space, space + 1), (space, space + 2)))
    assert only_space.is_trained.any()
    assert np.array_equal(only_space.is_trained, with_word.is_trained)


def test_long_texts_that_are_encoded_in_segments_have_the_same_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join([TEXT.replace("\n", " ")] * 20)
    ranges = ((3, 77), (100, 333), (700, len(text)))
    whole = encode("bytes", text, ranges)
    monkeypatch.setattr(module, "SEGMENT_CHARACTERS", 100)
    in_segments = encode("bytes", text, ranges)
    assert in_segments.ids == whole.ids and np.array_equal(in_segments.is_trained, whole.is_trained)


@EACH
@settings(deadline=None, max_examples=50)
@given(example=masked_texts())
def test_text_pieces_show_the_text_and_what_is_trained_on(kind: str, example: tuple[str, Ranges]) -> None:
    text, ranges = example
    tokenizer, document = made(kind), encode(kind, text, ranges)
    pieces = text_pieces(tokenizer, document)
    assert all(first[1] != second[1] for first, second in itertools.pairwise(pieces)), "they alternate"
    assert all(piece for piece, _ in pieces)
    if kind == "bytes":
        assert "".join(piece for piece, _ in pieces) == text + "<|end_of_document|>"
        shown = "".join(text[start:stop] for start, stop in ranges) + "<|end_of_document|>" * int(
            document.is_trained[-1]
        )
        assert "".join(trained_part(tokenizer, document)) == shown


def test_text_pieces_of_a_conversation() -> None:
    start = TEXT.index(" 4")
    assert text_pieces(made("byte-level BPE"), encode("byte-level BPE", TEXT, ((start, len(TEXT)),))) == [
        (TEXT[:start], False),
        (TEXT[start:] + "<|end_of_document|>", True),
    ]
    assert text_pieces(made("ALBERT"), encode("ALBERT", "a hen on a mat", ((2, 5),))) == [
        ("[CLS]a ", False),
        ("hen", True),
        (" on a mat[SEP]", False),
    ]


masked_documents = st.lists(masked_texts() | masked_texts().map(lambda example: (example[0], None)), min_size=1)


@settings(deadline=None, max_examples=60)
@given(masked_documents, st.sampled_from([8, 9, 32]))
def test_a_token_cache_gives_back_the_mask_of_each_token_also_of_cut_documents(
    examples: list[tuple[str, Ranges | None]], sequence_length: int
) -> None:
    documents = [Document(number, text, "", ranges) for number, (text, ranges) in enumerate(examples, start=1)]
    with tempfile.TemporaryDirectory() as folder:
        cached = cache_of(documents, made("bytes"), sequence_length, Path(folder))
        sequences = cached.take(np.arange(cached.n_sequences))
    encoded = made("bytes").encode_masked_documents(*zip(*examples, strict=True))
    packing = pack([len(document.ids) for document in encoded], sequence_length)
    row, column = 0, 0
    for piece, (document, start, length) in enumerate(
        zip(packing.documents, packing.starts, packing.lengths, strict=True)
    ):
        if piece == packing.row_ends[row]:
            assert sequences.is_trained[row, column:].all() and (sequences.document_ids[row, column:] == -1).all()
            row, column = row + 1, 0
        part = slice(column, column + length)
        assert sequences.tokens[row, part].tolist() == encoded[document].ids[start : start + length]
        assert np.array_equal(sequences.is_trained[row, part], encoded[document].is_trained[start : start + length])
        column += length
    targets = next_token_targets(
        *map(torch.from_numpy, (sequences.tokens, sequences.document_ids, sequences.is_trained))
    )
    assert cached.manifest.target_tokens == (targets != IGNORED).sum()
    parts = [[text] if ranges is None else [text[a:b] for a, b in ranges] for text, ranges in examples]
    assert cached.manifest.trained_bytes == len("".join(sum(parts, [])).encode())
    assert cached.manifest.text_bytes == len("".join(text for text, _ in examples).encode())


def test_documents_that_are_trained_on_completely_are_stored_as_plain_text(tmp_path: Path) -> None:
    shards = []
    for name, ranges in (("plain", None), ("complete", ((0, len(TEXT)),)), ("masked", ((0, 5),))):
        documents = [Document(number, TEXT, "", ranges) for number in range(1, 30)]
        cached = cache_of(documents, made("bytes"), 64, tmp_path / name)
        shards.append((cached.folder / shard_name(0)).read_bytes())
    assert shards[0] == shards[1] != shards[2]
    assert len(shards[2]) < 1.1 * len(shards[0]), "a bit per token of 16 bits"


def test_files_without_a_token_to_train_on_are_refused_by_name(tmp_path: Path) -> None:
    def manifest(name: str, *ranges: Ranges | None) -> Manifest:
        documents = [Document(number, TEXT, "", each) for number, each in enumerate(ranges, start=1)]
        return cache_of(documents, made("bytes"), 128, tmp_path / name).manifest

    with pytest.raises(DataError, match=r"^made\.jsonl: none of the 2 documents has a token that is trained on"):
        refuse_if_all_masked(manifest("nothing", (), ((0, 1),)))  # the first token of a row is not predicted
    refuse_if_all_masked(manifest("some", (), ((5, 6),)))
    refuse_if_all_masked(manifest("plain", None))


def test_a_rank_reads_the_mask_of_its_sequences_from_all_sources(tmp_path: Path) -> None:
    masked = [Document(number, f"{number:07d}", "", ((3, 5),)) for number in range(1, 9)]
    plain = [Document(number, f"{number:07d}") for number in range(1, 9)]
    folders = tuple(
        str(cache_of(documents, made("bytes"), 8, tmp_path / name).folder)
        for name, documents in (("masked", masked), ("plain", plain))
    )
    local = StepStream(StreamPlan(folders, (0.5, 0.5), 3, 12), 1, 2).read_step(24)
    sources, _ = StreamPlan(folders, (0.5, 0.5), 3, 12).locate(local.positions)
    assert {0, 1} == set(sources.tolist())
    expected = np.where(sources[:, None] == 0, [[False] * 3 + [True] * 2 + [False] * 3], True)
    assert np.array_equal(local.sequences.is_trained, expected)
