"""Tokenizers: encoding and decoding without loss, special tokens, training, loading and errors."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from savant_ray.data import tokenizer as module
from savant_ray.data.tokenizer import IncrementalDecoder, Tokenizer, train_tokenizer
from savant_ray.errors import DataError, SettingsError
from tests.data.albert_like import FOLDER

TEXTS = ["If X = 15 and Y = 10, what is X + Y?\n", "déjà vu 漢字 🎉\n\n", "def f(x):\n    return x  # 42\n"] * 20


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer(iter(TEXTS), vocab_size=400)


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_is_encoded_and_decoded_without_loss(trained: Tokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    decoder = IncrementalDecoder(trained)
    assert "".join(map(decoder.push, ids)) + decoder.finish() == text


def test_special_tokens_of_a_trained_tokenizer_have_fixed_ids_and_no_text(trained: Tokenizer) -> None:
    assert trained.encode("") == []
    assert trained.end_of_document == 1
    assert trained.never_sampled == {0}
    assert trained.vocab_size <= 400
    assert trained.decode([0, *trained.encode("x"), 1]) == "x"


def test_the_name_of_a_special_token_in_a_text_is_encoded_as_text(trained: Tokenizer) -> None:
    text = "<|end_of_document|><|pad|>"
    for tokenizer in (trained, Tokenizer.from_json(trained.to_json())):
        ids = tokenizer.encode(text)
        assert not {0, 1} & set(ids)
        assert tokenizer.decode(ids) == text


def test_every_digit_is_a_token_and_a_space_belongs_to_the_first_digit(trained: Tokenizer) -> None:
    assert len(trained.encode("1510421")) == 7
    assert trained.encode(" 15") == trained.encode(" 1") + trained.encode("5")
    assert len(trained.encode(" 15")) == 2 or len(trained.encode(" 1")) == 2  # a small vocabulary may lack " 1"


def test_a_batch_is_encoded_like_its_single_texts(trained: Tokenizer) -> None:
    assert trained.encode_batch(TEXTS) == [trained.encode(text) for text in TEXTS]


def test_a_text_encoded_in_parts_has_the_same_ids(trained: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(TEXTS)
    whole = trained.encode(text)
    monkeypatch.setattr(module, "SEGMENT_CHARACTERS", 100)
    assert trained.encode(text) == whole


def test_incremental_decoding_returns_complete_characters_only(trained: Tokenizer) -> None:
    decoder = IncrementalDecoder(trained)
    pieces = [decoder.push(token) for token in trained.encode("🎈ß")]
    assert [text for text in pieces if text] == ["🎈", "ß"]


@pytest.mark.parametrize("text", ["жжжжжжжж", "ж or жжжжжж", "字字字字字字", "😀😀😀😀😀😀", "😀ж字😀ж字😀"])
def test_incremental_decoding_returns_characters_whose_bytes_are_in_tokens_of_two_characters(text: str) -> None:
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ((symbols, _),) = pre_tokenizer.pre_tokenize_str(text)
    ends = itertools.accumulate(len(character.encode()) for character in text)
    merges = {(symbols[end - 1], symbols[end]) for end in ends if end < len(symbols)}  # a last byte and a first one
    vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *sorted(map("".join, merges)), "</s>"]
    inner = tokenizers.Tokenizer(models.BPE(dict(zip(vocabulary, itertools.count())), sorted(merges)))
    inner.pre_tokenizer, inner.decoder = pre_tokenizer, decoders.ByteLevel()
    inner.add_special_tokens(["</s>"])
    tokenizer = Tokenizer(inner)
    ids = tokenizer.encode(text)
    for special in ([], [tokenizer.end_of_document] * 3):  # special tokens have no text
        decoder = IncrementalDecoder(tokenizer)
        assert "".join(map(decoder.push, [*special, *ids])) + decoder.finish() == text


def test_incremental_decoding_returns_invalid_bytes_as_replacement_characters(trained: Tokenizer) -> None:
    continuation = trained.encode("🎈")[-1]
    decoder = IncrementalDecoder(trained)
    assert "".join(decoder.push(continuation) for _ in range(8)) == "\ufffd" * 8


def test_a_saved_and_loaded_tokenizer_is_the_same(trained: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(trained.to_json(), encoding="utf-8")
    loaded = [Tokenizer.load(tmp_path), Tokenizer.load(tmp_path / "tokenizer.json")]
    for tokenizer in (*loaded, Tokenizer.from_json(trained.to_json())):
        assert tokenizer.fingerprint == trained.fingerprint
        assert tokenizer.encode(TEXTS[1]) == trained.encode(TEXTS[1])
    assert train_tokenizer(iter(TEXTS), 300).fingerprint != trained.fingerprint


def test_the_fingerprint_does_not_depend_on_the_layout_of_the_file(trained: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(trained.to_json()), indent=7, sort_keys=True))
    assert Tokenizer.load(path).fingerprint == trained.fingerprint


@pytest.mark.parametrize("end", ["</s>", "[SEP]", "<|endoftext|>", "<eos>"])
def test_common_special_tokens_of_other_tokenizers_are_detected(end: str) -> None:
    vocabulary = {"<pad>": 0, "<unk>": 1, "[CLS]": 2, end: 3, "[MASK]": 4, "a": 7}
    tokenizer = Tokenizer(tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")))
    assert tokenizer.end_of_document == 3
    assert tokenizer.vocab_size == 8
    assert tokenizer.never_sampled == {0, 1, 2, 4, 5, 6}  # 5 and 6 are nobody's


def test_a_special_token_ends_documents_rather_than_a_tag_of_html_that_is_named_like_one() -> None:
    like_gemma = word_level("<unk>", "</s>", "a", special="<eos>")
    assert like_gemma.end_of_document == 3
    assert like_gemma.with_settings("<eos>").fingerprint == like_gemma.fingerprint
    assert like_gemma.with_settings("</s>").fingerprint != like_gemma.fingerprint


def test_padding_and_truncation_of_a_loaded_tokenizer_are_disabled(trained: Tokenizer) -> None:
    inner = tokenizers.Tokenizer.from_str(trained.to_json())
    inner.enable_truncation(3)
    inner.enable_padding(length=64)
    assert Tokenizer(inner).encode(TEXTS[0]) == trained.encode(TEXTS[0])


def word_level(*tokens: str, special: str = "") -> Tokenizer:
    inner = tokenizers.Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
    if special:
        inner.add_special_tokens([special])
    return Tokenizer(inner, "the tokenizer words.json")


def test_a_tokenizer_without_end_of_document_token_is_refused_with_the_setting_to_change() -> None:
    with pytest.raises(DataError) as refused:
        word_level("a", special="<|fin|>").end_of_document  # noqa: B018
    assert "words.json has no end-of-document token" in str(refused.value)
    assert "set data.end_of_document" in str(refused.value) and "<|fin|>" in str(refused.value)


def test_a_token_of_any_name_can_be_the_end_of_document() -> None:
    tokenizer = word_level("a", "</s>", special="<|fin|>").with_settings("<|fin|>")
    assert tokenizer.end_of_document == 2
    assert Tokenizer.from_json(tokenizer.to_json(), "copy", tokenizer.end_name).end_of_document == 2
    with pytest.raises(SettingsError, match=r"data\.end_of_document: '<\|fim\|>' is not .*; did you mean <\|fin\|>\?"):
        tokenizer.with_settings("<|fim|>")


def test_a_padding_token_that_ends_documents_can_be_generated() -> None:
    tokenizer = word_level("a", "<pad>", "</s>")
    assert tokenizer.never_sampled == {1}
    assert tokenizer.with_settings("<pad>").never_sampled == set()


def test_an_end_of_document_that_would_not_be_detected_is_part_of_the_fingerprint() -> None:
    tokenizer = word_level("a", "</s>", special="<|fin|>")
    assert tokenizer.with_settings("</s>").fingerprint == tokenizer.fingerprint
    assert tokenizer.with_settings("<|fin|>").fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize(
    "model",
    [
        models.Unigram([("</s>", 0.0), ("a", -1.0)]),
        models.WordLevel({"a": 0, "</s>": 1}),
        models.WordPiece({"a": 0, "</s>": 1}),
        models.BPE({"a": 0, "</s>": 1}, [], unk_token="<unk>"),
    ],
    ids=lambda model: type(model).__name__,
)
def test_a_text_that_cannot_be_encoded_is_refused_with_advice(model: models.Model) -> None:
    tokenizer = Tokenizer(tokenizers.Tokenizer(model), "the tokenizer mine.json")
    with pytest.raises(DataError, match=r"mine\.json cannot encode the text \(.*\); set data\.tokenizer to one with"):
        tokenizer.encode_batch(["a", "b"])


def bpe(vocabulary: Iterable[str], byte_level: bool = False, **options: str) -> Tokenizer:
    inner = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, [], **options))
    if byte_level:
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
    return Tokenizer(inner)


@pytest.mark.parametrize(
    ("tokenizer", "dropped"),
    [
        (bpe("abc"), (3, "é漢")),
        (bpe("abcé漢"), (0, "")),
        (bpe(["<unk>", *"abc"], unk_token="<unk>"), (0, "")),
        (bpe(["a</w>", "b</w>", "b", "é</w>", "漢"], end_of_word_suffix="</w>"), (0, "")),
        (bpe(["a</w>", "b</w>", "b"], end_of_word_suffix="</w>"), (3, "é漢")),
        (bpe(pre_tokenizers.ByteLevel.alphabet(), byte_level=True), (0, "")),
        (bpe(["a", "b", "Ã"], byte_level=True), (3, "é漢")),
    ],
    ids=["ASCII", "all", "unknown token", "suffix", "suffix, ASCII", "byte-level", "byte-level without some bytes"],
)
def test_characters_without_a_token_are_counted(tokenizer: Tokenizer, dropped: tuple[int, str]) -> None:
    assert tokenizer.dropped_characters("aé b é 漢") == dropped


def test_ids_with_the_same_token_in_both_tokenizers_are_counted() -> None:
    assert word_level("a", "b", "c").count_same_ids(word_level("a", "c", "b", "d")) == (1, 3)
    assert word_level("a", "b", "c").count_same_ids(word_level("a", "b", "c", "d")) == (3, 3)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"\xff\xfe{",
        b"[]",
        b'{"version": "1.0"',
        json.dumps({"model": {"type": "Future", "vocab": {}}}).encode(),
        json.dumps(
            {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
        ).encode(),
        json.dumps({"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"}}).encode(),
    ],
)
def test_a_file_that_is_not_a_tokenizer_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer .*tokenizer\.json: (not a tokenizer\.json|it has no vocabulary)"):
        Tokenizer.load(path)


def test_a_missing_tokenizer_is_reported(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    for spec, reason in [
        (tmp_path, "not a tokenizer.json"),
        (tmp_path / "gone.json", "no such tokenizer.json"),
        (tmp_path / "gone/vocab.json", "no such tokenizer.json, nor a folder that contains one$"),
        (
            "nobody/has-such-a-model",
            "no Hugging Face model of that name could be fetched .*; a new run can also train one",
        ),
    ]:
        with pytest.raises(DataError, match=reason):
            Tokenizer.load(spec)


@pytest.mark.parametrize("names", [["tokenizer.model"], ["vocab.json", "merges.txt"]])
def test_a_tokenizer_in_another_format_is_refused_with_the_conversion(names: list[str], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_text("{}")
    advice = rf"{' and '.join(sorted(names))} (is|are) in another format\. .*save_pretrained"
    with pytest.raises(DataError, match=advice):
        Tokenizer.load(tmp_path)
    with pytest.raises(DataError, match=rf"not a tokenizer\.json \(.*\); {names[0]} is in another format"):
        Tokenizer.load(tmp_path / names[0])


def test_a_tokenizer_of_a_newer_version_is_refused_as_one(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "Future", "vocab": {}}}))
    with pytest.raises(DataError, match=r"a newer version of the package tokenizers than \d+\."):
        Tokenizer.load(tmp_path)


METASPACE = Tokenizer.load(FOLDER)


@pytest.mark.parametrize("prompt", ["the red hen", "a", "the hen is <unk>", "the 🙂", "on "])
@pytest.mark.parametrize("continuation", [" is on", "er ran", "."])
def test_a_continuation_begins_with_a_space_if_and_only_if_it_begins_a_new_word(prompt: str, continuation: str) -> None:
    prompt_ids = METASPACE.encode(prompt)
    ids = METASPACE.encode(f"the{continuation}")[1:]
    decoder = IncrementalDecoder(METASPACE, prompt_ids)
    assert METASPACE.decode_continuation(prompt_ids, ids) == continuation
    assert "".join([*map(decoder.push, ids), decoder.finish()]) == continuation


@settings(max_examples=200, deadline=None)
@given(text=st.text(), continuation=st.text())
def test_a_byte_level_continuation_is_decoded_to_its_own_text(trained: Tokenizer, text: str, continuation: str) -> None:
    text, continuation = (part.encode(errors="ignore").decode() for part in (text, continuation))
    assert trained.decode_continuation(trained.encode(text), trained.encode(continuation)) == continuation


def test_byte_tokens_of_two_consecutive_characters_are_decoded_separately() -> None:
    """In Llama's tokenizer, a character without a token is encoded as one token per byte."""
    vocabulary = [("<unk>", 0.0), ("▁the", -1.0), ("▁", -2.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256))]
    inner = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = Tokenizer(inner)
    prompt, ids = tokenizer.encode("the 🙂"), tokenizer.encode("the🙃 the")[1:]
    assert tokenizer.decode_continuation(prompt, ids) == "🙃 the"
