"""Autoregressive generation with a key-value cache.

Everything between two tokens happens on the device: the model, the check for non-finite logits and the choice of the next
token. On a GPU this decoding step is captured as a CUDA graph, because launching its several hundred small kernels takes
longer than running them, and the host reads the tokens in groups.

Shapes: B prompts, T time, V vocabulary, N tokens of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from savant_ray.inference.cuda_graph import StepGraph
from savant_ray.inference.sampling import Sampling, are_finite, drawn, logit_bias, uniform_number
from savant_ray.model.transformer import UniversalTransformer

# Attention scores per head. Longer prompts are processed in parts, because scores grow with the square of the length.
MAX_PROMPT_SCORES = 1 << 22
GPU_GROUP = 16  # tokens that are generated before the host reads them and checks for a stop request
ENDED = -1  # in place of a token after the end of an answer


def generate(
    model: UniversalTransformer, prompt: Sequence[int], sampling: Sampling, n_loops: int | None = None
) -> Iterator[int]:
    """Yield new token ids until the end of the document (not yielded) or `max_new_tokens`.

    The ids depend on weights, prompt and sampling parameters only; the weights must not change until the end. On a GPU
    the ids arrive in groups of `GPU_GROUP`. Only the memory of global loops grows with the number of tokens. Generation
    also ends when the logits are not finite.

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


@torch.no_grad()
def _groups(
    model: UniversalTransformer, prompts: Sequence[Sequence[int]], sampling: Sampling, n_loops: int | None
) -> Iterator[dict[int, list[int]]]:
    """Yield the next tokens of each prompt that has not ended, by the index of the prompt.

    Once half of the rows of the batch have ended, they are removed from it.
    """
    if not all(prompts):
        raise ValueError("the prompt has no tokens")
    if not prompts:
        return
    decoder = _Decoder(model, prompts, sampling, n_loops)
    prompt_of_row = list(range(len(prompts)))
    remaining = sampling.max_new_tokens
    try:
        while prompt_of_row and remaining > 0:
            rows = decoder.next_tokens(min(remaining, decoder.group_size))
            remaining -= len(rows[0])
            yield {
                prompt: [token for token in row if token != ENDED]
                for prompt, row in zip(prompt_of_row, rows, strict=True)
            }
            running = [index for index, row in enumerate(rows) if row[-1] != ENDED]
            if 2 * len(running) <= len(rows):
                prompt_of_row = [prompt_of_row[index] for index in running]
                decoder.select(running)
    finally:
        graph = decoder.graph
        del decoder  # and with it the buffers
        graph.release()


class _Decoder:
    """Generates the answers to a batch of prompts, in groups of at most `group_size` tokens.

    Attributes:
        graph: the decoding step. It reads weights that are laid out once, when the decoder is created.
    """

    def __init__(
        self, model: UniversalTransformer, prompts: Sequence[Sequence[int]], sampling: Sampling, n_loops: int | None
    ) -> None:
        device = model.head.weight.device
        self.graph = StepGraph(device)
        self.group_size = GPU_GROUP if self.graph.captures else 1
        self._model, self._sampling, self._n_loops, self._n_generated = model, sampling, n_loops, 0
        self._weights = model.recurrent_block.prepare_weights()
        prompts_BT, padding_B = _left_padded(prompts)
        self._prompts_BT: Tensor | None = prompts_BT.to(device)  # None once they are in the cache
        padding_on_device_B = padding_B.to(device) if padding_B.any() else None
        self._cache = model.new_cache(n_loops, padding_on_device_B, static_shapes=self.graph.captures)
        self._bias_V = logit_bias(sampling, model.config.vocab_size).to(device)
        self._temperature = torch.tensor(sampling.temperature, dtype=torch.float64, device=device)
        self._uniform_N = torch.zeros(self.group_size, dtype=torch.float64, device=device)
        self._column_1 = torch.zeros(1, dtype=torch.int64, device=device)  # index of the next token in its group
        self._group_BN = torch.zeros(len(prompts), self.group_size, dtype=torch.int64, device=device)
        self._last_B1 = torch.zeros(len(prompts), 1, dtype=torch.int64, device=device)
        self._has_ended_B = torch.zeros(len(prompts), dtype=torch.bool, device=device)

    def next_tokens(self, n_tokens: int) -> list[list[int]]:
        """Return the next tokens of each row; `ENDED` after the end of its answer."""
        if self._sampling.temperature:
            indices = range(self._n_generated, self._n_generated + n_tokens)
            numbers = [uniform_number(self._sampling.seed, index) for index in indices]
            self._uniform_N[:n_tokens] = torch.tensor(numbers, dtype=torch.float64)
        self._column_1.zero_()
        n_steps = n_tokens
        if self._prompts_BT is not None:
            self._process_prompts(self._prompts_BT)
            self._prompts_BT, n_steps = None, n_tokens - 1
        if self._cache.reserve(n_steps):
            self.graph.invalidate()
        for length in range(self._cache.length, self._cache.length + n_steps):
            self.graph.run(self._step)
            self._cache.length = length + 1  # `_step` counts twice in the call that captures it, never in a replay
        self._n_generated += n_tokens
        return self._group_BN[:, :n_tokens].tolist()

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows of the batch."""
        index = torch.tensor(rows, dtype=torch.int64, device=self._group_BN.device)
        self._cache.select(index)
        self._group_BN, self._last_B1 = self._group_BN[index], self._last_B1[index]
        self._has_ended_B = self._has_ended_B[index]
        self.graph.invalidate()

    def _process_prompts(self, prompts_BT: Tensor) -> None:
        """Fill the cache and choose the first token."""
        self._cache.reserve(prompts_BT.shape[1])
        *parts, last_BT = prompts_BT.split(max(1, MAX_PROMPT_SCORES // prompts_BT.numel()), dim=1)
        for part_BT in parts:
            self._decode(part_BT)
        self._choose(self._decode(last_BT))

    def _step(self) -> None:
        self._choose(self._decode(self._last_B1))

    def _decode(self, tokens_BT: Tensor) -> Tensor:
        """Return logits `[B, V]`; without autocast if weights and residual stream are bf16 anyway.

        On a GPU autocast would compute each norm in fp32 and cast its input and output: eight kernels more in each loop.
        """
        is_bf16 = self._model.head.weight.dtype == torch.bfloat16
        with torch.autocast(tokens_BT.device.type, enabled=False) if is_bf16 else nullcontext():
            return self._model.decode(tokens_BT, self._cache, self._n_loops, self._weights)

    def _choose(self, logits_BV: Tensor) -> None:
        """Choose the next token of each row and write it to the group."""
        logits_BV = logits_BV.float()
        is_finite_B = are_finite(logits_BV)
        logits_BV = logits_BV + self._bias_V
        if self._sampling.temperature == 0:
            token_B = logits_BV.argmax(dim=-1)
        else:
            token_B = drawn(logits_BV, self._temperature, self._uniform_N[self._column_1])
        self._has_ended_B |= ~is_finite_B | (token_B == self._sampling.end_of_document)
        token_B1 = token_B[:, None]
        self._last_B1.copy_(token_B1)
        self._group_BN.index_copy_(1, self._column_1, token_B1.masked_fill(self._has_ended_B[:, None], ENDED))
        self._column_1 += 1


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return tokens `[B, T]`, padded on the left, and the number of padding tokens of each row `[B]`."""
    longest = max(map(len, prompts))
    rows = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    return torch.tensor(rows), torch.tensor([longest - len(prompt) for prompt in prompts])
