"""Renders conversations as text: by the chat template of a tokenizer, or in a plain form.

Four shapes of records are conversations: `messages: [{role, content}, …]`, ShareGPT's `conversations: [{from, value}, …]`,
`instruction` with `output` and optionally `input`, and `prompt` with `completion`, which are texts or lists of messages and
have several other names. The plain form is the one of the validation prompt:

    Text of the system message

    Question: …
    Answer: …

    Question: …
    Answer: …

Besides the text, the character ranges that the assistant writes are returned: the content of its messages and what ends
its turn, so that the model learns to stop. Those of messages with `weight: 0`, and of messages in a `prompt`, are not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, compress
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from savant_ray.data.records import MISSING, is_blank, json_type, look_up

Message = dict[str, Any]  # at least "role" and "content", both strings
Ranges = tuple[tuple[int, int], ...]  # of characters, [start, stop)

AUTO = "auto"  # instead of the name of a field: any of the four shapes
ROLES = {
    **{name: name for name in ("system", "developer", "user", "assistant", "tool", "function")},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "ai", "bot", "model"), "assistant"),
}  # in upper or lower case; other roles are passed to the chat template
ROLES_WITHOUT_CONTENT = ("system", "tool", "function")  # whose content may be null or blank
SYSTEM_FIELDS = ("system", "system_prompt")  # beside a conversation
PROMPT_FIELDS = ("prompt", "question", "query", "instruction")
COMPLETION_FIELDS = ("completion", "response", "answer", "output")
ADDITION_FIELDS = ("input", "context")  # the first of them that has a value is added to a prompt that is a text
CHOICE_FIELDS = ("choices", "options")  # without which a question is incomplete; they need a template
WEIGHT = "weight"  # field of a message of the assistant, as OpenAI has it: with 0 the message is not trained on
TOOL_CALLS = ("tool_calls", "function_call")  # fields of a message, which then may have no content
TEXT_PARTS = ("text", "input_text", "output_text")  # types of the parts of a content
PROBE = "Answer"  # content of an assistant's message that shows where a template writes it
OPEN, CLOSE = "\ufdd0", "\ufdd1"  # mark a range while a template is rendered; Unicode reserves them for internal use
# Templates that write the current date get this one, so that the same conversations always give the same token cache. Other
# codes, such as %H, stay in the text as they are.
FIXED_DATE = {"%d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%y": "24"}
SHOWN_CHARACTERS = 200  # of text that an error quotes
MAX_NAMED_ROLES = 5  # in an error


class ConversationError(ValueError):
    """A record that cannot be rendered as a conversation; the message is the reason."""


class Rendered(NamedTuple):
    """Text of a conversation, and the ranges that the assistant writes and that are trained on."""

    text: str
    answers: Ranges


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template as `tokenizer_config.json` or `chat_template.jinja` contains it.

    `prefix` and `suffix` are the special tokens that the tokenizer adds to each document. A rendered text that begins or
    ends with them loses them, so that they are not there twice.
    """

    source: str
    variables: tuple[tuple[str, str], ...] = ()  # names and values: bos_token, eos_token, …
    special_tokens: tuple[str, ...] = ()  # of the vocabulary; contents must not contain them
    prefix: str = ""
    suffix: str = ""
    # Why there is no template that could be rendered; then `source` is empty. Not part of the identity of a token cache.
    problem: str = field(default="", repr=False)
    version: int = field(default=2, init=False)  # of the ranges; a part of the identity of a token cache

    def render(self, messages: Sequence[Message], only_last_answer: bool = False) -> Rendered:
        """Render a conversation; with `only_last_answer`, the last message's range may be the only one that is returned.

        The ranges are those of the template's `{% generation %}` blocks. A template without such blocks is rendered again
        with marks around the contents of the assistant, and once for each of them with the messages up to it: what follows
        the content there ends the turn. A space before a range belongs to it, as most tokenizers make it a part of the
        token that follows.

        Raises:
            ConversationError: a message contains a special token, or the template refuses the conversation, alters the
            assistant's contents, or does not show which text belongs to a message of weight 0.
        """
        if self.problem:
            raise ConversationError(self.problem)
        for number, message in enumerate(messages):
            words = _words(message)
            for forbidden in (OPEN, CLOSE, *self.special_tokens):
                if forbidden in words:
                    token = "a reserved character" if forbidden in (OPEN, CLOSE) else f"the special token {forbidden}"
                    raise ConversationError(f"message {number + 1} contains {token}")
        is_trained = [message.get(WEIGHT) != 0 for message in messages if message["role"] == "assistant"]
        messages = [{key: value for key, value in message.items() if key != WEIGHT} for message in messages]
        marked = self._render(messages)
        text, blocks = _without_marks(marked)
        answers = blocks if blocks else self._contents(messages, text, only_last_answer)
        if blocks is None or answers is None:
            raise ConversationError("the chat template changes the contents of the assistant, so they cannot be found")
        if not all(is_trained):
            if len(answers) != len(is_trained):
                raise ConversationError("the chat template does not mark each message, so weight: 0 cannot be applied")
            answers = tuple(compress(answers, is_trained))
        return self._without_affixes(text, _with_space_before(text, answers))

    def _contents(self, messages: Sequence[Message], text: str, only_last_answer: bool) -> Ranges | None:
        """Return the range of each message of the assistant, None if the rendered contents cannot be found.

        With `only_last_answer`, contents before the last message have an empty range, because each would need a rendering.
        """
        indices = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        contents = self._marked_contents(messages, text)
        if contents is None or len(contents) != sum(_is_marked(messages[index]) for index in indices):
            return None
        answers = []
        ranges = iter(contents)
        for index in indices:
            content = next(ranges) if _is_marked(messages[index]) else None
            is_last = index == len(messages) - 1
            is_empty = content is None and not _has_tool_calls(messages[index])  # nothing of it is trained on
            if is_empty or (only_last_answer and content is not None and not is_last):
                answers.append((0, 0))
                continue
            until_here = text if is_last else self._prefix(messages[: index + 1])
            if content is None:
                before = self._before_tool_calls(messages[: index + 1])
                if not (text.startswith(until_here) and until_here.startswith(before)):
                    return None
                answers.append((len(before), len(until_here)))
                continue
            start, stop = content
            if text.startswith(until_here) and len(until_here) >= stop:
                answers.append((start, len(until_here)))
            else:  # the template writes earlier turns in another way than the last one
                turn_end = self._turn_end()
                answers.append((start, stop + len(turn_end) * text.startswith(turn_end, stop)))
        return tuple(answers)

    def _marked_contents(self, messages: Sequence[Message], text: str) -> Ranges | None:
        """Return the ranges of the contents, with the white space around them if the template keeps it."""
        for mark in (_mark_all, _mark_inside_space):
            marked = [{**m, "content": mark(m["content"])} if _is_marked(m) else m for m in messages]
            try:
                unmarked, contents = _without_marks(self._render(marked))
            except ConversationError:
                continue
            if unmarked == text and contents is not None:
                return contents
        return None

    def _prefix(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """Return the text of the first messages; a template that refuses them has none."""
        try:
            return self._render(messages, add_generation_prompt)
        except ConversationError:
            return OPEN  # begins no text

    def _before_tool_calls(self, messages: Sequence[Message]) -> str:
        """Return what the template writes before the last message, which has tool calls and no content.

        Raises:
            ConversationError: the template does not write tool calls.
        """
        *earlier, last = messages
        without_calls = {key: value for key, value in last.items() if key not in TOOL_CALLS}
        if self._prefix([*earlier, without_calls]) == self._prefix(messages):
            raise ConversationError(f"the chat template does not write the tool calls of message {len(messages)}")
        return self._prefix(earlier, add_generation_prompt=True)

    def _turn_end(self) -> str:
        """Return what the template writes after the last content of the assistant."""
        probe = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": f"{OPEN}{PROBE}{CLOSE}"}]
        try:
            return self._render(probe).rpartition(CLOSE)[2]
        except ConversationError:
            return ""

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        try:
            return _compiled(self.source).render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **dict(self.variables),
            )
        except jinja2.TemplateSyntaxError as error:
            raise ConversationError(f"the chat template is invalid (line {error.lineno}: {error.message})") from error
        except Exception as error:  # a template may compute anything, and raises what Python raises
            reason = " ".join(str(error).split())[:SHOWN_CHARACTERS] or type(error).__name__
            raise ConversationError(f"the chat template refuses the conversation ({reason})") from error

    def _without_affixes(self, text: str, answers: Ranges) -> Rendered:
        begin = len(self.prefix) if self.prefix and text.startswith(self.prefix) else 0
        end = len(text)
        if self.suffix and (stripped := text.rstrip()).endswith(self.suffix):
            end = max(len(stripped) - len(self.suffix), begin)
        clipped = ((min(max(start, begin), end) - begin, min(max(stop, begin), end) - begin) for start, stop in answers)
        return Rendered(text[begin:end], tuple((start, stop) for start, stop in clipped if start < stop))


