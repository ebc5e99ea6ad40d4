"""Autoregressive generation with a key-value cache, for one prompt or for a batch of prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from savant_ray.inference.decoder import Decoder
from savant_ray.inference.sampling import Sampling
from savant_ray.model.transformer import UniversalTransformer


def generate(
    model: UniversalTransformer, prompt: Sequence[int], sampling: Sampling, n_loops: int | None = None
) -> Iterator[int]:
    """Yield new token ids until the end of the document (not yielded) or `max_new_tokens`.

    The ids depend on weights, prompt and sampling parameters only; the weights must not change until the end. On a GPU
    the ids after the first one arrive in groups of `decoder.GPU_GROUP`. Only the keys and values of global loops grow with
    the number of tokens. Generation also ends when the logits are not finite.

    Raises:
        ValueError: the prompt has no tokens.
    """
    for tokens_of_prompts in _groups(model, [prompt], sampling, n_loops):
        yield from tokens_of_prompts[0]


def generate_many(
    model: UniversalTransformer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    n_loops: int | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> list[list[int]]:
    """Return what `generate` yields for each prompt, computed as one batch; equal except for rounding.

    The answers end early when `stop_requested` returns True.

    Raises:
        ValueError: a prompt has no tokens.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    for tokens_of_prompts in _groups(model, prompts, sampling, n_loops):
        if stop_requested():
            break
        for prompt, tokens in tokens_of_prompts.items():
            answers[prompt] += tokens
    return answers


def _groups(
    model: UniversalTransformer, prompts: Sequence[Sequence[int]], sampling: Sampling, n_loops: int | None
) -> Iterator[dict[int, list[int]]]:
    """Yield the next tokens of each prompt that has not ended, by the index of the prompt."""
    if not prompts:
        return
    decoder = Decoder(model, sampling, n_loops)
    try:
        decoder.add(prompts, [sampling] * len(prompts))
        while tokens := decoder.next_tokens():
            yield {prompt: new.ids for prompt, new in tokens.items()}
    finally:
        decoder.close()
