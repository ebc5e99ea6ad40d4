"""Any text survives, special tokens cannot be typed, digits stand alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models

from savant_ray.data import tokenizer as module
from savant_ray.data.tokenizer import IncrementalDecoder, Tokenizer, train_tokenizer
from savant_ray.errors import DataError

TEXTS = ["If X = 15 and Y = 10, what is X + Y?\n", "déjà vu 漢字 🎉\n\n", "def f(x):\n    return x  # 42\n"] * 20


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer(iter(TEXTS), vocab_size=400)


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_survives(trained: Tokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    decoder = IncrementalDecoder(trained)
    assert "".join(map(decoder.push, ids)) + decoder.finish() == text


def test_special_tokens_are_where_they_belong(trained: Tokenizer) -> None:
    assert trained.encode("") == []
    assert trained.end_of_document == 1
    assert trained.never_sampled == {0}
    assert trained.vocab_size <= 400
    assert trained.decode([0, *trained.encode("x"), 1]) == "x"


def test_a_special_token_in_a_text_is_text(trained: Tokenizer) -> None:
    text = "<|end_of_document|><|pad|>"
    for tokenizer in (trained, Tokenizer.from_json(trained.to_json())):
        ids = tokenizer.encode(text)
        assert not {0, 1} & set(ids)
        assert tokenizer.decode(ids) == text


def test_every_digit_is_a_token_the_first_of_a_number_with_its_space(trained: Tokenizer) -> None:
    assert len(trained.encode("1510421")) == 7
    assert trained.encode(" 15") == trained.encode(" 1") + trained.encode("5")
    assert len(trained.encode(" 15")) == 2 or len(trained.encode(" 1")) == 2  # a small vocabulary may lack " 1"


def test_a_batch_is_encoded_like_its_texts(trained: Tokenizer) -> None:
    assert trained.encode_batch(TEXTS) == [trained.encode(text) for text in TEXTS]


def test_a_very_long_text_has_the_ids_of_the_whole(trained: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(TEXTS)
    whole = trained.encode(text)
    monkeypatch.setattr(module, "SEGMENT_CHARACTERS", 100)
    assert trained.encode(text) == whole


def test_half_a_character_is_never_said(trained: Tokenizer) -> None:
    decoder = IncrementalDecoder(trained)
    said = [decoder.push(token) for token in trained.encode("🎈ß")]
    assert [text for text in said if text] == ["🎈", "ß"]


def test_bytes_that_are_no_character_are_said_in_the_end(trained: Tokenizer) -> None:
    continuation = trained.encode("🎈")[-1]
    decoder = IncrementalDecoder(trained)
    assert "".join(decoder.push(continuation) for _ in range(8)) == "\ufffd" * 8


def test_it_is_the_same_after_a_journey(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path / "deep" / "tokenizer.json")
    loaded = [Tokenizer.load(tmp_path / "deep"), Tokenizer.load(tmp_path / "deep" / "tokenizer.json")]
    for tokenizer in (*loaded, Tokenizer.from_json(trained.to_json())):
        assert tokenizer.fingerprint == trained.fingerprint
        assert tokenizer.encode(TEXTS[1]) == trained.encode(TEXTS[1])
    assert train_tokenizer(iter(TEXTS), 300).fingerprint != trained.fingerprint


def test_the_fingerprint_does_not_depend_on_the_layout_of_the_file(trained: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(trained.to_json()), indent=7, sort_keys=True))
    assert Tokenizer.load(path).fingerprint == trained.fingerprint


@pytest.mark.parametrize("end", ["</s>", "[SEP]", "<|endoftext|>", "<eos>"])
def test_tokenizers_of_others_are_understood(end: str) -> None:
    vocabulary = {"<pad>": 0, "<unk>": 1, "[CLS]": 2, end: 3, "[MASK]": 4, "a": 7}
    tokenizer = Tokenizer(tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")))
    assert tokenizer.end_of_document == 3
    assert tokenizer.vocab_size == 8
    assert tokenizer.never_sampled == {0, 1, 2, 4, 5, 6}  # 5 and 6 are nobody's


def test_padding_and_truncation_of_a_loaded_file_are_switched_off(trained: Tokenizer) -> None:
    inner = tokenizers.Tokenizer.from_str(trained.to_json())
    inner.enable_truncation(3)
    inner.enable_padding(length=64)
    assert Tokenizer(inner).encode(TEXTS[0]) == trained.encode(TEXTS[0])


def test_a_tokenizer_without_an_end_is_refused() -> None:
    with pytest.raises(DataError, match="no end-of-document token"):
        Tokenizer(tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))).end_of_document  # noqa: B018


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    for spec, reason in [
        (tmp_path, "not a tokenizer.json"),
        (tmp_path / "gone.json", "no such tokenizer.json"),
        ("nobody/has-such-a-model", "no Hugging Face model of that name could be fetched"),
    ]:
        with pytest.raises(DataError, match=reason):
            Tokenizer.load(spec)