def conversation_prompt(messages: Sequence[Message], template: ChatTemplate | None) -> str:
    """Return the text of a conversation up to the start of the assistant's next answer; in plain form without a template.

    `Tokenizer.encode_prompts` gives the tokens that training sees before an answer; for a text by a template it needs
    `special_tokens=True`. The text is not that of `add_generation_prompt`, because some templates ignore it, and with it
    some write other text than they write before an answer.

    Raises:
        ConversationError: there is no message, or the last one is of the assistant; or as `ChatTemplate.render` and
            `plain_form`.
    """
    if not messages or messages[-1]["role"] == "assistant":
        raise ConversationError("the conversation has no message that the assistant could answer")
    with_answer = [*messages, {"role": "assistant", "content": PROBE}]
    rendered = plain_form(with_answer) if template is None else template.render(with_answer, only_last_answer=True)
    if not rendered.answers:
        raise ConversationError("the chat template does not write the answer of the assistant")
    return rendered.text[: rendered.answers[-1][0]]


def end_of_answer(template: ChatTemplate) -> str:
    """Return what a chat template writes after an answer, such as `<|im_end|>`, without the end of the document.

    Raises:
        ConversationError: as `ChatTemplate.render`.
    """
    rendered = template.render([{"role": "user", "content": "Question"}, {"role": "assistant", "content": PROBE}])
    return "".join(rendered.text[start:stop].partition(PROBE)[2] for start, stop in rendered.answers[-1:])


