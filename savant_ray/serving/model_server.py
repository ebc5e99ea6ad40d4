"""The deployment that holds a model: decodes the answers of all its users together."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

from ray.serve import metrics

from savant_ray.data.conversations import ConversationError, conversation_prompt
from savant_ray.errors import DataError
from savant_ray.evaluation.from_checkpoint import load_model
from savant_ray.inference.answer_text import AnswerText, TurnEnd, turn_end
from savant_ray.inference.decoder import Decoder
from savant_ray.inference.engine import Engine
from savant_ray.inference.sampling import Sampling
from savant_ray.serving.protocol import ApiError, ChatRequest, Request
from savant_ray.storage.run_storage import local_checkpoint


class ModelServer:
    """A replica.

    Args:
        checkpoint: path or URI, as for `local_checkpoint`.
        settings: those of a file of the original.
        n_loops: number of loops; None for that of the model.
        max_length: largest number of tokens of prompt and answer; None for `model.max_seq_len` of the run.
    """

    def __init__(
        self,
        checkpoint: str,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        n_loops: int | None = None,
        max_length: int | None = None,
    ) -> None:
        with local_checkpoint(checkpoint, settings=settings) as path:
            model, self._tokenizer, config = load_model(path)
        self._turn_end = turn_end(self._tokenizer)
        self._max_length = max_length or config.model.max_seq_len
        validation = config.validation
        self._sampling = Sampling.for_tokenizer(self._tokenizer, validation.max_new_tokens, validation.temperature)
        self._engine = Engine(Decoder(model, self._sampling, n_loops))
        self._n_tokens = metrics.Counter("savant_serve_tokens", "Tokens of prompts and answers.", ("kind",))
        self._first_token = metrics.Histogram(
            "savant_serve_first_token_seconds", "Time to the first token.", [0.01, 0.03, 0.1, 0.3, 1, 3, 10]
        )

    def check_health(self) -> None:
        """Raise an error if decoding has failed, so that Serve replaces the replica."""
        if self._engine.error is not None:
            raise self._engine.error

    async def answer(self, request: Request) -> AsyncIterator[dict[str, Any]]:
        """Yield the answer in parts, of which one that is not streamed has only one; `error` if the request is refused."""
        start = time.perf_counter()
        try:
            prompt = self._prompt_of(request)
            limit = min(request.max_tokens or self._sampling.max_new_tokens, self._max_length - len(prompt))
        except ApiError as error:
            yield {"error": error.args}
            return
        temperature, seed = request.temperature, request.seed
        sampling = replace(
            self._sampling,
            max_new_tokens=limit,
            temperature=self._sampling.temperature if temperature is None else temperature,
            seed=secrets.randbits(63) if seed is None else seed,
        )
        end = self._turn_end if isinstance(request, ChatRequest) else TurnEnd()
        text = AnswerText(self._tokenizer, prompt, end._replace(texts=(*end.texts, *(request.stop or ()))))
        self._n_tokens.inc(len(prompt), {"kind": "prompt"})
        part, n_sent = "", 0
        async for new in self._engine.tokens(prompt, sampling):
            if not n_sent:
                self._first_token.observe(time.perf_counter() - start)
            part += text.push(new)
            is_last = new.is_last or text.is_stopped
            if text.n_tokens > n_sent:
                self._n_tokens.inc(text.n_tokens - n_sent, {"kind": "answer"})
                n_sent = text.n_tokens
            if is_last or (request.stream and part):
                finish_reason = "length" if n_sent == limit and not text.is_stopped else "stop"
                usage = {
                    "prompt_tokens": len(prompt),
                    "completion_tokens": n_sent,
                    "total_tokens": len(prompt) + n_sent,
                }
                yield {"text": part, "finish_reason": finish_reason if is_last else None, "usage": usage}
                part = ""
            if is_last:
                return

    def _prompt_of(self, request: Request) -> list[int]:
        """Return the ids of the prompt.

        Raises:
            ApiError: it cannot be encoded, has no tokens, or is too long.
        """
        param = "messages" if isinstance(request, ChatRequest) else "prompt"
        try:
            if isinstance(request, ChatRequest):
                template = self._tokenizer.chat_template
                messages = [{"role": message.role, "content": message.text} for message in request.messages]
                text = conversation_prompt(messages, template)
                (ids,) = self._tokenizer.encode_prompts([text], special_tokens=template is not None)
            else:
                prompt = request.prompt
                ids = self._tokenizer.encode_prompts([prompt])[0] if isinstance(prompt, str) else prompt
        except (ConversationError, DataError) as error:
            raise ApiError(400, str(error), "invalid_value", param) from None
        if not ids or max(ids) >= self._sampling.vocab_size:
            reason = "has an id that is not in the vocabulary" if ids else "has no tokens"
            raise ApiError(400, f"the prompt {reason}", "invalid_value", param)
        n_new = request.max_tokens or 1
        if len(ids) + n_new > self._max_length:
            message = (
                f"the prompt has {len(ids)} tokens: with {n_new} new ones that exceeds the limit of {self._max_length}"
            )
            raise ApiError(400, message, "context_length_exceeded", param)
        return ids
