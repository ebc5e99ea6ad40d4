"""Requests, responses and errors of OpenAI's API, as far as they are supported.

A parameter that would change the answer and is not supported is refused, unless its value means no change.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, field_validator

from savant_ray.command_line import MAX_SEED, MIN_SEED


class ApiError(Exception):
    """An error with the HTTP status and the error object of the response."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(status, message, code, param)
        kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
        self.status, self.body = status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(_Model):
    """Options of a streamed response."""

    include_usage: bool = False


class _Request(_Model):
    """Parameters of both kinds of requests; for None the server has a default."""

    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    seed: int | None = Field(default=None, ge=MIN_SEED, le=MAX_SEED)
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=4)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    # Only the values that change nothing:
    n: int | None = Field(default=None, ge=1, le=1)
    top_p: float | None = Field(default=None, ge=1, le=1)
    presence_penalty: float | None = Field(default=None, ge=0, le=0)
    frequency_penalty: float | None = Field(default=None, ge=0, le=0)
    logprobs: Literal[False] | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop


class CompletionRequest(_Request):
    """`POST /v1/completions`; the prompt is a text, a list of one text, or token ids."""

    prompt: str | list[Annotated[int, Field(ge=0)]]
    echo: Literal[False] | None = None
    best_of: int | None = Field(default=None, ge=1, le=1)

    @field_validator("prompt", mode="before")
    @classmethod
    def _only_text(cls, prompt: Any) -> Any:
        return prompt[0] if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str) else prompt


class TextPart(_Model):
    """A part of the content of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(_Model):
    """A message of a conversation."""

    role: str
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Request):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage]
    max_tokens: int | None = Field(
        default=None, ge=1, validation_alias=AliasChoices("max_completion_tokens", "max_tokens")
    )


Request = CompletionRequest | ChatRequest


def parsed(kind: type[Request], body: bytes) -> Request:
    """Return the request in a JSON body.

    Raises:
        ApiError: it is not a valid request.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "the body"
        code = "unknown_parameter" if first["type"] == "extra_forbidden" else "invalid_value"
        raise ApiError(400, f"{where}: {first['msg']}", code, str(first["loc"][0]) if first["loc"] else None) from None
