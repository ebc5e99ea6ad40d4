"""Conversations: four shapes of records, rendered by a chat template or in the plain form, with the assistant's ranges."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors

from savant_ray.data.conversations import ChatTemplate
from savant_ray.data.documents import Document, DocumentRule
from savant_ray.data.record_reader import documents
from savant_ray.data.records import Record
from savant_ray.data.sources import expand
from savant_ray.data.tokenizer import Tokenizer

# Short templates in the form of those that come with published models.
CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
MISTRAL = """\
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}{% endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + (system + '\n\n' if system is defined and loop.index0 >= messages | length - 2 else '')
            + message.content + ' [/INST]' }}
    {%- else %}{{ ' ' + message.content + eos_token }}{% endif %}
{%- endfor %}"""
ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
MARKED = """\
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|assistant|>' }}{% generation %}{{ message.content + '<|end|>' }}{% endgeneration %}
    {%- else %}{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}{% endif %}
{%- endfor %}"""
WITHOUT_THOUGHTS = """\
{%- for message in messages %}
    {%- set content = message.content.split('</think>')[-1] if not loop.last else message.content %}
    {{- '<' + message.role + '>' + content + '</>' }}
{%- endfor %}"""

TOKENS = (("bos_token", "<s>"), ("eos_token", "</s>"))
SPOKEN = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "It is 2."},
    {"role": "user", "content": "And 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
]
USER, ANSWER = SPOKEN[1], SPOKEN[2]


def rendered(value: dict[str, Any], rule: DocumentRule) -> Document:
    (document,) = rule.documents([Record(1, value)])
    assert not document.problem
    return document


def trained(document: Document) -> list[str]:
    assert document.trained is not None
    return [document.text[start:stop] for start, stop in document.trained]


def by_template(source: str, messages: list[dict[str, str]], **fields: Any) -> Document:
    template = ChatTemplate(source, TOKENS, **fields)
    return rendered({"messages": messages}, DocumentRule(chat_template=template))


@pytest.mark.parametrize(
    ("source", "begin", "answers", "end"),
    [
        (CHATML, "<|im_start|>system\nBe brief.", ["It is 2.<|im_end|>\n", "It is 4.<|im_end|>\n"], "4.<|im_end|>\n"),
        (LLAMA, "<s><|start_header_id|>system", ["It is 2.<|eot_id|>", "It is 4.<|eot_id|>"], "It is 4.<|eot_id|>"),
        (MISTRAL, "<s>[INST] 1 + 1? [/INST] It", [" It is 2.</s>", " It is 4.</s>"], "[/INST] It is 4.</s>"),
        (ZEPHYR, "<|system|>\nBe brief.</s>", ["It is 2.</s>\n", "It is 4.</s>\n"], "It is 4.</s>\n"),
        (MARKED, "<|system|>Be brief.<|end|>", ["It is 2.<|end|>", "It is 4.<|end|>"], "It is 4.<|end|>"),
        (WITHOUT_THOUGHTS, "<system>Be brief.</>", ["It is 2.</>", "It is 4.</>"], "<assistant>It is 4.</>"),
    ],
)
def test_what_the_assistant_writes_is_trained_with_the_end_of_its_turn_and_without_its_header(
    source: str, begin: str, answers: list[str], end: str
) -> None:
    document = by_template(source, SPOKEN)
    assert document.text.startswith(begin) and document.text.endswith(end)
    assert trained(document) == answers
    assert document.special_tokens


CONTENTS = st.text(st.sampled_from("aA5 \n.?é"), min_size=1, max_size=6).filter(lambda text: bool(text.strip()))


@settings(max_examples=150, deadline=None)
@given(contents=st.lists(CONTENTS, min_size=2, max_size=6), ends_with_user=st.booleans())
@pytest.mark.parametrize(
    ("source", "is_trimmed"), [(CHATML, False), (LLAMA, True), (MISTRAL, False), (ZEPHYR, False), (MARKED, False)]
)
def test_the_ranges_are_exactly_the_contents_even_if_users_and_headers_say_the_same(
    source: str, is_trimmed: bool, contents: list[str], ends_with_user: bool
) -> None:
    contents = contents[: len(contents) // 2 * 2]
    roles = ("user", "assistant") * (len(contents) // 2)
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]
    if ends_with_user:
        messages.append({"role": "user", "content": "a"})
    answers = trained(by_template(source, messages))
    ends = {"<|im_end|>\n", "<|eot_id|>", "</s>", "</s>\n", "<|end|>"}
    for answer, content in zip(answers, contents[1::2], strict=True):
        expected = " " * (source is MISTRAL) + (content.strip() if is_trimmed else content)
        assert answer.startswith(expected) and answer.removeprefix(expected) in ends


PLAIN = "Be brief.\n\nQuestion: 1 + 1?\nAnswer: It is 2.\n\nQuestion: And 2 + 2?\nAnswer: It is 4."
SHARE_GPT = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "1 + 1?"},
    {"from": "gpt", "value": "It is 2."},
    {"from": "human", "value": "And 2 + 2?"},
    {"from": "gpt", "value": "It is 4."},
]


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        ({"messages": SPOKEN}, DocumentRule()),
        ({"messages": SPOKEN, "text": None}, DocumentRule()),
        ({"messages": SPOKEN, "text": "x"}, DocumentRule(messages="auto")),
        ({"messages": SPOKEN}, DocumentRule(messages="messages")),
        ({"conversations": SHARE_GPT, "id": "7"}, DocumentRule()),
        ({"conversations": SHARE_GPT}, DocumentRule(messages="auto")),
        ({"chat": SHARE_GPT}, DocumentRule(messages="chat")),
        ({"messages": SHARE_GPT}, DocumentRule()),
        ({"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in SPOKEN]}, DocumentRule()),
    ],
)
def test_every_shape_of_a_conversation_is_written_in_the_plain_form_without_a_chat_template(
    value: dict[str, Any], rule: DocumentRule
) -> None:
    document = rendered(value, rule)
    assert document.text == PLAIN
    assert trained(document) == [" It is 2.", " It is 4."], (
        "from `Answer:`, with which a prompt ends, to the end of the answer"
    )
    assert not document.special_tokens


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"instruction": "Add.", "input": "1, 2", "output": "3"}, "Question: Add.\n\n1, 2\nAnswer: 3"),
        ({"instruction": "Say a.", "input": "", "output": "a"}, "Question: Say a.\nAnswer: a"),
        ({"instruction": "Say a.", "output": "a"}, "Question: Say a.\nAnswer: a"),
        ({"instruction": "Say a.", "input": None, "output": " a\n"}, "Question: Say a.\nAnswer: a"),
    ],
)
def test_an_instruction_with_its_output_is_a_conversation(value: dict[str, Any], text: str) -> None:
    document = rendered(value, DocumentRule())
    assert document.text == text
    assert trained(document) == [text[text.index("\nAnswer:") + 8 :]]


FEW_SHOT = SPOKEN[:4]  # with an answer in the prompt


@pytest.mark.parametrize(
    ("value", "text", "answer"),
    [
        ({"prompt": "1 + 1?", "completion": " 2\n"}, "Question: 1 + 1?\nAnswer: 2", " 2"),
        ({"question": "1 + 1?", "answer": "2", "id": 3}, "Question: 1 + 1?\nAnswer: 2", " 2"),
        ({"instruction": "Add.", "context": "1, 1", "response": "2"}, "Question: Add.\n\n1, 1\nAnswer: 2", " 2"),
        ({"question": "1 + 1?", "input": "", "response": "2", "completion": None}, "Question: 1 + 1?\nAnswer: 2", " 2"),
        ({"system_prompt": "Be brief.", "question": "a", "response": "b"}, "Be brief.\n\nQuestion: a\nAnswer: b", " b"),
        ({"prompt": FEW_SHOT, "completion": [SPOKEN[4]]}, PLAIN, " It is 4."),
        ({"prompt": FEW_SHOT, "completion": "It is 4."}, PLAIN, " It is 4."),
        ({"prompt": json.dumps(FEW_SHOT), "completion": json.dumps(SPOKEN[4:])}, PLAIN, " It is 4."),
    ],
)
def test_a_prompt_with_its_completion_is_a_conversation_of_which_the_completion_is_trained_on(
    value: dict[str, Any], text: str, answer: str
) -> None:
    for rule in (DocumentRule(), DocumentRule(messages="auto")):
        document = rendered(value, rule)
        assert document.text == text
        assert trained(document) == [answer] and text.endswith(answer)
    assert rendered(value, DocumentRule(train_on="all")).trained is None


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": "a", "completion": "b", "response": "c"},
        {"prompt": "a", "question": "b", "answer": "c"},
        {"question": "a", "choices": ["b", "c"], "answer": "b"},
        {"question": "a", "answer": 1},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ],
)
def test_a_prompt_whose_completion_is_not_certain_is_no_conversation(value: dict[str, Any]) -> None:
    (document,) = DocumentRule().documents([Record(1, value)])
    assert document.problem.startswith('no "text" field') and not document.is_conversation


@pytest.mark.parametrize("source", [None, CHATML, LLAMA, MISTRAL, ZEPHYR, MARKED])
@pytest.mark.parametrize("weights", [(0, 1), (1, 0), (False, None), (0, 0)])
def test_an_answer_of_weight_0_is_not_trained_on_and_changes_no_text(
    source: str | None, weights: tuple[int | None, int | None]
) -> None:
    rule = DocumentRule(chat_template=None if source is None else ChatTemplate(source, TOKENS))
    weighted = [dict(message) for message in SPOKEN]
    weighted[2]["weight"], weighted[4]["weight"] = weights
    document, plain = rendered({"messages": weighted}, rule), rendered({"messages": SPOKEN}, rule)
    assert document.text == plain.text and plain.trained is not None
    assert document.trained == tuple(
        answer for answer, weight in zip(plain.trained, weights, strict=True) if weight not in (0, False)
    )


def test_a_template_that_does_not_mark_each_answer_refuses_weights() -> None:
    template = ChatTemplate("{% generation %}{{ messages[1].content + messages[3].content }}{% endgeneration %}")
    messages = [USER, {**ANSWER, "weight": 0}, USER, ANSWER]
    (document,) = DocumentRule(chat_template=template).documents([Record(1, {"messages": messages})])
    assert document.problem == "the chat template does not mark each message, so weight: 0 cannot be applied"


def test_all_tokens_of_a_conversation_are_trained_on_if_that_is_set() -> None:
    document = rendered({"messages": SPOKEN}, DocumentRule(train_on="all"))
    assert (document.text, document.trained) == (PLAIN, None)


def test_an_empty_system_message_is_as_good_as_none() -> None:
    empty = [{"role": "system", "content": ""}, *SPOKEN[1:]]
    assert rendered({"messages": empty}, DocumentRule()) == rendered({"messages": SPOKEN[1:]}, DocumentRule())


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet", "x.arrow"])
@pytest.mark.parametrize("rule", [DocumentRule(messages="dialog"), DocumentRule(messages="dialog", equals=(("n", 1),))])
def test_a_system_message_beside_a_named_conversation_is_read_from_every_format(
    tmp_path: Path, name: str, rule: DocumentRule
) -> None:
    record = {"dialog": SPOKEN[1:], "system_prompt": "Be brief.", "n": 1, "other": "x"}
    table = pa.Table.from_pylist([record])
    match name:
        case "x.jsonl":
            (tmp_path / name).write_text(json.dumps(record))
        case "x.parquet":
            pq.write_table(table, tmp_path / name)
        case "x.arrow":
            pyarrow.feather.write_feather(table, tmp_path / name)
    (document,) = documents(expand(str(tmp_path / name)), rule=rule)
    assert document.text.startswith("Be brief.\n\n")


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
@pytest.mark.parametrize("system", [{"meta": {"system": "Be brief."}}, {"system": "Be brief."}, {}])
def test_the_name_of_a_conversation_can_lead_into_an_object(tmp_path: Path, name: str, system: dict[str, Any]) -> None:
    record = {**system, "meta": {"messages": [USER, ANSWER], **system.get("meta", {})}}
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist([record]), tmp_path / name)
    else:
        (tmp_path / name).write_text(json.dumps(record))
    (document,) = documents(expand(str(tmp_path / name)), rule=DocumentRule(messages="meta.messages"))
    expected = "Be brief.\n\n" * bool(system) + "Question: 1 + 1?\nAnswer: It is 2."
    assert (document.text, document.is_conversation) == (expected, True)


def conversation(user: str = "user", assistant: str = "assistant", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": user, "content": "1 + 1?"}, {"role": assistant, "content": "2"}], **fields}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (conversation("USER", "Assistant"), "Question: 1 + 1?\nAnswer: 2"),
        (conversation("Human", "Bot"), "Question: 1 + 1?\nAnswer: 2"),
        (conversation("prompter", " AI "), "Question: 1 + 1?\nAnswer: 2"),
        (conversation(system="Be brief."), "Be brief.\n\nQuestion: 1 + 1?\nAnswer: 2"),
        (conversation(system_prompt=""), "Question: 1 + 1?\nAnswer: 2"),
        (conversation("system", system="Be brief."), "1 + 1?\n\nAnswer: 2"),
        ({"instruction": "a", "output": "b", "system": "Be brief."}, "Be brief.\n\nQuestion: a\nAnswer: b"),
        ({"messages": json.dumps(conversation()["messages"])}, "Question: 1 + 1?\nAnswer: 2"),
        ({"messages": [{"role": "system", "content": None}, USER, ANSWER]}, "Question: 1 + 1?\nAnswer: It is 2."),
        (
            {
                "messages": [
                    {"role": "user", "content": ["a ", "b"]},
                    {
                        "role": "assistant",
                        "content": [{"type": "output_text", "text": "c"}, {"type": None, "text": "d"}],
                    },
                ]
            },
            "Question: a b\nAnswer: cd",
        ),
    ],
)
def test_conversations_are_read_as_different_programs_write_them(value: dict[str, Any], text: str) -> None:
    document = rendered(value, DocumentRule())
    assert document.text == text
    assert document.trained and document.trained[-1][1] == len(text)


TOOLS = """\
{%- for message in messages %}
    {{- '<' + message.role + '>' }}
    {%- if message.content %}{{ message.content }}{% endif %}
    {%- if 'tool_calls' in message %}
        {%- for call in message.tool_calls %}{{ '[' + call.function.name + call.function.arguments + ']' }}{% endfor %}
    {%- endif %}{{ '</>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<assistant>' }}{% endif %}"""
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "(1, 1)"}}
WITH_A_CALL = [
    {"role": "user", "content": "1 + 1?", "tool_calls": None},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "2", "tool_calls": None},
    {"role": "assistant", "content": "It is 2.", "tool_calls": None},
]


def test_a_chat_template_writes_tool_calls_which_are_trained_on(tmp_path: Path) -> None:
    parquet = tmp_path / "a.parquet"  # each message has the fields of all messages
    pq.write_table(pa.Table.from_pylist([{"messages": WITH_A_CALL}]), parquet)
    rule = DocumentRule(chat_template=ChatTemplate(TOOLS))
    (document,) = documents(expand(str(parquet)), rule=rule)
    assert document.text == "<user>1 + 1?</><assistant>[add(1, 1)]</><tool>2</><assistant>It is 2.</>"
    assert trained(document) == ["[add(1, 1)]</>", "It is 2.</>"]


@pytest.mark.parametrize("others", [{}, {"created": datetime(2024, 7, 26)}], ids=["", "with a time"])
@pytest.mark.parametrize("field", ["messages", "meta.messages"])
def test_a_tool_call_in_a_table_has_its_own_arguments_only(tmp_path: Path, others: dict[str, Any], field: str) -> None:
    def asks(name: str, **arguments: str) -> dict[str, Any]:
        call = {"function": {"name": name, "arguments": arguments}}
        messages = [USER, {"role": "assistant", "content": "", "tool_calls": [call], **others}]
        return {"meta": {"messages": messages}} if "." in field else {"messages": messages}

    table = pa.Table.from_pylist(
        [asks("add", a="1"), asks("now"), asks("look", where="up")]
    )  # each has `a` and `where`
    pq.write_table(table, tmp_path / "a.parquet")
    template = ChatTemplate(TOOLS.replace("arguments", "arguments | tojson"))
    rule = DocumentRule(messages=field, chat_template=template)
    found = documents(expand(str(tmp_path / "a.parquet")), rule=rule)
    assert [trained(document) for document in found] == [
        ['[add{"a": "1"}]</>'],
        ["[now{}]</>"],
        ['[look{"where": "up"}]</>'],
    ]


def test_tool_calls_that_the_chat_template_leaves_out_make_a_conversation_invalid() -> None:
    (document,) = DocumentRule(chat_template=ChatTemplate(CHATML)).documents([Record(1, {"messages": WITH_A_CALL})])
    assert document.problem == "the chat template does not write the tool calls of message 2"


def test_a_special_token_in_a_tool_call_makes_a_conversation_invalid() -> None:
    template = ChatTemplate(TOOLS, special_tokens=("</>",))
    messages = [USER, {"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": "</>"}]}]
    (document,) = DocumentRule(chat_template=template).documents([Record(1, {"messages": messages})])
    assert document.problem == "message 2 contains the special token </>"


@pytest.mark.parametrize(
    ("value", "rule", "problem"),
    [
        ({"messages": []}, DocumentRule(), '"messages" contains no message of the assistant'),
        ({"messages": [USER]}, DocumentRule(), '"messages" contains no message of the assistant (roles: user)'),
        (
            {"messages": [USER, {"role": "Teacher", "content": "a"}]},
            DocumentRule(),
            '"messages" contains no message of the assistant (roles: user, Teacher)',
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ANSWER]},
            DocumentRule(),
            '"content" of message 1 of "messages" has a part that is not text ("image_url")',
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": ["a", 1]}]},
            DocumentRule(),
            '"content" of message 2 of "messages" has a part that is not text (a number)',
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}]},
            DocumentRule(),
            'the tool call of message 2 has no place in "Question: …, Answer: …"; it needs a chat template',
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": None}]},
            DocumentRule(),
            '"content" of message 2 of "messages" is null, not a string',
        ),
        ({"messages": "[{'role': 'user'}]"}, DocumentRule(messages="messages"), '"messages" is a string, not an array'),
        ({"messages": [USER, "x"]}, DocumentRule(), 'message 2 of "messages" is a string, not an object'),
        ({"messages": [{"role": "user"}, ANSWER]}, DocumentRule(), '"content" of message 1 of "messages" is missing'),
        (
            {"messages": [{"role": "user", "content": None}, ANSWER]},
            DocumentRule(),
            '"content" of message 1 of "messages" is null, not a string',
        ),
        ({"messages": [{"content": "a"}, ANSWER]}, DocumentRule(), '"role" of message 1 of "messages" is missing'),
        (
            {"conversations": [{"from": "human", "text": "a"}]},
            DocumentRule(),
            '"value" of message 1 of "conversations" is missing',
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": " "}]},
            DocumentRule(),
            'message 2 of "messages" is empty',
        ),
        (
            {"messages": [{"role": "tool", "content": "a"}, ANSWER]},
            DocumentRule(),
            'the role "tool" of message 1 has no place in "Question: …, Answer: …"; it needs a chat template',
        ),
        ({"messages": "x"}, DocumentRule(messages="messages"), '"messages" is a string, not an array'),
        ({"talk": [], "id": 1}, DocumentRule(messages="chat"), 'no "chat" field (found: id, talk)'),
        (
            {"text": "x"},
            DocumentRule(messages="auto"),
            'no conversation in "messages", "conversations", "instruction" and "output" or "prompt" and "completion" '
            "(found: text)",
        ),
        ({"instruction": "a", "output": ""}, DocumentRule(), '"output" is empty'),
        ({"prompt": "a", "completion": " "}, DocumentRule(), '"completion" is empty'),
        ({"prompt": [], "completion": "b"}, DocumentRule(), '"prompt" is empty'),
        ({"question": "a", "context": ["b"], "answer": "c"}, DocumentRule(), '"context" is an array, not a string'),
        (
            {"prompt": [USER], "completion": [USER]},
            DocumentRule(),
            '"completion" contains no message of the assistant (roles: user)',
        ),
        ({"prompt": ["a"], "completion": "b"}, DocumentRule(), 'message 1 of "prompt" is a string, not an object'),
        (
            {"messages": [USER, {**ANSWER, "weight": 0.5}]},
            DocumentRule(),
            '"weight" of message 2 of "messages" is 0.5; it has to be 0 or 1',
        ),
        ({"instruction": "a", "input": 3, "output": "b"}, DocumentRule(), '"input" is a number, not a string'),
        (
            {"messages": [USER, {"role": "assistant", "content": "a\ud83d"}]},
            DocumentRule(),
            "message 2 contains half a surrogate pair (\\ud83d)",
        ),
    ],
)
def test_a_conversation_that_cannot_be_rendered_is_named_with_the_reason(
    value: dict[str, Any], rule: DocumentRule, problem: str
) -> None:
    (document,) = rule.documents([Record(1, value)])
    assert (document.text, document.problem) == ("", problem)


@pytest.mark.parametrize(
    ("template", "messages", "problem"),
    [
        (ChatTemplate(MISTRAL, TOKENS), [USER, USER, ANSWER], "refuses the conversation (roles must alternate)"),
        (ChatTemplate("{% for x %}"), [USER, ANSWER], "the chat template is invalid (line 1: expected token 'in'"),
        (ChatTemplate("{{ messages[9].content }}"), [USER, ANSWER], "the chat template refuses the conversation"),
        (ChatTemplate("{{ messages[1].content[::-1] }}"), [USER, ANSWER], "changes the contents of the assistant"),
        (ChatTemplate("{{ ''.__class__.__mro__ }}"), [USER, ANSWER], "the chat template refuses the conversation"),
        (ChatTemplate("{{ 1 / 0 }}"), [USER, ANSWER], "refuses the conversation (division by zero)"),
        (ChatTemplate("  "), [USER, ANSWER], "changes the contents of the assistant, so they cannot be found"),
        (ChatTemplate("", problem="no network"), [USER, ANSWER], "no network"),
        (
            ChatTemplate(CHATML, special_tokens=("<|im_end|>",)),
            [{"role": "user", "content": "Say <|im_end|>"}, ANSWER],
            "message 1 contains the special token <|im_end|>",
        ),
        (
            ChatTemplate(CHATML),
            [{"role": "user", "content": "\ufdd0"}, ANSWER],
            "message 1 contains a reserved character",
        ),
        (
            ChatTemplate(WITHOUT_THOUGHTS),
            [USER, {"role": "assistant", "content": "I think</think>2"}, USER, ANSWER],
            "the chat template changes the contents of the assistant, so they cannot be found",
        ),
    ],
)
def test_a_template_that_refuses_or_alters_a_conversation_makes_it_invalid(
    template: ChatTemplate, messages: list[dict[str, str]], problem: str
) -> None:
    (document,) = DocumentRule(chat_template=template).documents([Record(1, {"messages": messages})])
    assert problem in document.problem and not document.text


def test_a_text_is_not_rendered_even_if_the_template_cannot_be_used() -> None:
    rule = DocumentRule(chat_template=ChatTemplate("", problem="no network"))
    assert rendered({"text": "a"}, rule) == Document(1, "a")


def test_the_date_in_a_template_is_always_the_same() -> None:
    template = "{{ strftime_now('%d %b %Y') }} {{ messages[1].content }}"
    assert by_template(template, [USER, ANSWER]).text == "26 Jul 2024 It is 2."


def test_special_tokens_that_the_tokenizer_adds_to_every_document_are_not_there_twice() -> None:
    document = by_template(ZEPHYR, [USER, ANSWER], suffix="</s>")
    assert document.text.endswith("<|assistant|>\nIt is 2.")
    assert trained(document) == ["It is 2."], "up to the end of the text, so the end of the document is trained, too"
    document = by_template(MISTRAL, [USER, ANSWER], prefix="<s>", suffix="</s>")
    assert document.text == "[INST] 1 + 1? [/INST] It is 2."
    assert trained(document) == [" It is 2."]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a tokenizer of single characters, `<s>` before each text, and the special tokens of a template."""
    characters = {chr(code): code for code in range(128)}
    inner = tokenizers.Tokenizer(models.BPE(vocab=characters, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(["<s>", "</s>", "[INST]", "[/INST]"])
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))])
    inner.post_processor = template
    inner.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_the_chat_template_is_found_beside_the_tokenizer(folder: Path) -> None:
    assert Tokenizer.load(folder).chat_template is None
    values: dict[str, Any] = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    assert Tokenizer.load(folder).chat_template is None
    (folder / "tokenizer_config.json").write_text(json.dumps({**values, "chat_template": MISTRAL}))
    template = Tokenizer.load(folder / "tokenizer.json").chat_template
    special_tokens = ("<s>", "</s>", "[INST]", "[/INST]")
    assert template == ChatTemplate(MISTRAL, TOKENS, special_tokens, prefix="<s>", suffix="</s>")
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert Tokenizer.load(folder).with_settings("[INST]").chat_template == ChatTemplate(
        CHATML, (), special_tokens, prefix="<s>", suffix="[INST]"
    )
    (folder / "chat_template.jinja").write_text(ZEPHYR)
    template = Tokenizer.load(folder).chat_template
    assert template is not None and template.source == ZEPHYR


