"""The deployment that answers HTTP requests in the form of OpenAI's API, and hands them to the replicas of the model."""

from __future__ import annotations

import asyncio
import hmac
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import orjson
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from savant_ray.serving.protocol import ApiError, ChatRequest, CompletionRequest, Request, parsed

MAX_BODY_BYTES = 1 << 20
RETRY_SECONDS = 1
ROUTES = {"/health": "GET", "/v1/models": "GET", "/v1/completions": "POST", "/v1/chat/completions": "POST"}


class Api:
    """A replica.

    Args:
        model: the handle of the deployment of `ModelServer`.
        app: name of the Serve application.
        name: name of the model in requests and responses.
        api_key: the key that requests must have; None: they need none.
    """

    def __init__(self, model: Any, app: str, name: str, api_key: str | None = None) -> None:
        self._model = model.options(method_name="answer", stream=True)
        self._app, self._name, self._api_key, self._start = app, name, api_key, int(time.time())

    async def __call__(self, request: HttpRequest) -> Response:
        """Answer an HTTP request."""
        path = request.url.path
        try:
            if path not in ROUTES or request.method != ROUTES[path]:
                status, reason = (
                    (405, f"{path} is not for {request.method}") if path in ROUTES else (404, f"no such path: {path}")
                )
                raise ApiError(status, reason, "unknown_url")
            if path == "/health":
                return await self._health()
            key = request.headers.get("authorization", "").removeprefix("Bearer ")
            if self._api_key is not None and not hmac.compare_digest(key.encode(), self._api_key.encode()):
                raise ApiError(401, "the API key is missing or wrong", "invalid_api_key")
            if path == "/v1/models":
                model = {"id": self._name, "object": "model", "created": self._start, "owned_by": "savant_ray"}
                return JSONResponse({"object": "list", "data": [model]})
            body = await request.body()
            if len(body) > MAX_BODY_BYTES:
                raise ApiError(413, f"the body has more than {MAX_BODY_BYTES:,} bytes", "request_too_large")
            return await self._answer(parsed(ChatRequest if "chat" in path else CompletionRequest, body))
        except ApiError as error:
            headers = {"Retry-After": str(RETRY_SECONDS)} if error.status in (429, 503) else None
            return JSONResponse(error.body, error.status, headers)

    async def _health(self) -> Response:
        deployments = (await asyncio.to_thread(serve.status)).applications[self._app].deployments
        replicas: dict[Any, int] = dict(deployments["model"].replica_states)
        return JSONResponse({"replicas": replicas}, 200 if replicas.get("RUNNING") else 503)

    async def _answer(self, request: Request) -> Response:
        if request.model not in (None, self._name):
            raise ApiError(
                404, f"the model {request.model!r} is not served; {self._name!r} is", "model_not_found", "model"
            )
        kind, prefix = (
            ("chat.completion", "chatcmpl") if isinstance(request, ChatRequest) else ("text_completion", "cmpl")
        )
        if request.stream and isinstance(request, ChatRequest):
            kind += ".chunk"
        head = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": self._name}
        parts = self._parts(request)
        first = await anext(parts)  # before the status of the response is sent
        if request.stream:
            return StreamingResponse(_events(request, head, first, parts), media_type="text/event-stream")
        text = first["text"]
        content = (
            {"message": {"role": "assistant", "content": text}} if isinstance(request, ChatRequest) else {"text": text}
        )
        return JSONResponse({**head, "choices": [_choice(content, first)], "usage": first["usage"]})

    async def _parts(self, request: Request) -> AsyncIterator[dict[str, Any]]:
        """Yield the parts of an answer.

        Raises:
            ApiError: the request is refused, or the replica has failed.
        """
        parts: Any = self._model.remote(request)
        try:
            async for part in parts:
                if "error" in part:
                    raise ApiError(*part["error"])
                yield part
        except (asyncio.CancelledError, GeneratorExit):  # the user has left
            parts.cancel()
            raise
        except BackPressureError:
            raise ApiError(429, "too many requests are waiting; try again later", "rate_limit_exceeded") from None
        except (RayError, RayServeException) as error:
            reason = f"the replica that generated the answer failed ({type(error).__name__}); send the request again"
            raise ApiError(503, reason, "replica_failed") from error


async def _events(
    request: Request, head: dict[str, Any], part: dict[str, Any], parts: AsyncIterator[dict[str, Any]]
) -> AsyncIterator[bytes]:
    """Yield the server-sent events of a streamed answer."""
    include_usage = request.stream_options is not None and request.stream_options.include_usage
    usage = {"usage": None} if include_usage else {}
    content: dict[str, Any] = {"delta": {"role": "assistant", "content": part["text"]}}
    try:
        while True:
            if not isinstance(request, ChatRequest):
                content = {"text": part["text"]}
            yield _event({**head, "choices": [_choice(content, part)], **usage})
            if part["finish_reason"]:
                break
            part = await anext(parts)
            content = {"delta": {"content": part["text"]}}
        if include_usage:
            yield _event({**head, "choices": [], "usage": part["usage"]})
        yield b"data: [DONE]\n\n"
    except ApiError as error:
        yield _event(error.body)


def _choice(content: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """Return the only entry of `choices`."""
    return {"index": 0, **content, "logprobs": None, "finish_reason": part["finish_reason"]}


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(content) + b"\n\n"