def plain_form(messages: Sequence[Message]) -> Rendered:
    """Render a conversation in the plain form.

    A prompt for the model ends with `Answer:`, so the space after it belongs to the answer. The blank line before the next
    question does not: a model that is trained to write it would go on after it, with text that it is not trained to write.
    From answers that end a conversation, the model learns to end an answer with the end-of-document token.

    Raises:
        ConversationError: a role is none of system, developer, user and assistant, or a message calls a tool.
    """
    parts: list[str] = []
    answers: list[tuple[int, int]] = []
    length = 0
    labels = {"system": "", "developer": "", "user": "Question:", "assistant": "Answer:"}
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        unusual = f"the role {json.dumps(role)} of message {number}" if role not in labels else ""
        if _has_tool_calls(message):
            unusual = f"the tool call of message {number}"
        if unusual:
            raise ConversationError(f'{unusual} has no place in "Question: …, Answer: …"; it needs a chat template')
        is_last = number == len(messages)
        content = message["content"].strip()
        before = f"{labels[role]} " if labels[role] else ""
        after = "" if is_last else "\n" if role == "user" else "\n\n"
        if role == "assistant" and message.get(WEIGHT) != 0:
            answers.append((length + len(labels[role]), length + len(before) + len(content)))
        parts.append(before + content + after)
        length += len(parts[-1])
    return Rendered("".join(parts), tuple(answers))


