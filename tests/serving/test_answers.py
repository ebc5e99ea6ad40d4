"""Requests, the text of answers, and the decoding thread, without Ray."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import pytest

from savant_ray.config import Config
from savant_ray.data.tokenizer import Tokenizer, train_tokenizer
from savant_ray.inference.answer_text import AnswerText, TurnEnd
from savant_ray.inference.decoder import Decoder, NewTokens
from savant_ray.inference.engine import Engine
from savant_ray.inference.generate import generate
from savant_ray.inference.sampling import Sampling
from savant_ray.serving.openai_protocol import ApiError, ChatRequest, CompletionRequest, parse_request
from tests.inference.test_decoder import sampling
from tests.inference.test_generate import model_with


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(["one two three four five six seven. Grüße 😀\n"] * 9), 300)


def text_of(tokenizer: Tokenizer, text: str, stops: list[str], group: int) -> tuple[list[str], int, bool]:
    """Return the pieces of an answer that arrives in groups of tokens, its number of tokens, and whether it was stopped."""
    ids, answer, pieces = tokenizer.encode(text), AnswerText(tokenizer, [], TurnEnd(texts=tuple(stops))), []
    for start in range(0, len(ids), group):
        pieces.append(answer.push(NewTokens(ids[start : start + group], start + group >= len(ids))))
        if answer.is_stopped:
            break
    return pieces, answer.n_tokens, answer.is_stopped


@pytest.mark.parametrize("group", [1, 2, 7, 100])
def test_an_answer_ends_before_the_first_stop_and_no_part_of_it_is_sent(tokenizer: Tokenizer, group: int) -> None:
    text = "one two three. four Grüße 😀"
    for stops, expected in (
        (["three"], "one two "),
        (["four", "two three"], "one "),
        (["ee. f"], "one two thr"),
        (["three!", "seven"], text),
        ([], text),
        (["😀"], "one two three. four Grüße "),
        (["o"], ""),
    ):
        pieces, n_tokens, is_stopped = text_of(tokenizer, text, stops, group)
        assert "".join(pieces) == expected and is_stopped == (expected != text)
        if is_stopped:  # the last token completes the stop
            ids = tokenizer.encode(text)[:n_tokens]
            assert any(stop in tokenizer.decode(ids) for stop in stops)
            assert not any(stop in tokenizer.decode(ids[:-1]) for stop in stops)


def test_text_that_is_no_beginning_of_a_stop_is_sent_at_once(tokenizer: Tokenizer) -> None:
    pieces, _, _ = text_of(tokenizer, "one two three four", ["three five"], 1)
    assert "".join(pieces[:-1]).startswith("one two ") and "".join(pieces) == "one two three four"


def test_a_long_stop_takes_no_longer_than_a_short_one(tokenizer: Tokenizer) -> None:
    stops = ["four" + "x" * 1_000_000]  # comparing the text with each beginning of it would take minutes
    pieces, _, is_stopped = text_of(tokenizer, "one two three four five", stops, 1)
    assert "".join(pieces) == "one two three four five" and not is_stopped
    assert "".join(pieces[:4]).startswith("one two ")


@pytest.mark.parametrize(
    ("kind", "body", "param", "message"),
    [
        (CompletionRequest, "{", None, "Invalid JSON"),
        (CompletionRequest, "[]", None, "object"),
        (CompletionRequest, "{}", "prompt", "required"),
        (CompletionRequest, '{"prompt": "x", "max_tokens": 0}', "max_tokens", "greater than"),
        (CompletionRequest, '{"prompt": "x", "temperature": -1}', "temperature", "greater than"),
        (CompletionRequest, '{"prompt": "x", "temperature": NaN}', None, ""),
        (CompletionRequest, '{"prompt": "x", "n": 2}', "n", "less than"),
        (CompletionRequest, '{"prompt": "x", "stop": ["a","b","c","d","e"]}', "stop", "at most 4"),
        (CompletionRequest, '{"prompt": "x", "stop": ""}', "stop", "at least 1"),
        (CompletionRequest, '{"prompt": ["x", "y"]}', "prompt", "one prompt"),
        (CompletionRequest, '{"prompt": ["5", "7"]}', "prompt", "one prompt"),
        (CompletionRequest, '{"prompt": [[5], [7]]}', "prompt", "one prompt"),
        (CompletionRequest, '{"prompt": [["x"]]}', "prompt", "list of token ids"),
        (CompletionRequest, '{"prompt": [true, false]}', "prompt", "list of token ids"),
        (CompletionRequest, '{"prompt": [-1]}', "prompt", "list of token ids"),
        (CompletionRequest, '{"prompt": 5}', "prompt", "list of token ids"),
        (CompletionRequest, '{"prompt": "x", "best": 1}', "best", "not permitted"),
        (CompletionRequest, '{"prompt": "x", "logprobs": 3}', "logprobs", ""),
        (CompletionRequest, '{"prompt": "x", "logprobs": 0}', "logprobs", "boolean"),
        (ChatRequest, '{"messages": [], "logprobs": true}', "logprobs", "less than"),
        (CompletionRequest, '{"prompt": "x", "max_tokens": 3, "max_completion_tokens": 4}', None, "not both"),
        (CompletionRequest, '{"prompt": "x", "max_tokens": 0, "max_completion_tokens": 0}', "max_completion_tokens", "1"),
        (ChatRequest, '{"messages": "x"}', "messages", "array"),
        (ChatRequest, '{"messages": [{"role": "user"}]}', "messages", "missing"),
        (ChatRequest, '{"messages": [{"role": "user", "content": 5}]}', "messages", "not a string"),
        (ChatRequest, '{"messages": ["x"]}', "messages", "not an object"),
        (ChatRequest, '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "messages", ""),
        (ChatRequest, '{"messages": [], "tools": []}', "tools", "not permitted"),
        (ChatRequest, '{"messages": [], "stream_options": {"include_obfuscation": true}}', "stream_options", ""),
        (ChatRequest, '{"messages": [], "stream_options": {"usage": true}}', "stream_options", "not permitted"),
        (ChatRequest, '{"messages": [], "logit_bias": {"5": 1}}', "logit_bias", "at most 0"),
        (ChatRequest, '{"messages": [], "response_format": {"type": "json_object"}}', "response_format", "text"),
    ],
)  # fmt: skip
def test_a_malformed_request_is_refused_with_the_parameter(
    kind: type[CompletionRequest | ChatRequest], body: str, param: str | None, message: str
) -> None:
    with pytest.raises(ApiError) as raised:
        parse_request(kind, body.encode())
    error = raised.value.body["error"]
    assert raised.value.status == 400 and error["type"] == "invalid_request_error"
    assert (param is None or error["param"] == param) and message in error["message"]


def test_parameters_that_change_nothing_are_accepted() -> None:
    neutral = {"n": 1, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0, "user": "me", "stop": None}
    neutral |= {"logprobs": False}
    neutral |= {"logit_bias": {}, "response_format": {"type": "text"}}
    neutral |= {"stream_options": {"include_usage": None, "include_obfuscation": False}}
    completion = parse_request(
        CompletionRequest, json.dumps({"prompt": ["x"], "best_of": 1, "echo": False, **neutral}).encode()
    )
    assert isinstance(completion, CompletionRequest) and completion.prompt == "x" and completion.stop is None
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": content}]
    body = {**neutral, "messages": messages, "max_completion_tokens": 3, "stop": "x"}
    chat = parse_request(ChatRequest, json.dumps(body).encode())
    assert isinstance(chat, ChatRequest) and chat.messages == [{"role": "user", "content": "ab"}]
    assert chat.max_tokens == 3 and chat.stop == ["x"]


@pytest.mark.parametrize(
    "limits",
    [
        '"max_tokens": 3',
        '"max_tokens": 3, "max_completion_tokens": 3',
        '"max_tokens": 3, "max_completion_tokens": null',
    ],
)
def test_the_limit_of_tokens_may_have_both_names_if_they_agree(limits: str) -> None:
    request = parse_request(CompletionRequest, f'{{"prompt": "x", {limits}}}'.encode())
    assert request.max_tokens == 3


def test_the_prompt_may_be_a_list_of_one_prompt() -> None:
    for prompt in ("x", [5, 7]):  # lm-eval sends [[5, 7]]
        request = parse_request(CompletionRequest, json.dumps({"prompt": [prompt]}).encode())
        assert isinstance(request, CompletionRequest) and request.prompt == prompt


def test_null_means_the_default_for_every_optional_parameter() -> None:
    names = {*CompletionRequest.model_fields, "suffix", "tools", "tool_choice", "top_logprobs"} - {"prompt"}
    request = parse_request(CompletionRequest, json.dumps({"prompt": "x", **dict.fromkeys(names)}).encode())
    assert request == parse_request(CompletionRequest, b'{"prompt": "x"}') and request.stream is False


class LocalReplica:
    """The handle of a deployment whose only replica is in this process.

    Attributes:
        n_canceled: number of requests that have been canceled.
    """

    def __init__(self, tokens: Callable[..., AsyncIterator[NewTokens]]) -> None:
        self._tokens, self.n_canceled = tokens, 0

    def options(self, **_: Any) -> LocalReplica:
        return self

    def remote(self, *arguments: Any) -> LocalAnswer:
        return LocalAnswer(self, self._tokens(*arguments))


class LocalAnswer:
    """The tokens that a `LocalReplica` generates for a request."""

    def __init__(self, replica: LocalReplica, tokens: AsyncIterator[NewTokens]) -> None:
        self._replica, self._tokens = replica, tokens

    def __aiter__(self) -> AsyncIterator[NewTokens]:
        return self._tokens

    def cancel(self) -> None:
        self._replica.n_canceled += 1


def local_api(tokenizer: Tokenizer, replica: LocalReplica, max_answers: int = 10, **settings: Any) -> Any:
    """Return the ASGI application of a server with this replica."""
    pytest.importorskip("ray.serve", reason="needs the extra serve")
    from savant_ray.serving.openai_api import Api, ServerSettings

    server = ServerSettings("tiny", max_batch=1, max_queue=max_answers - 1, **settings)
    return Api(replica, tokenizer, Config.from_dict({}), server).asgi()


async def send_to(
    app: Any, left: list[dict[str, Any]], authorization: bytes = b"", path: str = "/v1/completions"
) -> list[dict[str, Any]]:
    """Send a request's body, whose messages are removed from `left`; return the messages of the response."""
    headers = [(b"authorization", authorization)]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
    sent = list[dict[str, Any]]()

    async def receive() -> dict[str, Any]:
        return left.pop(0) if left else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    with suppress(NotImplementedError):  # raised again after the response
        await app(scope, receive, send)
    return sent


