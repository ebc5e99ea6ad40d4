"""Special tokens around a text: those of the tokenizer's template, and one end-of-document token per document."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from savant_ray.data import tokenizer as module
from savant_ray.data.tokenizer import Tokenizer, train_tokenizer
from savant_ray.errors import SettingsError
from tests.data.albert_like import CLS, FOLDER, SEP

TEXT = "a red hen, and a cat"
SPECIAL = ["<pad>", "<unk>", "[CLS]", "[SEP]", "<s>", "</s>", "<eos>"]
IDS = {token: number for number, token in enumerate(SPECIAL)}
S, END, EOS = IDS["<s>"], IDS["</s>"], IDS["<eos>"]


def template(single: str) -> processors.TemplateProcessing:
    special = [(token, IDS[token]) for token in IDS if token in single]
    return processors.TemplateProcessing(single=single, special_tokens=special)


KINDS: dict[str, Any] = {
    "Bert": processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS)),
    "template": template("[CLS] $A [SEP]"),
    "Roberta": processors.RobertaProcessing(("</s>", END), ("<s>", S)),
    "Llama": template("<s> $A"),
    "Llama 3": processors.Sequence([processors.ByteLevel(), template("<s> $A")]),
    "T5": template("$A </s>"),
    "two behind": template("$A <eos> [CLS]"),
    "GPT-2": processors.ByteLevel(trim_offsets=True),
    "none": None,
}
WITHOUT = ("GPT-2", "none")
OPEN_ENDED = ("Llama", "Llama 3", *WITHOUT)  # nothing behind the text


def made(post_processor: Any) -> tokenizers.Tokenizer:
    """Return a word-level tokenizer with this post-processor."""
    words = ["a", "red", "hen", ",", "and", "cat"]
    inner = tokenizers.Tokenizer(models.WordLevel(IDS | {w: len(IDS) + i for i, w in enumerate(words)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(SPECIAL)
    if post_processor is not None:
        inner.post_processor = post_processor
    return inner


def saved(kind: str, folder: Path) -> Path:
    path = folder / "tokenizer.json"
    made(KINDS[kind]).save(str(path))
    return path


def plain_fingerprint(tokenizer: Tokenizer) -> str:
    """Return the fingerprint that versions without `add_special_tokens` computed."""
    canonical = json.dumps(json.loads(tokenizer.to_json()), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def document(tokenizer: Tokenizer, text: str = TEXT) -> list[int]:
    (ids,) = tokenizer.encode_documents([text])
    return ids


def prompt(tokenizer: Tokenizer, text: str = TEXT) -> list[int]:
    (ids,) = tokenizer.encode_prompts([text])
    return ids


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_has_the_tokens_of_the_template_and_one_end_of_document(kind: str, tmp_path: Path) -> None:
    path = saved(kind, tmp_path)
    whole = tokenizers.Tokenizer.from_file(str(path)).encode(TEXT).ids
    ids = document(Tokenizer.load(path))
    assert ids == [*whole, *[END] * (kind in OPEN_ENDED)]
    assert ids.count(Tokenizer.load(path).end_of_document) == 1 and ids[-1] == Tokenizer.load(path).end_of_document


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_has_the_same_tokens_as_in_transformers(kind: str, tmp_path: Path) -> None:
    assert_as_transformers(saved(kind, tmp_path), [END] * (kind in OPEN_ENDED))


def test_a_tokenizer_like_alberts_gives_the_same_tokens_as_transformers() -> None:
    assert_as_transformers(FOLDER / "tokenizer.json", [])


def assert_as_transformers(path: Path, behind: Sequence[int]) -> None:
    transformers = pytest.importorskip("transformers")
    hf_tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    tokenizer = Tokenizer.load(path)
    for text in (TEXT, "", "Déjà vu\nis 12?", " two  spaces "):
        assert document(tokenizer, text) == [*hf_tokenizer(text).input_ids, *behind]


def test_alberts_template_is_detected() -> None:
    tokenizer = Tokenizer.load(FOLDER)
    assert (tokenizer.prefix, tokenizer.suffix) == ((CLS,), (SEP,))
    assert document(tokenizer) == [CLS, *tokenizer.encode(TEXT), SEP]
    assert tokenizer.decode(document(tokenizer)) == TEXT


def test_another_end_of_document_replaces_the_last_token_of_the_template() -> None:
    words = Tokenizer(made(KINDS["template"]))
    assert document(words.with_settings("<eos>")) == [CLS, *words.encode(TEXT), EOS]
    assert words.with_settings("<eos>").fingerprint != words.fingerprint
    assert document(words.with_settings("[SEP]")) == document(words)
    assert words.with_settings("[SEP]").fingerprint == words.fingerprint, "the same token, named"
    two_behind = Tokenizer(made(KINDS["two behind"]), end_of_document="<eos>")
    assert document(two_behind) == [*words.encode(TEXT), EOS], "not <eos> <eos>"


def test_without_special_tokens_documents_and_fingerprint_are_those_of_earlier_versions() -> None:
    for kind, post_processor in KINDS.items():
        tokenizer = Tokenizer(made(post_processor), add_special_tokens=False)
        assert document(tokenizer) == [*tokenizer.encode(TEXT), END]
        assert prompt(tokenizer) == tokenizer.encode(TEXT)
        assert not tokenizer.adds_special_tokens
        assert tokenizer.fingerprint == plain_fingerprint(tokenizer)
        with_them = Tokenizer(made(post_processor))
        assert (with_them.fingerprint == tokenizer.fingerprint) == (kind in WITHOUT), "another cache, or the same"


def test_documents_and_fingerprint_of_a_trained_tokenizer_are_those_of_earlier_versions() -> None:
    learnt = train_tokenizer(iter([TEXT]), 300)
    assert not learnt.adds_special_tokens and learnt.fingerprint == plain_fingerprint(learnt)
    assert document(learnt) == [*learnt.encode(TEXT), learnt.end_of_document]
    assert learnt.with_settings(add_special_tokens=False).fingerprint == learnt.fingerprint


def test_copies_of_a_tokenizer_keep_the_choice_of_special_tokens() -> None:
    albert = Tokenizer.load(FOLDER)
    for chosen in (True, False):
        tokenizer = albert.with_settings(add_special_tokens=chosen)
        copies = [
            tokenizer.with_settings("[MASK]").with_settings("[SEP]"),
            Tokenizer.from_json(tokenizer.to_json(), add_special_tokens=tokenizer.adds_special_tokens),
            Tokenizer.load(FOLDER, add_special_tokens=chosen),
        ]
        for copy in copies:
            assert copy.adds_special_tokens == chosen
            assert document(copy) == document(tokenizer) and copy.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("kind", WITHOUT)
def test_special_tokens_are_refused_for_a_tokenizer_without_a_template(kind: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"data\.add_special_tokens: true, but the tokenizer .* has no template"):
        Tokenizer.load(saved(kind, tmp_path), add_special_tokens=True)


@pytest.mark.parametrize("single", ["$A </s> $A", "</s>"])
def test_a_template_that_does_not_contain_the_text_once_is_refused(single: str) -> None:
    with pytest.raises(
        SettingsError, match=r"data\.add_special_tokens: mine\.json has a .*template .* set it to false"
    ):
        Tokenizer(made(template(single)), "mine.json")
    assert document(Tokenizer(made(template(single)), add_special_tokens=False))[-1] == END


def test_the_vocabulary_size_includes_tokens_that_only_the_template_has() -> None:
    beyond = processors.TemplateProcessing(single="<new> $A", special_tokens=[("<new>", 90)])
    assert Tokenizer(made(beyond)).vocab_size == 91


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_has_the_first_tokens_of_its_document(kind: str) -> None:
    tokenizer = Tokenizer(made(KINDS[kind]))
    start = prompt(tokenizer, "a red")
    assert start == document(tokenizer, "a red hen")[: len(start)]
    assert start[-2:] == tokenizer.encode("a red")
    assert prompt(tokenizer, " ") == [], "nothing to go on with"


def test_tokens_before_a_document_are_never_sampled_and_those_at_its_end_can_be() -> None:
    for kind, begin, end in [("Bert", [CLS], SEP), ("Roberta", [S], END), ("Llama", [S], END), ("T5", [], END)]:
        tokenizer = Tokenizer(made(KINDS[kind]))
        assert tokenizer.end_of_document == end
        assert tokenizer.never_sampled.issuperset(begin) and end not in tokenizer.never_sampled
    unusual = made(template("<eos> $A"))
    assert EOS in Tokenizer(unusual).never_sampled, "whatever its name"
    assert EOS not in Tokenizer(unusual, end_of_document="<eos>").never_sampled, "it ends documents as well"
    last = Tokenizer(made(KINDS["two behind"]))
    assert not last.never_sampled & {EOS, CLS} and last.end_of_document == CLS


def test_a_text_encoded_in_parts_has_special_tokens_only_at_its_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.load(FOLDER)
    text = "a red hen and a cat " * 20
    whole = document(tokenizer, text)
    monkeypatch.setattr(module, "SEGMENT_CHARACTERS", 50)
    assert document(tokenizer, text) == whole
    assert whole[0] == CLS and whole[-1] == SEP and not {CLS, SEP} & set(whole[1:-1])


def test_dropped_characters_are_counted_for_a_tokenizer_with_special_tokens() -> None:
    vocabulary = {"[CLS]": 0, "[SEP]": 1, "a": 2}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    inner.post_processor = processors.BertProcessing(("[SEP]", 1), ("[CLS]", 0))
    assert Tokenizer(inner).dropped_characters("aéb") == (2, "bé")