def find_messages(value: dict[str, Any], field: str = AUTO) -> list[Message] | None:
    """Return the messages of a record; None if it has no conversation.

    `field` is the name of the list of messages, in which dots lead into objects, or `AUTO` for the four known shapes. A list
    can be a JSON array in a text, as in CSV. A system message can be in a field beside the messages, or of the record.

    Raises:
        ConversationError: a message has no role or no content, or none is of the assistant.
    """
    messages = _find_messages(value, field)
    if messages is None or messages[0]["role"] in ("system", "developer"):
        return messages
    beside = "" if field in value else field.rpartition(".")[0]
    names = [f"{beside}.{name}" for name in SYSTEM_FIELDS if beside] + [*SYSTEM_FIELDS]
    texts = (look_up(value, name) for name in names)
    system = next((text for text in texts if isinstance(text, str) and not is_blank(text)), None)
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def _find_messages(value: dict[str, Any], field: str) -> list[Message] | None:
    if field != AUTO:
        messages = _parsed(look_up(value, field))
        return None if messages in (None, MISSING) else _messages_of(field, messages)
    for name in ("messages", "conversations"):
        if isinstance(messages := _parsed(value.get(name)), list):
            return _messages_of(name, messages)
    if isinstance(value.get("instruction"), str) and isinstance(value.get("output"), str):
        return _of_pair(value, "instruction", "output")
    # Of two prompts or two answers, which one belongs to the other is unknown.
    pairs = [[name for name in names if value.get(name) is not None] for names in (PROMPT_FIELDS, COMPLETION_FIELDS)]
    if [len(names) for names in pairs] == [1, 1] and not any(map(value.get, CHOICE_FIELDS)):
        (prompt,), (completion,) = pairs
        if isinstance(value[prompt], str | list) and isinstance(value[completion], str | list):
            return _of_pair(value, prompt, completion)
    return None


def _parsed(messages: Any) -> Any:
    """Return the array that a text contains as JSON; other values are returned as they are."""
    if not isinstance(messages, str) or not messages.lstrip().startswith("["):
        return messages
    try:
        return json.loads(messages)
    except (ValueError, RecursionError):
        return messages


def _of_pair(value: dict[str, Any], prompt: str, completion: str) -> list[Message]:
    """Return the messages of a prompt and its completion: texts or lists of messages, of which the completion is trained on.

    Raises:
        ConversationError: one of the two is empty or not valid, or the completion has no message of the assistant.
    """
    question, answer = (_parsed(value[name]) for name in (prompt, completion))
    for name, part in ((prompt, question), (completion, answer)):
        if not part or (isinstance(part, str) and is_blank(part)):
            raise ConversationError(f'"{name}" is empty')
    if isinstance(question, str):
        name, addition = next(
            ((name, value[name]) for name in ADDITION_FIELDS if value.get(name) is not None), ("", "")
        )
        if not isinstance(addition, str):
            raise ConversationError(f'"{name}" is {json_type(addition)}, not a string')
        question = [{"role": "user", "content": question if is_blank(addition) else f"{question}\n\n{addition}"}]
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    before = _present_messages(prompt, question)
    return [{**message, WEIGHT: 0} for message in before] + _messages_of(completion, answer)


def _messages_of(field: str, messages: Any) -> list[Message]:
    present = _present_messages(field, messages)
    roles = list(dict.fromkeys(message["role"] for message in present))
    if "assistant" not in roles:
        found = f" (roles: {', '.join(role[:SHOWN_CHARACTERS] for role in roles[:MAX_NAMED_ROLES])})" if roles else ""
        raise ConversationError(f'"{field}" contains no message of the assistant{found}')
    return present


def _present_messages(field: str, messages: Any) -> list[Message]:
    """Return the messages without empty system messages."""
    normalized = normalized_messages(messages, field)
    # Data sets that have a field for the system message leave it empty where there is none.
    present = [message for message in normalized if not (message["role"] == "system" and is_blank(message["content"]))]
    for number, message in enumerate(present, start=1):
        may_be_blank = _has_tool_calls(message) or message["role"] in ROLES_WITHOUT_CONTENT
        if is_blank(message["content"]) and not may_be_blank:
            raise ConversationError(f'message {number} of "{field}" is empty')
    return present


def normalized_messages(messages: Any, field: str = "messages") -> list[Message]:
    """Return messages of any of the known forms with the usual names of roles, and with contents as one text.

    Raises:
        ConversationError: it is not a list of messages, or one has no role or no content.
    """
    if not isinstance(messages, list):
        raise ConversationError(f'"{field}" is {json_type(messages)}, not an array')
    return [_message(f'"{field}"', number, message) for number, message in enumerate(messages, start=1)]