def post(
    tokenizer: Tokenizer, replica: LocalReplica, body: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the messages that a completion sends, and those of its request `body` that have not been received."""
    left = body[:]
    return asyncio.run(send_to(local_api(tokenizer, replica), left)), left


def test_of_requests_at_once_those_beyond_the_limit_are_refused_and_places_are_given_back(tokenizer: Tokenizer) -> None:
    may_end = asyncio.Event()

    async def one_token(*_: Any) -> AsyncIterator[NewTokens]:
        await may_end.wait()
        yield NewTokens([], is_last=True)

    async def statuses(app: Any, n: int) -> list[int]:
        body = {"type": "http.request", "body": json.dumps({"prompt": "one"}).encode(), "more_body": False}
        requests = [asyncio.create_task(send_to(app, [body])) for _ in range(n)]
        while sum(request.done() for request in requests) < n - 3:  # the refused ones
            await asyncio.sleep(0)
        may_end.set()
        return [sent[0]["status"] for sent in await asyncio.gather(*requests)]

    async def bursts() -> tuple[list[int], list[int]]:
        app = local_api(tokenizer, LocalReplica(one_token), max_answers=3)
        first = await statuses(app, 5)
        return first, await statuses(app, 3)

    first, second = asyncio.run(bursts())
    assert sorted(first) == [200, 200, 200, 429, 429] and second == [200] * 3


def test_a_request_that_cannot_be_sent_to_a_replica_gives_its_place_back(tokenizer: Tokenizer) -> None:
    class UnreachableReplica(LocalReplica):
        def remote(self, *_: Any) -> LocalAnswer:
            raise NotImplementedError

    async def statuses() -> list[int]:
        app = local_api(tokenizer, UnreachableReplica(never), max_answers=1)
        body = {"type": "http.request", "body": json.dumps({"prompt": "one"}).encode(), "more_body": False}
        return [(await send_to(app, [body]))[0]["status"] for _ in range(3)]

    assert asyncio.run(statuses()) == [500] * 3


def test_a_body_is_received_up_to_its_limit_only(tokenizer: Tokenizer) -> None:
    chunk = {"type": "http.request", "body": b" " * 300_000, "more_body": True}
    sent, left = post(tokenizer, LocalReplica(never), [chunk] * 100)
    assert sent[0]["status"] == 413 and len(left) == 96


async def never(*_: Any) -> AsyncIterator[NewTokens]:
    await asyncio.Event().wait()
    yield NewTokens([], is_last=True)


def test_a_key_may_have_any_characters(tokenizer: Tokenizer) -> None:
    async def status(key: str, authorization: bytes) -> int:
        app = local_api(tokenizer, LocalReplica(one_token), api_key=key)
        body = {"type": "http.request", "body": json.dumps({"prompt": "one"}).encode(), "more_body": False}
        return int((await send_to(app, [body], authorization))[0]["status"])

    for key, authorization, expected in (
        ("schlüssel 1", "Bearer schlüssel 1".encode(), 200),
        ("schlüssel 1", b"Bearer schlussel 1", 401),
        ("schlüssel 1", "bearer schlüssel 1".encode(), 200),
        ("schlüssel 1", b"", 401),
        (os.fsdecode(b"\xff1"), b"Bearer \xff1", 200),
        (os.fsdecode(b"\xff1"), b"Bearer \xfe1", 401),
    ):
        assert asyncio.run(status(key, authorization)) == expected


async def one_token(*_: Any) -> AsyncIterator[NewTokens]:
    yield NewTokens([], is_last=True)


def test_a_stream_has_the_headers_that_keep_proxies_from_buffering_it(tokenizer: Tokenizer) -> None:
    body = json.dumps({"prompt": "one", "stream": True}).encode()
    sent, _ = post(tokenizer, LocalReplica(one_token), [{"type": "http.request", "body": body, "more_body": False}])
    assert {(b"x-accel-buffering", b"no"), (b"cache-control", b"no-cache")} <= set(sent[0]["headers"])


@pytest.mark.parametrize(("path", "expected"), [("/v1/chat/completions", "one two"), ("/v1/completions", " one two")])
def test_an_answer_in_a_conversation_begins_without_the_space_before_it(
    tokenizer: Tokenizer, path: str, expected: str
) -> None:
    ids = tokenizer.encode(" one two")

    async def tokens(*_: Any) -> AsyncIterator[NewTokens]:
        for token in ids:
            yield NewTokens([token], is_last=False)
        yield NewTokens([], is_last=True)

    body = {"messages": [{"role": "user", "content": "1?"}]} if "chat" in path else {"prompt": "1?"}
    request = {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
    sent = asyncio.run(send_to(local_api(tokenizer, LocalReplica(tokens)), [request], path=path))
    choice = json.loads(sent[1]["body"])["choices"][0]
    assert choice.get("text", choice.get("message", {}).get("content")) == expected


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_without_text_is_empty(tokenizer: Tokenizer, stream: bool) -> None:
    async def nothing(*_: Any) -> AsyncIterator[NewTokens]:
        yield NewTokens([], is_last=True)

    body = json.dumps({"prompt": "one", "stream": stream}).encode()
    sent, _ = post(tokenizer, LocalReplica(nothing), [{"type": "http.request", "body": body, "more_body": False}])
    content = b"".join(message["body"] for message in sent[1:])
    assert sent[0]["status"] == 200 and b'"text":""' in content and b'"finish_reason":"stop"' in content


def test_an_unexpected_error_is_printed_and_gets_an_error_object(
    tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    async def failing(*_: Any) -> AsyncIterator[NewTokens]:
        raise NotImplementedError
        yield

    body = json.dumps({"prompt": "one"}).encode()
    sent, _ = post(tokenizer, LocalReplica(failing), [{"type": "http.request", "body": body, "more_body": False}])
    assert sent[0]["status"] == 500 and json.loads(sent[1]["body"])["error"]["type"] == "server_error"
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_whose_user_leaves_before_the_first_token_is_canceled(tokenizer: Tokenizer, stream: bool) -> None:
    body = json.dumps({"prompt": "one", "stream": stream}).encode()
    replica = LocalReplica(never)
    post(tokenizer, replica, [{"type": "http.request", "body": body, "more_body": False}, {"type": "http.disconnect"}])
    assert replica.n_canceled == 1


async def answer(engine: Engine, prompt: list[int], parameters: Sampling, stop_after: int | None = None) -> list[int]:
    ids: list[int] = []
    tokens = engine.tokens(prompt, parameters)
    async for new in tokens:
        ids += new.ids
        if stop_after is not None and len(ids) >= stop_after:
            break
    await tokens.aclose()
    return ids


def test_requests_that_come_and_go_have_the_answers_that_each_has_alone() -> None:
    model = model_with(positions="rotary")
    requests = [
        ([5 + i % 7] * (1 + 3 * i % 40), sampling(seed=i, temperature=i % 3, max_new_tokens=150)) for i in range(20)
    ]

    async def ask() -> list[list[int]]:
        engine = Engine(Decoder(model, sampling()))

        async def later(index: int) -> list[int]:
            await asyncio.sleep(0.01 * index)
            return await answer(engine, *requests[index], stop_after=10 if index % 4 == 0 else None)

        answers = await asyncio.gather(*map(later, range(20)))
        assert engine.error is None
        return answers

    for index, ids in enumerate(asyncio.run(ask())):
        alone = list(generate(model, *requests[index]))
        assert ids == alone if index % 4 else ids == alone[: len(ids)]


def test_an_answer_ends_with_the_first_token_that_ends_a_turn() -> None:
    model, parameters = model_with(), sampling(end_of_document=-1, temperature=1.0, max_new_tokens=50)

    async def ask(end_tokens: set[int]) -> list[int]:
        engine = Engine(Decoder(model, parameters))
        tokens = [new async for new in engine.tokens([5, 6], parameters, end_tokens)]
        assert [new.is_last for new in tokens] == [False] * (len(tokens) - 1) + [True]
        return [token for new in tokens for token in new.ids]

    ids = asyncio.run(ask(set()))
    ends = {ids[20], ids[30]}
    assert asyncio.run(ask(ends)) == ids[: 1 + min(map(ids.index, ends))]


def test_a_canceled_answer_is_no_longer_decoded() -> None:
    model = model_with()
    endless = sampling(end_of_document=-1, max_new_tokens=10**9)

    async def ask() -> None:
        decoder = Decoder(model, endless)
        engine = Engine(decoder)
        tasks = [asyncio.create_task(answer(engine, [5, 6], endless)) for _ in range(3)]
        assert await answer(engine, [7], endless, stop_after=5)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        ids = await answer(engine, [8], dataclasses.replace(endless, max_new_tokens=20))
        assert len(ids) == 20 and decoder.next_tokens() == {}

    asyncio.run(ask())


def test_a_failure_of_the_decoder_ends_all_answers_with_an_error() -> None:
    model = model_with()
    endless = sampling(end_of_document=-1, max_new_tokens=10**9)

    async def ask() -> None:
        engine = Engine(Decoder(model, endless))
        tasks = [asyncio.create_task(answer(engine, [5, 6], endless)) for _ in range(3)]
        await asyncio.sleep(0.05)
        tasks.append(asyncio.create_task(answer(engine, [10**9], endless)))  # no such token
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, RuntimeError) for result in results) and engine.error is not None
        with pytest.raises(RuntimeError, match="decoding has failed"):
            await answer(engine, [5], endless)

    asyncio.run(ask())
