"""The supported requests, responses and errors of OpenAI's API.

Other parameters are refused, unless they are null or, such as `n`, have the value that has no effect.
"""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    model_validator,
)

from savant_ray.command_line import MAX_SEED, MIN_SEED
from savant_ray.data.conversations import Message, normalized_messages
from savant_ray.inference.answer_text import AnswerText

Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[Text], BeforeValidator(lambda x: [x] if isinstance(x, str) else x)]  # or a single text


def _single_prompt(prompt: Any) -> Any:
    """Return the only prompt of a request, which may be in a list.

    Raises:
        ValueError: it is neither a text nor a list of token ids, or there are several.
    """
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        (prompt,) = prompt
    is_ids = isinstance(prompt, list) and all(type(item) is int and item >= 0 for item in prompt)
    if isinstance(prompt, str) or is_ids:
        return prompt
    raise ValueError("a request has one prompt: a text or a list of token ids, or a list of one of these")


Prompt = Annotated[str | list[int], BeforeValidator(_single_prompt)]


class ApiError(Exception):
    """An error with the HTTP status and the error object of the response."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(status, message, code, param)
        kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
        self.status, self.body = status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None  # answers are never padded


class _Request(BaseModel):
    """Parameters of both kinds of requests; None means the server's default."""

    model_config = ConfigDict(extra="forbid")
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1, validation_alias=AliasChoices("max_completion_tokens", "max_tokens"))
    temperature: float | None = Field(None, ge=0, le=2)
    seed: int | None = Field(None, ge=MIN_SEED, le=MAX_SEED)
    stop: Texts | None = Field(None, max_length=4)
    stream: bool = False
    stream_options: _StreamOptions | None = None
    user: str | None = None
    # Only values that have no effect are accepted:
    n: int | None = Field(None, ge=1, le=1)
    top_p: float | None = Field(None, ge=1, le=1)
    presence_penalty: float | None = Field(None, ge=0, le=0)
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    logprobs: Annotated[StrictBool, Field(le=False)] | None = None  # 0 would ask for those of a completion's tokens
    logit_bias: dict[str, float] | None = Field(None, max_length=0)
    response_format: dict[Literal["type"], Literal["text"]] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        """Leave out all parameters that are null, also unsupported ones: clients send null for what is not set.

        Both names of `max_tokens` are accepted if they have the same value.
        """
        if not isinstance(body, dict):
            return body
        present = {name: value for name, value in body.items() if value is not None}
        if "max_completion_tokens" in present:
            limit = present["max_completion_tokens"]
            if present.pop("max_tokens", limit) != limit:
                raise ValueError("give max_tokens or max_completion_tokens, not both")
        return present


class CompletionRequest(_Request):
    """`POST /v1/completions`; the prompt is a text, a list of one text, or token ids."""

    prompt: Prompt
    echo: Literal[False] | None = None
    best_of: int | None = Field(None, ge=1, le=1)


class ChatRequest(_Request):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], BeforeValidator(normalized_messages)]


Request = CompletionRequest | ChatRequest


def parse_request(kind: type[Request], body: bytes) -> Request:
    """Return the request in a JSON body.

    Raises:
        ApiError: it is not a valid request.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        path = [str(name) for name in first["loc"]]
        message = f"{'.'.join(path) or 'the body'}: {first['msg'].removeprefix('Value error, ')}"
        code = "unknown_parameter" if first["type"] == "extra_forbidden" else "invalid_value"
        raise ApiError(400, message, code, path[0] if path else None) from None


class Completion:
    """Builds the response to a request, or the chunks of a streamed response.

    `n_prompt` is the number of tokens of the prompt, `limit` the maximum number of tokens of `answer`.
    """

    def __init__(self, request: Request, model: str, n_prompt: int, limit: int, answer: AnswerText) -> None:
        self._request, self._n_prompt, self._limit, self._answer = request, n_prompt, limit, answer
        self._is_chat, self._role = isinstance(request, ChatRequest), {"role": "assistant"}
        prefix, kind = ("chatcmpl", "chat.completion") if self._is_chat else ("cmpl", "text_completion")
        kind += ".chunk" if self._is_chat and request.stream else ""
        self.head = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}

    def body(self, text: str, is_last: bool = True) -> dict[str, Any]:
        """Return a response or a chunk; only the first chunk has the role."""
        message, self._role = {**self._role, "content": text}, {}
        content = {"delta" if self._request.stream else "message": message} if self._is_chat else {"text": text}
        reason = "length" if self._answer.n_tokens == self._limit and not self._answer.is_stopped else "stop"
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": reason if is_last else None}
        return {**self.head, "choices": [choice]}

    def usage(self) -> dict[str, int]:
        """Return the token counts of prompt and answer."""
        n, n_prompt = self._answer.n_tokens, self._n_prompt
        return {"prompt_tokens": n_prompt, "completion_tokens": n, "total_tokens": n_prompt + n}
