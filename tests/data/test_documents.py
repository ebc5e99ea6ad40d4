"""Records become documents by the settings of their source: fields, templates, filters, samples, limits and the split."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from savant_ray.config import Config, HeldOutConfig, SourceConfig
from savant_ray.data import cache_builder, decoded_stream
from savant_ray.data.cache_builder import plan_source_parts, within_limits
from savant_ray.data.conversations import ChatTemplate
from savant_ray.data.documents import Document, DocumentRule, SourceText, rule_of
from savant_ray.data.record_reader import RecordReader, documents
from savant_ray.data.records import MAX_RECORD_BYTES, Record
from savant_ray.data.sources import expand
from savant_ray.errors import SettingsError

WriteJsonl = Callable[[str, Iterable[str]], Path]
TEXTS = [f"document {number}" for number in range(5_000)]


def apply(rule: DocumentRule, values: Iterable[dict[str, Any] | None]) -> list[Document]:
    return list(rule.documents(Record(number, value) for number, value in enumerate(values, start=1)))


def texts_of(rule: DocumentRule, texts: Iterable[str]) -> list[str]:
    return [document.text for document in apply(rule, ({"text": text} for text in texts)) if document.text]


QUESTION = DocumentRule(template="Question: {question}\nAnswer: {answer}")
BODY, NESTED, AUTO = DocumentRule(text="body"), DocumentRule(text="a.b"), DocumentRule()


@pytest.mark.parametrize(
    ("rule", "value", "text"),
    [
        (AUTO, {"text": "a"}, "a"),
        (AUTO, {"text": "a", "messages": [{"role": "user", "content": "b"}]}, "a"),
        (AUTO, {"text": " déjà 漢字\n", "id": 1}, " déjà 漢字\n"),
        (BODY, {"body": "a", "text": "b"}, "a"),
        (NESTED, {"a": {"b": "c"}}, "c"),
        (NESTED, {"a": {"b": "c"}, "a.b": "d"}, "d"),
        (NESTED, {"a.b": "d"}, "d"),
        (DocumentRule(text="answers.text.1"), {"answers": {"text": ["a", "b"]}}, "b"),
        (DocumentRule(template="{choices.0.label}"), {"choices": [{"label": 3}]}, "3"),
        (DocumentRule(text="a.0"), {"a": {"0": "b"}}, "b"),
        (QUESTION, {"question": "1 + 1?", "answer": "2", "id": None}, "Question: 1 + 1?\nAnswer: 2"),
        (QUESTION, {"question": "1 + 1?", "answer": 2}, "Question: 1 + 1?\nAnswer: 2"),
        (QUESTION, {"question": "True?", "answer": True}, "Question: True?\nAnswer: true"),
        (QUESTION, {"question": "", "answer": 0.5}, "Question: \nAnswer: 0.5"),
        (QUESTION, {"question": "{answer}", "answer": "{0.__class__}"}, "Question: {answer}\nAnswer: {0.__class__}"),
        (DocumentRule(template="{{{a.b}}} }}{{"), {"a": {"b": "c"}}, "{c} }{"),
        (DocumentRule(template="{a[0]}"), {"a[0]": "c"}, "c"),
    ],
)
def test_a_record_gives_the_text_that_the_rule_describes(rule: DocumentRule, value: dict[str, Any], text: str) -> None:
    (document,) = apply(rule, [value])
    assert (document.text, document.problem, document.trained) == (text, "", None)


@pytest.mark.parametrize(
    ("rule", "value", "problem"),
    [
        (AUTO, {"id": 1, "url": "x"}, 'no "text" field (found: id, url)'),
        (AUTO, {"body": "x", "id": 7}, 'no "text" field (found: body, id); if body has the text, set text: body'),
        (AUTO, {"content": "x"}, 'no "text" field (found: content); if content has the text, set text: content'),
        (AUTO, {"content": "x", "body": "y"}, 'no "text" field (found: body, content)'),
        (AUTO, {"content": ["x"]}, 'no "text" field (found: content)'),
        (AUTO, {}, 'no "text" field (found: nothing)'),
        (AUTO, {"text": None}, '"text" is null, not a string'),
        (AUTO, {"text": ["a"]}, '"text" is an array, not a string'),
        (AUTO, {"text": b"a"}, '"text" is binary data that is not UTF-8, not a string'),
        (AUTO, {"text": " \n"}, '"text" is empty'),
        (AUTO, {"text": "a\ud83d"}, '"text" contains half a surrogate pair (\\ud83d)'),
        (BODY, {"text": "b"}, 'no "body" field (found: text)'),
        (BODY, {"body": 3}, '"body" is a number, not a string'),
        (BODY, {"body": ""}, '"body" is empty'),
        (NESTED, {"a": "b"}, 'no "a.b" field (found: a)'),
        (NESTED, {"a": {"c": 1}}, 'no "a.b" field (found: a)'),
        (QUESTION, {"question": "a"}, 'no "answer" field (found: question)'),
        (QUESTION, {"question": "a", "answer": None}, '"answer" is null, not a string, number or boolean'),
        (QUESTION, {"question": "a", "answer": ["b"]}, '"answer" is an array, not a string, number or boolean'),
        (QUESTION, {"question": {}, "answer": "b"}, '"question" is an object, not a string, number or boolean'),
        (QUESTION, {"question": "a", "answer": float("nan")}, '"answer" is not a finite number'),
        (QUESTION, {"question": "a", "answer": 10**5_000}, '"answer" is an integer with too many digits'),
        (QUESTION, {"question": "\ud83d", "answer": "b"}, '"question" contains half a surrogate pair (\\ud83d)'),
        (DocumentRule(template="{a}{a.b}"), {"a": "", "a.b": ""}, "all fields of the template are empty"),
        (DocumentRule(template="{a} {b}"), {"a": "", "b": "\n"}, "all fields of the template are empty"),
        (DocumentRule(text="a.2"), {"a": ["b"]}, 'no "a.2" field (found: a)'),
        (AUTO, {"Text": "a"}, 'no "text" field (found: Text); if Text has the text, set text: Text'),
        (
            AUTO,
            {"question": "a", "choices": ["b", "c"], "answer": "b"},
            'no "text" field (found: answer, choices, question); set a template, such as '
            '"Question: {question}\\nAnswer: {answer}"',
        ),
        (
            AUTO,
            {"question": "1 + 1?", "answer": 2},
            'no "text" field (found: answer, question); set a template, such as "Question: {question}\\nAnswer: {answer}"',
        ),
        (
            AUTO,
            {"dialog": [{"role": "user", "content": "a"}]},
            'no "text" field (found: dialog); if dialog is a conversation, set messages: dialog',
        ),
        (
            AUTO,
            {"version": "1.0", "data": [{"text": "a"}]},
            'no "text" field (found: data, version); if the records are the elements of data, write this array to a file of '
            "its own",
        ),
        (
            AUTO,
            {"role": "user", "content": "a"},
            'no "text" field (found: content, role); it is a message, and a record has to be a conversation',
        ),
        (AUTO, {"a\nb": 1, "\x1b[31m": 2}, 'no "text" field (found: \\x1b[31m, a\\nb)'),
    ],
)
def test_a_record_without_such_a_text_is_named_with_the_reason(
    rule: DocumentRule, value: dict[str, Any], problem: str
) -> None:
    (document,) = apply(rule, [value])
    assert (document.text, document.problem, document.filtered) == ("", problem, False)


def test_blank_and_invalid_records_keep_their_number_and_problem() -> None:
    records = [Record(1), Record(2, problem="truncated JSON"), Record(3, {"text": "a"})]
    found = [(document.number, document.text, document.problem) for document in AUTO.documents(records)]
    assert found == [(1, "", ""), (2, "", "truncated JSON"), (3, "a", "")]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*"ab", "role", "content"]), inner, max_size=3)
    ),
    max_leaves=8,
)
NAMES = ("a", "b", "a.b", "text", "messages", "conversations", "instruction", "input", "output")


@settings(max_examples=100, deadline=None)
@given(value=st.dictionaries(st.sampled_from(NAMES), JSON, max_size=5))
@pytest.mark.parametrize(
    "rule",
    [
        *(AUTO, BODY, NESTED, QUESTION, DocumentRule(template="{a}{a.b}"), DocumentRule(messages="auto")),
        *(DocumentRule(messages="a"), DocumentRule(equals=(("a", 1), ("a.b", "x")))),
        DocumentRule(
            chat_template=ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}")
        ),
    ],
    ids=repr,
)
def test_any_json_object_is_a_document_or_has_a_problem_that_can_be_printed(
    rule: DocumentRule, value: dict[str, Any]
) -> None:
    (document,) = apply(rule, [value])
    assert bool(document.text) + bool(document.problem) + document.filtered == 1
    assert document.problem.isprintable()
    document.text.encode()
    for start, stop in document.trained or ():
        assert 0 <= start < stop <= len(document.text)


@settings(max_examples=200, deadline=None)
@given(literals=st.lists(st.text("a{}:! .\n", max_size=4), min_size=2, max_size=2), value=st.text(max_size=10))
def test_doubled_braces_are_braces_and_everything_else_is_copied(literals: list[str], value: str) -> None:
    before, after = (literal.replace("{", "{{").replace("}", "}}") for literal in literals)
    expected = f"{literals[0]}{value}{literals[1]}"
    (document,) = apply(DocumentRule(template=f"{before}{{x}}{after}"), [{"x": value}])
    assert document.text == (expected if expected.strip() else "")


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        (DocumentRule(min_chars=3), ["ccc", "dddd"]),
        (DocumentRule(max_chars=2), ["a", "bb", "no"]),
        (DocumentRule(min_chars=2, max_chars=3), ["bb", "ccc", "no"]),
        (DocumentRule(equals=(("lang", "en"),)), ["a", "ccc"]),
        (DocumentRule(equals=(("meta.ok", True),)), ["bb", "dddd"]),
        (DocumentRule(equals=(("lang", False),)), ["no"]),  # YAML's `lang: no`
        (DocumentRule(equals=(("year", 2020),)), ["a", "bb"]),
        (DocumentRule(equals=(("year", "2020"),)), ["a"]),
        (DocumentRule(equals=(("n", 1),)), ["bb", "ccc"]),
        (DocumentRule(equals=(("lang", "en"), ("n", 1))), ["ccc"]),
    ],
)
def test_documents_that_a_filter_leaves_out_are_marked(rule: DocumentRule, kept: list[str]) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "a", "lang": "en", "year": "2020"},
        {"text": "bb", "lang": "de", "meta": {"ok": True}, "n": 1.0, "year": 2020},
        {"text": "ccc", "lang": "en", "meta": {"ok": 1}, "n": 1, "year": "20200"},
        {"text": "dddd", "meta": {"ok": "True"}, "n": True},
        {"text": "no", "lang": "no"},
    ]
    found = apply(rule, rows)
    assert [document.text for document in found if document.text] == kept
    assert [document.filtered for document in found] == [not document.text for document in found]
    assert not any(document.problem for document in found)


def test_a_record_that_a_filter_leaves_out_is_not_invalid() -> None:
    (document,) = apply(DocumentRule(equals=(("lang", "en"),)), [{"lang": "de", "text": None}])
    assert document.filtered and not document.problem


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.5, 0.9])
def test_a_sample_has_about_its_fraction_of_the_documents_whatever_their_order(fraction: float) -> None:
    rule = DocumentRule(sample=fraction)
    sample = texts_of(rule, TEXTS)
    assert abs(len(sample) / len(TEXTS) - fraction) < 0.03
    assert sorted(texts_of(rule, reversed(TEXTS))) == sorted(sample)
    assert texts_of(rule, sample) == sample
    assert set(sample) <= set(texts_of(DocumentRule(sample=fraction + 0.05), TEXTS))


def test_the_same_documents_are_in_the_sample_in_every_version() -> None:
    sampled, held_out = [1, 6, 9, 14, 33, 42, 44], [8, 14, 19, 34, 35, 44, 46]
    assert texts_of(DocumentRule(sample=0.1), TEXTS[:50]) == [TEXTS[number] for number in sampled]
    rule = DocumentRule(held_out=0.1, split="validation")
    assert texts_of(rule, TEXTS[:50]) == [TEXTS[number] for number in held_out]


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("sample", [1.0, 0.5])
def test_a_document_is_either_trained_on_or_held_out(fraction: float, sample: float) -> None:
    training = texts_of(DocumentRule(held_out=fraction, sample=sample), TEXTS * 2)
    held_out = texts_of(DocumentRule(held_out=fraction, sample=sample, split="validation"), TEXTS * 2)
    assert not set(training) & set(held_out)
    assert sorted(training + held_out) == sorted(texts_of(DocumentRule(sample=sample), TEXTS * 2))
    assert abs(len(held_out) / (2 * len(TEXTS) * sample) - fraction) < 0.03


def test_a_record_that_is_a_conversation_is_marked_whatever_becomes_of_it() -> None:
    value = {"messages": [{"role": "assistant", "content": "x"}]}
    others = [{"text": "a"}, {"text": "a", **value}, {"body": "b"}]
    rules = [DocumentRule(), DocumentRule(min_chars=100), DocumentRule(sample=1e-9), DocumentRule(held_out=1e-9)]
    rules += [dataclasses.replace(rule, split="validation") for rule in rules]
    rules += [DocumentRule(chat_template=ChatTemplate("", problem="no network")), DocumentRule(messages="auto")]
    for rule in rules:
        assert [document.is_conversation for document in apply(rule, [value, others[0]])] == [True, False]
    for invalid in ({"messages": []}, {"messages": [{"role": "tool", "content": "x"}]}, {"conversations": [1]}):
        (document,) = apply(DocumentRule(), [invalid])
        assert document.is_conversation and document.problem
    assert not any(document.is_conversation for document in apply(DocumentRule(), others))


def test_a_limit_counts_documents_only_and_before_they_are_held_out() -> None:
    values = [{"text": ""}, None, {"text": "x"}, *({"text": text} for text in TEXTS)]
    rule = DocumentRule(min_chars=2, limit=200, held_out=0.1)
    training = [document.text for document in apply(rule, values) if document.text]
    held_out_rule = DocumentRule(min_chars=2, limit=200, held_out=0.1, split="validation")
    held_out = [document.text for document in apply(held_out_rule, values) if document.text]
    assert sorted(training + held_out) == sorted(TEXTS[:200])
    assert len(apply(rule, values)) == 203, "nothing is read after the last document"


@settings(max_examples=60, deadline=None)
@given(
    limit=st.integers(1, 45),
    part_bytes=st.integers(20, 2_000),
    sizes=st.lists(st.integers(0, 15), min_size=1, max_size=4),
    sample=st.sampled_from([1.0, 0.5]),
)
def test_a_limit_takes_the_first_documents_for_any_division_into_parts(
    tmp_path_factory: pytest.TempPathFactory, limit: int, part_bytes: int, sizes: Sequence[int], sample: float
) -> None:
    folder = tmp_path_factory.mktemp("texts")
    texts = [[f"file {file} document {number}" for number in range(size)] for file, size in enumerate(sizes)]
    for file, file_texts in enumerate(texts):
        lines = [json.dumps({"text": text}) + "\nno JSON\n\n" for text in file_texts]
        (folder / f"{file}.jsonl").write_text("".join(lines))
    files, all_texts = expand(str(folder)), [text for file_texts in texts for text in file_texts]
    rule = DocumentRule(limit=limit, sample=sample)
    expected = texts_of(DocumentRule(sample=sample), all_texts)[:limit]
    found: list[str] = []
    sources = [SourceText(files, rule), SourceText(files, rule)]
    for part in within_limits(plan_source_parts(sources, part_bytes), MAX_RECORD_BYTES):
        with RecordReader(part.part) as records:
            found += [document.text for document in part.rule.documents(records) if document.text]
    assert found == expected * 2, "each source has a limit of its own"
    assert [document.text for document in documents(files, rule=rule)] == expected


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize("limit", [40, 39, 100])
def test_documents_are_counted_with_progress_and_only_if_there_may_be_more_than_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, limit: int
) -> None:
    monkeypatch.setattr(cache_builder, "PROGRESS_BYTES", 100)
    monkeypatch.setattr(decoded_stream, "BLOCK_BYTES", 50)
    rows = [{"text": f"document {number}"} for number in range(40)]
    if name == "a.jsonl":
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name, row_group_size=10)
    parts = plan_source_parts([SourceText(expand(str(tmp_path)), DocumentRule(limit=limit))], None)
    reported: list[tuple[int, int]] = []
    kept = within_limits(parts, MAX_RECORD_BYTES, lambda done, total: reported.append((done, total)))
    size = (tmp_path / name).stat().st_size
    if limit < 40:
        assert reported[-1] == (size, size) and (len(reported) > 3 or name == "a.parquet")
        assert [done for done, _ in reported] == sorted(done for done, _ in reported)
    else:
        assert not reported and [part.rule.limit for part in kept] == [None] * len(parts)


def source(**fields: Any) -> SourceConfig:
    config = Config.from_dict({"data": {"sources": [{"path": "a", "weight": 1, **fields}]}})
    assert Config.from_validated(config.to_dict()) == config
    assert Config.from_dict(config.to_dict()) == config
    return config.data.sources[0]


def test_a_rule_has_the_settings_of_its_source() -> None:
    conditions = {"min_chars": 2, "max_chars": 9, "equals": {"n": 1, "lang": "en"}}
    assert rule_of(source()) == DocumentRule()
    assert rule_of(
        source(text="body", filter=conditions, sample=0.5, limit=7), None, 0.1, "validation"
    ) == DocumentRule(
        text="body",
        min_chars=2,
        max_chars=9,
        equals=(("lang", "en"), ("n", 1)),
        sample=0.5,
        limit=7,
        held_out=0.1,
        split="validation",
    )
    assert rule_of(source(template="{a}", train_on="all")) == DocumentRule(template="{a}")
    assert rule_of(source(messages="chat", train_on="all")) == DocumentRule(messages="chat", train_on="all")
    assert rule_of(HeldOutConfig(path="a", text="body")) == DocumentRule(text="body")


def test_equal_rules_have_an_equal_identity_after_they_were_sent_to_another_process() -> None:
    rule = rule_of(source(template="{a}", filter={"equals": {"b": True}}))
    assert apply(rule, [{"a": "x", "b": True}])[0].text == "x"
    copy = pickle.loads(pickle.dumps(rule))
    assert (copy, repr(copy), hash(copy)) == (rule, repr(rule), hash(rule))


def test_settings_without_the_new_fields_stay_as_they_were_written() -> None:
    (entry,) = Config.from_dict({"data": {"sources": [{"path": "a", "weight": 1}]}}).to_dict()["data"]["sources"]
    assert entry == {"path": "a", "weight": 1}


@pytest.mark.parametrize("validation", ["a.jsonl", ["a", "b"], {"path": "a", "messages": "auto"}, {"fraction": 0.01}])
def test_validation_text_is_a_path_or_a_fraction(validation: Any) -> None:
    config = Config.from_dict({"data": {"validation": validation}})
    assert config.to_dict()["data"]["validation"] == validation
    assert (config.data.held_out.fraction is None) == (config.data.held_out.path is not None)
    with pytest.raises(SettingsError, match=r"data\.validation\.fraction: 0.7 has to be at most 0.5"):
        Config.from_dict({"data": {"validation": {"fraction": 0.7}}})
