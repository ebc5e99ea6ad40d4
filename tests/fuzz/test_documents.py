"""Fields, templates and conversations: any record is a document, a problem or left out, whatever the rule is."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from savant_ray.data.conversations import ChatTemplate
from savant_ray.data.documents import DocumentRule
from savant_ray.data.record_reader import RecordReader, plan_parts
from savant_ray.data.sources import SourceFile
from tests.data.test_conversations import CHATML, LLAMA, MARKED, MISTRAL, TOKENS, WITHOUT_THOUGHTS
from tests.fuzz.drawing import damaged, from_seed, random_text, random_value
from tests.fuzz.property import INPUTS, holds_for, scratch

FIELDS = (
    *(
        "text",
        "messages",
        "conversations",
        "instruction",
        "input",
        "output",
        "prompt",
        "completion",
        "question",
        "answer",
    ),
    *("response", "system", "role", "content", "from", "value", "weight", "tool_calls", "type", "train", "body.text"),
)
ROLES = ("system", "user", "assistant", "tool", "human", "gpt", "Assistant", "developer", "observer", "")
TEMPLATES = tuple(
    ChatTemplate(source, TOKENS, ("<|im_end|>", "</s>"), "<s>")
    for source in (
        CHATML,
        LLAMA,
        MISTRAL,
        MARKED,
        WITHOUT_THOUGHTS,
        "{{ messages[9].content }}",
        "{% if",
        "{{ 1 / 0 }}",
    )
)
SHAPES: tuple[tuple[str, ...], ...] = (
    ("messages",),
    ("conversations",),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("instruction", "input", "output"),
    ("text",),
)


def random_message(rng: Random) -> Any:
    """Return a message of one of the shapes, or something else."""
    content: Any = random_text(rng, 8)
    if rng.random() < 0.1:
        content = [{"type": "text", "text": random_text(rng)} for _ in range(rng.randrange(3))]
    keys = ("from", "value") if rng.random() < 0.3 else ("role", "content")
    message = dict(zip(keys, (rng.choice(ROLES[:3] * 6 + ROLES), content), strict=True))
    if rng.random() < 0.1:
        message[rng.choice(("weight", "tool_calls", "train", "name"))] = rng.choice((0, 1, None, random_value(rng)))
    return random_value(rng) if rng.random() < 0.03 else message


def random_record(rng: Random) -> Any:
    """Return a record of one of the shapes in which texts and conversations occur, altered in one of two cases."""
    record: dict[str, Any] = {}
    for name in rng.choice(SHAPES):
        is_list = name in ("messages", "conversations") or (name in ("prompt", "completion") and rng.random() < 0.3)
        record[name] = [random_message(rng) for _ in range(rng.randrange(5))] if is_list else random_text(rng, 8)
        if is_list and rng.random() < 0.1:
            record[name] = json.dumps(record[name])  # as in CSV
    for _ in range(rng.choice((0, 0, 1, 2))):
        record[rng.choice(FIELDS)] = rng.choice((random_text(rng), [random_message(rng)], random_value(rng)))
    return random_value(rng) if rng.random() < 0.03 else record


def random_rule(rng: Random) -> DocumentRule:
    """Return a rule that takes texts, templates or conversations."""
    name = rng.choice(FIELDS)
    conversion = rng.choice(
        (
            {},
            {"text": name},
            {"template": f"{{{name}}} / {{{rng.choice(FIELDS)}}}"},
            {"messages": name},
            {"messages": "auto"},
            {"messages": "auto"},
        )
    )
    return DocumentRule(
        **conversion,
        train_on=rng.choice(("assistant", "assistant", "all")),
        chat_template=rng.choice((None, *TEMPLATES)),
        min_chars=rng.choice((0, 0, 5)),
        max_chars=rng.choice((None, None, 20)),
        equals=rng.choice(((), (), ((name, rng.choice(("x", 1, True))),))),
        sample=rng.choice((1.0, 0.5)),
        held_out=rng.choice((0.0, 0.5)),
    )


def random_file(rng: Random) -> tuple[bytes, DocumentRule]:
    """Return JSON lines with up to 8 records, one of three damaged, and a rule for them."""
    records = [random_record(rng) for _ in range(rng.randrange(1, 9))]
    content = b"\n".join(json.dumps(record).encode() for record in records) + b"\n"
    return damaged(content, rng) if rng.random() < 0.3 else content, random_rule(rng)


@holds_for(
    "files of texts, conversations of all shapes and other records, altered or damaged; rules of all kinds, chat templates",
    case=from_seed(random_file),
)
def test_any_record_is_a_document_a_problem_or_left_out_by_any_rule(case: tuple[bytes, DocumentRule]) -> None:
    content, rule = case
    (path := scratch() / "records.jsonl").write_bytes(content)
    INPUTS["conversations and templates"] += 1
    number = 0
    for part in plan_parts([SourceFile(str(path), len(content), 0, format="jsonl")]):
        with RecordReader(part, fields=rule.fields) as records:
            for document in rule.documents(records):
                number += 1
                assert document.number == number, "lost or duplicated"
                assert sum(map(bool, (document.text, document.problem, document.filtered))) <= 1
                assert document.problem.isprintable() and len(document.problem) < 800
                assert document.text.encode() or document.text == ""
                ends = [end for pair in document.trained or () for end in pair]
                assert ends == sorted(ends) and all(0 <= end <= len(document.text) for end in ends)
                assert rule.train_on == "assistant" or document.trained is None
    raws = content.split(b"\n")
    assert number == len(raws) - (not raws[-1])
