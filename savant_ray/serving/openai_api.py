"""OpenAI's API over HTTP: encodes prompts, has replicas of the model generate tokens, and decodes the answers."""

from __future__ import annotations

import asyncio
import hmac
import re
import secrets
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import orjson
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.util.metrics import Counter, Histogram
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from savant_ray.config import Config
from savant_ray.data.conversations import ConversationError
from savant_ray.data.tokenizer import Tokenizer
from savant_ray.errors import DataError
from savant_ray.inference.answer_text import AnswerText, TurnEnd, conversation_ids, turn_end
from savant_ray.inference.sampling import Sampling
from savant_ray.serving.openai_protocol import (
    ApiError,
    ChatRequest,
    Completion,
    CompletionRequest,
    Request,
    parse_request,
)

MAX_BODY_BYTES = 1 << 20
# Without them, a proxy may keep the events of a stream until it ends; nginx does by default.
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@dataclass(frozen=True)
class ServerSettings:
    """The options of `savant serve`."""

    checkpoint: str  # path or URI that all replicas can read
    name: str = ""  # model name that requests use; "": the name of the run folder
    original: Mapping[str, Mapping[str, Any]] = field(
        default_factory=dict
    )  # settings for a file of the original script
    loops: int | None = None  # None: `model.n_loops` of the run
    raw_weights: bool = False  # weights of the last step instead of their moving average
    max_length: int | None = None  # tokens of prompt and answer; None: `model.max_seq_len` of the run
    replicas: tuple[int, int] = (1, 1)  # smallest and largest number
    max_batch: int = 16  # answers that a replica decodes together
    max_queue: int = 64  # requests that wait for a place in a batch
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None  # None: SAVANT_API_KEY of the environment


class Api:
    """Answers HTTP requests with the tokens that `model`, the handle of a Serve deployment, generates."""

    def __init__(self, model: Any, tokenizer: Tokenizer, config: Config, settings: ServerSettings) -> None:
        self._replicas = model.options(method_name="tokens", stream=True)
        self._tokenizer, self._name, self._api_key = tokenizer, settings.name, settings.api_key
        # Limited here, because a burst of requests can exceed Ray Serve's own limit.
        self._n_answers, self._max_answers = 0, settings.replicas[1] * settings.max_batch + settings.max_queue
        self._max_length = settings.max_length or config.model.max_seq_len
        limit, temperature = config.validation.max_new_tokens, config.validation.temperature
        self._sampling = Sampling.for_tokenizer(tokenizer, limit, temperature)
        self._turn_end, self._created = turn_end(tokenizer), int(time.time())
        boundaries = [0.01, 0.03, 0.1, 0.3, 1, 3, 10]  # seconds
        self._first_token = Histogram("savant_serve_first_token_seconds", "Time to the first token.", boundaries)
        self._n_tokens = Counter("savant_serve_tokens", "Tokens of prompts and answers.", ("kind",))

    def asgi(self) -> Starlette:
        """Return the ASGI application."""
        routes = [
            Route("/health", self._health),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/v1/completions", partial(self._complete, CompletionRequest), methods=["POST"]),
            Route("/v1/chat/completions", partial(self._complete, ChatRequest), methods=["POST"]),
        ]
        errors = (ApiError, HTTPException, ClientDisconnect, Exception)
        return Starlette(routes=routes, exception_handlers=dict.fromkeys(errors, _error_response))

    async def _health(self, _: HttpRequest) -> Response:
        application = (await asyncio.to_thread(serve.status)).applications[self._replicas.app_name]
        replicas: dict[Any, int] = dict(application.deployments[self._replicas.deployment_name].replica_states)
        return JSONResponse({"replicas": replicas}, 200 if replicas.get("RUNNING") else 503)

    async def _models(self, http: HttpRequest) -> Response:
        self._check_key(http)
        return JSONResponse({"object": "list", "data": [self._description()]})

    async def _model(self, http: HttpRequest) -> Response:
        self._check_key(http)
        self._check_name(http.path_params["name"])
        return JSONResponse(self._description())

    def _description(self) -> dict[str, Any]:
        return {"id": self._name, "object": "model", "created": self._created, "owned_by": "savant_ray"}

    async def _complete(self, kind: type[Request], http: HttpRequest) -> Response:
        self._check_key(http)
        request = parse_request(kind, await _body(http))
        if request.model is not None:
            self._check_name(request.model)
        prompt = self._prompt_ids(request)
        is_chat = kind is ChatRequest
        end = self._turn_end if is_chat else TurnEnd()
        ends = end._replace(texts=(*end.texts, *(request.stop or ())))
        answer = AnswerText(self._tokenizer, prompt, ends, strips=is_chat)
        limit = min(request.max_tokens or self._sampling.max_new_tokens, self._max_length - len(prompt))
        options = request.model_dump(include={"temperature", "seed"}, exclude_none=True)
        sampling = replace(self._sampling, max_new_tokens=limit, **{"seed": secrets.randbits(63), **options})
        completion = Completion(request, self._name, len(prompt), limit, answer)
        parts = self._parts(answer, prompt, sampling, end.tokens)
        # An error before the first part sets the HTTP status; a later one is sent as an event of the stream.
        text = await _cancel_on_disconnect(http, anext(parts) if request.stream else _joined(parts))
        if not request.stream:
            return JSONResponse({**completion.body(text), "usage": completion.usage()})
        include_usage = bool(request.stream_options and request.stream_options.include_usage)
        events = _events(completion, text, parts, include_usage)
        return StreamingResponse(events, headers=STREAM_HEADERS, media_type="text/event-stream")

    def _check_name(self, name: str) -> None:
        if name != self._name:
            reason = f"the model {name!r} is not served; {self._name!r} is"
            raise ApiError(404, reason, "model_not_found", "model")

    def _check_key(self, http: HttpRequest) -> None:
        if self._api_key is None:
            return
        key = re.sub(r"^bearer +", "", http.headers.get("authorization", ""), flags=re.IGNORECASE)
        # Starlette decodes headers as Latin-1, so encoding restores the bytes that the client has sent. In a key from the
        # command line or the environment, surrogates stand for bytes that are not UTF-8.
        if not hmac.compare_digest(key.encode("latin-1"), self._api_key.encode(errors="surrogateescape")):
            raise ApiError(401, "the API key is missing or wrong", "invalid_api_key")

    def _prompt_ids(self, request: Request) -> list[int]:
        """Return the ids of the prompt.

        Raises:
            ApiError: it cannot be encoded, has no tokens, or is too long.
        """
        param = "messages" if isinstance(request, ChatRequest) else "prompt"
        try:
            if isinstance(request, ChatRequest):
                ids = conversation_ids(self._tokenizer, request.messages)
            elif isinstance(request.prompt, str):
                (ids,) = self._tokenizer.encode_prompts([request.prompt])
            else:
                ids = request.prompt
        except (ConversationError, DataError) as error:
            raise ApiError(400, str(error), "invalid_value", param) from None
        if not ids or max(ids) >= self._sampling.vocab_size:
            reason = "has an id that is not in the vocabulary" if ids else "has no tokens"
            raise ApiError(400, f"the prompt {reason}", "invalid_value", param)
        n_new = request.max_tokens or 1
        if len(ids) + n_new > self._max_length:
            reason = f"has {len(ids)} tokens: with {n_new} new ones that exceeds the limit of {self._max_length}"
            raise ApiError(400, f"the prompt {reason}", "context_length_exceeded", param)
        return ids

    async def _parts(
        self, answer: AnswerText, prompt: list[int], sampling: Sampling, end: frozenset[int]
    ) -> AsyncIterator[str]:
        """Yield the text of an answer as its tokens arrive.

        Raises:
            ApiError: too many requests are waiting, or the replica has failed.
        """
        if self._n_answers == self._max_answers:
            raise ApiError(429, "too many requests are waiting; try again later", "rate_limit_exceeded")
        start, is_last = time.perf_counter(), False
        generated = self._replicas.remote(prompt, sampling, end)
        self._n_answers += 1
        self._n_tokens.inc(len(prompt), {"kind": "prompt"})
        try:
            async for new_tokens in generated:
                if not answer.n_tokens:
                    self._first_token.observe(time.perf_counter() - start)
                text, is_last = answer.push(new_tokens), new_tokens.is_last
                yield text
                if answer.is_stopped:
                    break
        except (RayError, RayServeException) as error:
            reason = f"the replica that generated the answer failed ({type(error).__name__}); send the request again"
            raise ApiError(503, reason, "replica_failed") from error
        finally:
            self._n_answers -= 1
            if answer.n_tokens:
                self._n_tokens.inc(answer.n_tokens, {"kind": "answer"})
            if not is_last:
                with suppress(RayError, RayServeException):  # the replica has failed
                    generated.cancel()