def _message(field: str, number: int, message: Any) -> Message:
    if not isinstance(message, dict):
        raise ConversationError(f"message {number} of {field} is {json_type(message)}, not an object")
    keys = ("from", "value") if "from" in message and "role" not in message else ("role", "content")
    role, content = (message.get(key) for key in keys)
    role = ROLES.get(role.strip().lower(), role) if isinstance(role, str) else role
    # A table has the fields of all messages in each, without a value where a message does not have them.
    others = {key: item for key, item in message.items() if key not in keys and item is not None}
    if isinstance(content, list):
        content = _text_of_parts(content, f'"{keys[1]}" of message {number} of {field}')
    if content is None and (_has_tool_calls(others) or (role in ROLES_WITHOUT_CONTENT and keys[1] in message)):
        content = ""
    for key, text in zip(keys, (role, content), strict=True):
        if not isinstance(text, str):
            state = f"is {json_type(text)}, not a string" if key in message else "is missing"
            raise ConversationError(f'"{key}" of message {number} of {field} {state}')
    if role == "assistant" and (weight := others.get(WEIGHT, 1)) not in (0, 1):
        shown = json.dumps(weight, default=str)[:SHOWN_CHARACTERS]
        raise ConversationError(f'"{WEIGHT}" of message {number} of {field} is {shown}; it has to be 0 or 1')
    return {**others, "role": role, "content": content}


def _text_of_parts(parts: list[Any], name: str) -> str:
    """Return the text of a content in parts: `[{"type": "text", "text": …}]`, or strings.

    Raises:
        ConversationError: a part is not text.
    """
    texts = []
    for part in parts:
        kind = part.get("type") or "text" if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if kind not in TEXT_PARTS or not isinstance(text, str):
            what = json.dumps(kind)[:SHOWN_CHARACTERS] if isinstance(part, dict) else json_type(part)
            raise ConversationError(f"{name} has a part that is not text ({what})")
        texts.append(text)
    return "".join(texts)


def _has_tool_calls(message: Message) -> bool:
    return any(message.get(name) for name in TOOL_CALLS)


def _is_marked(message: Message) -> bool:
    """Return whether a message is of the assistant and has a content, whose range marks can show."""
    return message["role"] == "assistant" and not is_blank(message["content"])


def _words(message: Message) -> str:
    """Return all texts in a message that a template may write."""
    others = [value for key, value in message.items() if key not in ("role", "content", WEIGHT)]
    content = str(message["content"])
    return content + json.dumps(others, ensure_ascii=False, default=str) if others else content


def _mark_all(content: str) -> str:
    return f"{OPEN}{content}{CLOSE}"


def _mark_inside_space(content: str) -> str:
    """Mark the content without the white space around it, which some templates remove."""
    stripped = content.strip()
    return content.replace(stripped, f"{OPEN}{stripped}{CLOSE}", 1)


def _with_space_before(text: str, answers: Ranges) -> Ranges:
    return tuple((start - 1 if text[start - 1 : start] == " " else start, stop) for start, stop in answers)


def _without_marks(marked: str) -> tuple[str, Ranges | None]:
    """Return the text without marks and the ranges that they enclosed; None if they are not balanced."""
    pieces = re.split(f"([{OPEN}{CLOSE}])", marked)  # texts and marks in turn
    ends = list(accumulate(len(text) for text in pieces[::2]))[:-1]
    marks = "".join(pieces[1::2])
    is_balanced = marks == (OPEN + CLOSE) * (len(marks) // 2)
    return "".join(pieces[::2]), tuple(zip(ends[::2], ends[1::2], strict=True)) if is_balanced else None


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}`, with which a template says what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012 - the name and type that Jinja expects

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Put marks around the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        first, last = (nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in (OPEN, CLOSE))
        return [first, *body, last]


@lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    """Compile a chat template with the functions and options that `transformers` gives it.

    Raises:
        jinja2.TemplateSyntaxError: the template is invalid.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _format_fixed_date
    return environment.from_string(source)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _format_fixed_date(date_format: str) -> str:
    for code, text in FIXED_DATE.items():
        date_format = date_format.replace(code, text)
    return date_format