@pytest.mark.parametrize("content", [b"{", b"\xff", b'{"chat_template": "\\ud83d"}', b'{"chat_template": 3}'])
def test_a_damaged_file_beside_the_tokenizer_is_named_where_a_conversation_needs_it(
    folder: Path, content: bytes
) -> None:
    (folder / "tokenizer_config.json").write_bytes(content)
    rule = DocumentRule(chat_template=Tokenizer.load(folder).chat_template)
    text, conversation = rule.documents([Record(1, {"text": "a"}), Record(2, {"messages": SPOKEN})])
    assert text.text == "a"
    assert conversation.problem.startswith(f"the chat template of the tokenizer {folder} cannot be read (")


@pytest.mark.parametrize(
    "templates", [[{"name": "rag", "template": CHATML}], {"rag": CHATML}, ["x"], [{"name": [], "template": "x"}]]
)
def test_several_chat_templates_without_a_default_one_are_refused_where_a_conversation_needs_one(
    folder: Path, templates: object
) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    template = Tokenizer.load(folder).chat_template
    assert template is not None and "none is named default" in template.problem
    assert rendered({"text": "a"}, DocumentRule(chat_template=template)).text == "a"


def test_special_tokens_of_a_template_are_tokens_and_those_in_a_text_are_text(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": MISTRAL, **dict(TOKENS)}))
    tokenizer = Tokenizer.load(folder)
    rule = DocumentRule(chat_template=tokenizer.chat_template)
    document = rendered({"messages": [USER, ANSWER]}, rule)
    (ids,) = tokenizer.encode_documents([document.text], document.special_tokens)
    name_of = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).id_to_token
    assert [name_of(number) for number in ids] == ["<s>", "[INST]", *"1+1?", "[/INST]", *"Itis2.", "</s>"]
    (ids,) = tokenizer.encode_documents(["[INST]"])
    assert [name_of(number) for number in ids] == ["<s>", *"[INST]", "</s>"]


def test_the_chat_template_of_a_hugging_face_model_is_read_from_the_cache_without_network(folder: Path) -> None:
    model = folder / "home/hub/models--owner--chat"
    (model / "refs").mkdir(parents=True)
    (model / "refs/main").write_text("a" * 40)
    snapshot, absent = model / "snapshots" / ("a" * 40), model / ".no_exist" / ("a" * 40)
    snapshot.mkdir(parents=True)
    absent.mkdir(parents=True)
    (folder / "tokenizer.json").rename(snapshot / "tokenizer.json")
    program = (
        "from savant_ray.data.tokenizer import Tokenizer; chat = Tokenizer.load('owner/chat').chat_template; "
        "print(chat and (chat.source, chat.problem))"
    )
    environment = {**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}

    def found() -> str:
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert found().startswith("('', 'the chat template of the tokenizer owner/chat cannot be read (")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (absent / name).touch()
    assert found() == "None\n", "the model has no such file"
    (absent / "tokenizer_config.json").unlink()
    (snapshot / "tokenizer_config.json").write_text(json.dumps({"chat_template": "the template"}))
    assert found() == "('the template', '')\n"