async def _body(http: HttpRequest) -> bytes:
    """Return the body of a request.

    Raises:
        ApiError: it is too large; Starlette's own limit, `max_body_size`, would send no error object.
    """
    body = b""
    async for chunk in http.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(413, f"the body has more than {MAX_BODY_BYTES:,} bytes", "request_too_large")
    return body


async def _joined(parts: AsyncIterator[str]) -> str:
    return "".join([text async for text in parts])


async def _cancel_on_disconnect(http: HttpRequest, text: Awaitable[str]) -> str:
    """Return the text; cancel its generation if the client disconnects first."""
    generation, disconnect = asyncio.ensure_future(text), asyncio.ensure_future(http.receive())
    await asyncio.wait((generation, disconnect), return_when=asyncio.FIRST_COMPLETED)
    if not generation.done():
        generation.cancel()
        raise ClientDisconnect
    disconnect.cancel()
    return generation.result()


async def _events(
    completion: Completion, first: str, parts: AsyncIterator[str], include_usage: bool
) -> AsyncIterator[bytes]:
    """Yield the server-sent events of a streamed answer."""
    usage = {"usage": None} if include_usage else {}
    try:
        yield _event({**completion.body(first, is_last=False), **usage})
        async for text in parts:
            if text:
                yield _event({**completion.body(text, is_last=False), **usage})
        yield _event({**completion.body(""), **usage})
        if include_usage:
            yield _event({**completion.head, "choices": [], "usage": completion.usage()})
        yield b"data: [DONE]\n\n"
    except ApiError as error:
        yield _event(error.body)


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(content) + b"\n\n"


def _error_response(http: HttpRequest, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # nobody receives it
    if isinstance(error, HTTPException):  # no such route, or another method
        error = ApiError(error.status_code, f"{http.method} {http.url.path}: {error.detail}", "unknown_url")
    if not isinstance(error, ApiError):
        traceback.print_exception(error)
        error = ApiError(500, f"internal error: {type(error).__name__}", "internal_error")
    return JSONResponse(error.body, error.status, {"Retry-After": "1"} if error.status in (429, 503) else None)
