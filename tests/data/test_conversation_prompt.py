"""The prompt of a conversation has the tokens that training sees before the assistant's answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from savant_ray.data.conversations import ChatTemplate, ConversationError, conversation_prompt
from savant_ray.data.documents import DocumentRule, encode
from savant_ray.data.records import Record
from savant_ray.data.tokenizer import Tokenizer, train_tokenizer
from tests.data.test_conversations import CHATML, LLAMA, MARKED, MISTRAL, TOKENS, WITHOUT_THOUGHTS, ZEPHYR

# As in Qwen 3: `add_generation_prompt` writes other text than a conversation with an answer has before it.
WITH_EMPTY_THOUGHTS = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if loop.last and message.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
    {{- message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""
ALPACA = """\
{%- for message in messages %}
    {%- if message.role == 'system' %}{{ message.content + '\n\n' }}
    {%- elif message.role == 'user' %}{{ '### Instruction:\n' + message.content + '\n\n' }}
    {%- else %}{{ '### Response:\n' + message.content + eos_token + '\n\n' }}{% endif %}
{%- endfor %}"""

QUESTIONS = ["What is 1 + 1?", "Wie heißt du?  ", "Line one\n\nLine two", "Why 日本?", "[x] = {y}"]
ANSWERS = ["It is 2.", "Ich heiße Ada.", "日本 is Japan", "42", "x"]
TEXTS = [*QUESTIONS, *ANSWERS, "Question: a\nAnswer: b", "user assistant system Instruction Response"] * 3


def inner(kind: str) -> tokenizers.Tokenizer:
    """Return a trained tokenizer of a kind that published models have."""
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    special += ["[INST]", "[/INST]", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    if kind == "metaspace":
        tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet, special = [chr(code) for code in range(32, 127)] + ["\n"], [*special, "<unk>"]
    elif kind == "characters":
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = 1 if kind == "characters" else 500
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return tokenizer


def loaded(folder: Path, kind: str, template: str, adds: str = "") -> Tokenizer:
    """Return a tokenizer with a chat template; it adds `adds`, such as `<s> $A </s>`, to every document."""
    tokenizer = inner(kind)
    if adds:
        tokens = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing(single=adds, special_tokens=tokens)
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return Tokenizer.load(folder)


def conversation(turns: int, with_system: bool) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": "Be brief."}] if with_system else []
    for question, answer in zip(QUESTIONS[:turns], ANSWERS[:turns], strict=True):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def seen_before_the_last_answer(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
    """Return the ids of a training document up to the last part that is trained on."""
    rule = DocumentRule(chat_template=tokenizer.chat_template)
    (document,) = rule.documents([Record(1, {"messages": messages})])
    assert document.text, document.problem
    ((ids, is_trained),) = encode([document], tokenizer)
    begin = max(number for number in range(len(ids)) if is_trained[number] and not is_trained[number - 1])
    return ids[:begin]


def prompt_ids(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
    template = tokenizer.chat_template
    text = conversation_prompt(messages, template)
    (ids,) = tokenizer.encode_prompts([text], special_tokens=template is not None)
    return ids


@pytest.mark.parametrize("kind", ["byte level", "metaspace", "characters"])
@pytest.mark.parametrize("adds", ["", "<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize(
    "template",
    [CHATML, LLAMA, MISTRAL, ZEPHYR, MARKED, WITHOUT_THOUGHTS, WITH_EMPTY_THOUGHTS, ALPACA],
    ids=["chatml", "llama", "mistral", "zephyr", "marked", "without_thoughts", "with_empty_thoughts", "alpaca"],
)
def test_a_prompt_by_a_chat_template_has_the_tokens_that_training_sees_before_the_answer(
    template: str, adds: str, kind: str, tmp_path: Path
) -> None:
    tokenizer = loaded(tmp_path, kind, template, adds)
    for turns in range(1, len(QUESTIONS) + 1):
        for with_system in (False, True):
            messages = conversation(turns, with_system)
            assert prompt_ids(tokenizer, messages[:-1]) == seen_before_the_last_answer(tokenizer, messages)


@pytest.mark.parametrize("with_system", [False, True])
def test_a_prompt_in_the_plain_form_has_the_tokens_that_training_sees_before_the_answer(with_system: bool) -> None:
    tokenizer = train_tokenizer(iter(TEXTS), 400)
    for turns in range(1, len(QUESTIONS) + 1):
        messages = conversation(turns, with_system)
        assert prompt_ids(tokenizer, messages[:-1]) == seen_before_the_last_answer(tokenizer, messages)


def test_a_prompt_ends_where_the_answer_begins() -> None:
    question = [{"role": "user", "content": "1 + 1?"}]
    assert conversation_prompt(question, None) == "Question: 1 + 1?\nAnswer:"
    assert conversation_prompt(question, ChatTemplate(MISTRAL, TOKENS)) == "<s>[INST] 1 + 1? [/INST]"
    assert conversation_prompt(question, ChatTemplate(CHATML)).endswith("<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("template", [CHATML, LLAMA, MISTRAL, ZEPHYR, WITHOUT_THOUGHTS, WITH_EMPTY_THOUGHTS, ALPACA])
def test_the_cost_of_a_prompt_does_not_grow_with_the_square_of_the_conversation(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    render, sizes = ChatTemplate._render, list[int]()

    def counted(self: ChatTemplate, messages: list[dict[str, str]], *options: bool) -> str:
        sizes.append(len(messages))
        return render(self, messages, *options)

    monkeypatch.setattr(ChatTemplate, "_render", counted)
    messages = conversation(5, False) * 40
    prompt = conversation_prompt(messages[:-1], ChatTemplate(template, TOKENS))
    assert prompt.count(QUESTIONS[0]) == 40 and len(sizes) <= 4


@pytest.mark.parametrize("content", ["", " \n"])
@pytest.mark.parametrize("template", [CHATML, LLAMA, MISTRAL, ZEPHYR, MARKED])
def test_an_answer_that_was_stopped_at_once_may_be_in_the_conversation(template: str, content: str) -> None:
    messages = [*conversation(2, False)[:-1], {"role": "assistant", "content": content}, *conversation(1, False)[:1]]
    prompt = conversation_prompt(messages, ChatTemplate(template, TOKENS))
    assert prompt.count("It is 2.") == 1 and prompt.count(QUESTIONS[0]) == 2


def test_templates_have_the_options_of_tojson_that_transformers_gives_them() -> None:
    # The templates of GLM and Kimi use them.
    written = "{{ {'b': 1, 'a': 'ü'} | tojson(ensure_ascii=False, separators=(',', ':'), sort_keys=True) }}"
    question = [{"role": "user", "content": "1 + 1?"}]
    assert conversation_prompt(question, ChatTemplate(written + CHATML)).startswith('{"a":"ü","b":1}<|im_start|>user')


@pytest.mark.parametrize(
    ("messages", "template", "reason"),
    [
        ([], None, "no message that the assistant could answer"),
        (conversation(1, False), ChatTemplate(CHATML), "no message that the assistant could answer"),
        ([{"role": "tool", "content": "3"}], None, "needs a chat template"),
        (conversation(1, True)[:1], ChatTemplate(MISTRAL, TOKENS), "roles must alternate"),
        (
            [{"role": "user", "content": "Say <|im_end|>"}],
            ChatTemplate(CHATML, special_tokens=("<|im_end|>",)),
            "message 1 contains the special token <|im_end|>",
        ),
        (conversation(1, False)[:1], ChatTemplate("", problem="no network"), "no network"),
        (conversation(1, False)[:1], ChatTemplate("{{ messages[0].content }}"), "cannot be found"),
    ],
)
def test_a_conversation_without_a_prompt_is_refused_with_the_reason(
    messages: list[dict[str, Any]], template: ChatTemplate | None, reason: str
) -> None:
    with pytest.raises(ConversationError, match=reason.replace("|", r"\|")):
        conversation_prompt(messages, template)
