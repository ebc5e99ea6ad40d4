"""Continuous batching: decodes several answers together, in a batch that answers join and leave at any time.

Everything between two tokens happens on the device: the model, the check for non-finite logits and the choice of the next
token. On a GPU this decoding step is captured as a CUDA graph, because launching its several hundred small kernels takes
longer than running them. The host then reads the tokens in groups of `GPU_GROUP`, and answers join and leave between groups.

Shapes: B rows of the batch, T time, V vocabulary, N tokens of a group.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from savant_ray.inference.cuda_graph import StepGraph
from savant_ray.inference.sampling import Sampling, are_finite, logit_bias, sample_tokens, uniform_number
from savant_ray.model.kv_cache import KeyValueCache
from savant_ray.model.transformer import UniversalTransformer

# Maximum number of attention scores per head: prompts that would have more are processed in parts, so that memory does not
# grow with the square of the length.
MAX_PROMPT_SCORES = 1 << 22
GPU_GROUP = 16  # tokens of an answer that are generated before the host reads them
ENDED = -1  # in place of a token after the end of an answer
SAMPLED, GREEDY = True, False  # how the tokens of an answer are chosen


class NewTokens(NamedTuple):
    """The next tokens of an answer, and whether it ends after them."""

    ids: list[int]
    is_last: bool


@dataclass
class _AnswerInProgress:
    """An answer that has not ended."""

    answer_id: int
    sampling: Sampling
    n_cached: int
    n_generated: int = 0


class _Batch:
    """Rows that are decoded together, each for one answer or not in use.

    Attributes:
        answers: the answer of each row, None for a row that is not in use.
        cache: keys and values of the rows.
        temperature_B1: sampling temperature, fp64.
        last_B1: newest token, the input of the next step.
        has_ended_B: whether the answer has ended.
        uniform_BN: random numbers for the tokens of a group.
        group_BN: the tokens of a group.
    """

    TENSORS = ("temperature_B1", "last_B1", "has_ended_B", "uniform_BN", "group_BN")

    def __init__(self, answers: Sequence[_AnswerInProgress], cache: KeyValueCache, group_size: int) -> None:
        self.answers: list[_AnswerInProgress | None] = list(answers)
        self.cache, n_rows, device = cache, len(answers), cache.position_B.device
        temperatures = [[answer.sampling.temperature] for answer in answers]
        self.temperature_B1 = torch.tensor(temperatures, dtype=torch.float64, device=device)
        self.last_B1 = torch.zeros(n_rows, 1, dtype=torch.int64, device=device)
        self.has_ended_B = torch.zeros(n_rows, dtype=torch.bool, device=device)
        self.uniform_BN = torch.zeros(n_rows, group_size, dtype=torch.float64, device=device)
        self.group_BN = torch.zeros(n_rows, group_size, dtype=torch.int64, device=device)

    def in_use(self) -> list[_AnswerInProgress]:
        """Return the answers that have not ended."""
        return [answer for answer in self.answers if answer is not None]

    def modes(self) -> set[bool]:
        """Return how the tokens of the answers are chosen: a set of `SAMPLED`, `GREEDY`, or both."""
        return {answer.sampling.temperature > 0 for answer in self.in_use()}

    def draw_numbers(self, n_tokens: int) -> None:
        """Write the random numbers for the next tokens."""
        numbers = [
            [
                0.0 if answer is None else uniform_number(answer.sampling.seed, answer.n_generated + index)
                for answer in self.answers
            ]
            for index in range(n_tokens)
        ]
        self.uniform_BN[:, :n_tokens] = torch.tensor(numbers, dtype=torch.float64).T

    def take_group(self, n_tokens: int) -> dict[int, NewTokens]:
        """Return the tokens of a group by the id of their answer, and count them in `n_generated`."""
        new_tokens = {}
        for answer, group in zip(self.answers, self.group_BN[:, :n_tokens].tolist(), strict=True):
            if answer is not None:
                limit = answer.sampling.max_new_tokens - answer.n_generated
                ids = [token for token in group if token != ENDED][:limit]
                answer.n_generated += len(ids)
                new_tokens[answer.answer_id] = NewTokens(ids, ENDED in group or len(ids) == limit)
        return new_tokens

    def set_lengths(self) -> None:
        """Pass the row lengths to the cache; 0 for an unused row."""
        self.cache.set_lengths([0 if answer is None else answer.n_cached for answer in self.answers])

    def select(self, rows: Sequence[int]) -> None:
        """Replace the batch by these rows of it; a row may be repeated."""
        index = torch.tensor(rows, device=self.last_B1.device)
        self.answers = [self.answers[row] for row in rows]
        self.cache.select(rows)
        for name in self.TENSORS:
            setattr(self, name, getattr(self, name)[index])

    def replace(self, rows: Sequence[int], other: _Batch) -> bool:
        """Overwrite these rows, in place, by those of another batch; return whether buffers of the cache were replaced."""
        for row, answer in zip(rows, other.answers, strict=True):
            self.answers[row] = answer
        self.set_lengths()
        is_replaced = self.cache.reserve(1)
        self.cache.replace(rows, other.cache)
        index = torch.tensor(rows, device=self.last_B1.device)
        for name in self.TENSORS:
            getattr(self, name)[index] = getattr(other, name)
        return is_replaced


class Decoder:
    """Generates answers to prompts. Answers can be added and removed between any two calls of `next_tokens`.

    The tokens of an answer depend on weights, prompt and sampling parameters only, except for rounding. The weights must not
    change while answers are generated. New answers reuse the rows of answers that have ended; once half of the rows are
    unused, these are removed.

    Args:
        model: the model.
        vocabulary: parameters whose `vocab_size`, `never_sampled` and `end_of_document` apply to all answers; the others are
            not used.
        n_loops: number of loops; None for that of the model.

    Attributes:
        group_size: the largest number of tokens of an answer that `next_tokens` returns.
    """

    @torch.no_grad()
    def __init__(self, model: UniversalTransformer, vocabulary: Sampling, n_loops: int | None = None) -> None:
        self._device = model.head.weight.device
        self._graph = StepGraph(self._device)
        self.group_size = GPU_GROUP if self._graph.captures else 1
        self._model, self._n_loops, self._end_of_document = model, n_loops, vocabulary.end_of_document
        self._weights = model.recurrent_block.prepare_weights()
        self._bias_V = logit_bias(vocabulary, model.config.vocab_size).to(self._device)
        self._column_1 = torch.zeros(1, dtype=torch.int64, device=self._device)  # index of the next token in its group
        self._ids = itertools.count()
        self._batch: _Batch | None = None
        self._modes: set[bool] = set()  # of the batch
        self._first_tokens: dict[int, NewTokens] = {}

    @torch.no_grad()
    def add(self, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling]) -> list[int]:
        """Process prompts and choose the first token of each answer; return the ids of the answers, counted from 0.

        Raises:
            ValueError: a prompt has no tokens.
        """
        if not all(prompts):
            raise ValueError("the prompt has no tokens")
        cache = self._model.new_cache(list(map(len, prompts)), self._n_loops, static_shapes=self._graph.captures)
        answers = [
            _AnswerInProgress(next(self._ids), sampling, len(prompt))
            for prompt, sampling in zip(prompts, samplings, strict=True)
        ]
        new = _Batch(answers, cache, self.group_size)
        logits_BV = self._process_prompts(prompts, cache)
        self._start_group(new, 1)
        self._choose(logits_BV, new, new.modes())
        first_tokens = new.take_group(1)
        self._first_tokens |= first_tokens
        self._join(new)
        self._remove(answer_id for answer_id, tokens in first_tokens.items() if tokens.is_last)
        return [answer.answer_id for answer in answers]

    @torch.no_grad()
    def next_tokens(self) -> dict[int, NewTokens]:
        """Return the next tokens of each answer, by its id; {} if there are no answers.

        After `add` these are the first tokens of the new answers only.
        """
        if self._first_tokens or self._batch is None:
            tokens, self._first_tokens = self._first_tokens, {}
            return tokens
        batch, in_use = self._batch, self._batch.in_use()
        n_tokens = min(self.group_size, max(answer.sampling.max_new_tokens - answer.n_generated for answer in in_use))
        self._start_group(batch, n_tokens)
        if batch.cache.reserve(n_tokens):
            self._graph.invalidate()
        for _ in range(n_tokens):
            self._graph.run(self._step)
            for answer in in_use:
                answer.n_cached += 1
            # The cache's own count is wrong here: a call that captures runs `_step` twice, and a replay runs no Python.
            batch.set_lengths()
        tokens = batch.take_group(n_tokens)
        self._remove(answer_id for answer_id, new in tokens.items() if new.is_last)
        return tokens

    def remove(self, answer_id: int) -> None:
        """End an answer; does nothing if it has ended."""
        self._first_tokens.pop(answer_id, None)
        self._remove([answer_id])

    def close(self) -> None:
        """End all answers and free the memory."""
        self._batch, self._first_tokens = None, {}
        self._graph.release()

    def _process_prompts(self, prompts: Sequence[Sequence[int]], cache: KeyValueCache) -> Tensor:
        """Fill the cache and return the logits after each prompt, `[B, V]`."""
        lengths_B1 = torch.tensor([[len(prompt)] for prompt in prompts], device=self._device)
        longest = max(map(len, prompts))
        prompts_BT = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts])
        first_BT, *parts = prompts_BT.to(self._device).split(max(1, MAX_PROMPT_SCORES // prompts_BT.numel()), dim=1)
        logits_BV = self._decode(first_BT, cache)
        for part_BT in parts:
            has_ended_B1 = lengths_B1 <= cache.length
            logits_BV = torch.where(has_ended_B1, logits_BV, self._decode(part_BT, cache))
        return logits_BV

    def _join(self, new: _Batch) -> None:
        """Put new rows into unused rows of the batch; add rows if there are too few."""
        if self._batch is None:
            self._batch = new
            self._graph.invalidate()
        else:
            answers = self._batch.answers
            free = [row for row, answer in enumerate(answers) if answer is None]
            n_rows, n_missing = len(answers), len(new.answers) - len(free)
            if n_missing > 0:
                free += range(n_rows, n_rows + n_missing)
                self._batch.select([*range(n_rows), *[0] * n_missing])
                self._batch.answers[n_rows:] = [None] * n_missing
                self._graph.invalidate()
            if self._batch.replace(free[: len(new.answers)], new):
                self._graph.invalidate()
        self._update()

    def _remove(self, answer_ids: Iterable[int]) -> None:
        """Stop using the rows of these answers."""
        ended = set(answer_ids)
        if self._batch is None or not ended:
            return
        batch = self._batch
        batch.answers = [None if answer and answer.answer_id in ended else answer for answer in batch.answers]
        rows = [row for row, answer in enumerate(batch.answers) if answer is not None]
        if not rows:
            self._batch = None
        elif 2 * len(rows) <= len(batch.answers):
            batch.select(rows)
            self._graph.invalidate()
        self._update()

    def _update(self) -> None:
        """Set the lengths in the cache, and capture the step again if the set of modes has changed."""
        if self._batch is not None:
            self._batch.set_lengths()
            modes = self._batch.modes()
            if modes != self._modes:
                self._modes = modes
                self._graph.invalidate()

    def _start_group(self, batch: _Batch, n_tokens: int) -> None:
        self._column_1.zero_()
        if SAMPLED in batch.modes():
            batch.draw_numbers(n_tokens)

    def _step(self) -> None:
        if self._batch is not None:
            self._choose(self._decode(self._batch.last_B1, self._batch.cache), self._batch, self._modes)

    def _decode(self, tokens_BT: Tensor, cache: KeyValueCache) -> Tensor:
        """Return logits `[B, V]`; autocast is off if weights and residual stream are bf16.

        On a GPU autocast would compute each norm in fp32 and cast its input and output: eight more kernels in each loop.
        """
        is_bf16 = self._model.head.weight.dtype == torch.bfloat16
        with torch.autocast(tokens_BT.device.type, enabled=False) if is_bf16 else nullcontext():
            return self._model.decode(tokens_BT, cache, self._n_loops, self._weights)

    def _choose(self, logits_BV: Tensor, batch: _Batch, modes: set[bool]) -> None:
        """Choose the next token of each row and write it to the group."""
        logits_BV = logits_BV.float()
        is_finite_B = are_finite(logits_BV)
        logits_BV = logits_BV + self._bias_V
        if SAMPLED in modes:
            token_B = sample_tokens(logits_BV, batch.temperature_B1, batch.uniform_BN.index_select(1, self._column_1))
            if GREEDY in modes:
                token_B = torch.where(batch.temperature_B1[:, 0] > 0, token_B, logits_BV.argmax(dim=-1))
        else:
            token_B = logits_BV.argmax(dim=-1)
        batch.has_ended_B |= ~is_finite_B | (token_B == self._end_of_document)
        token_B1 = token_B[:, None]
        batch.last_B1.copy_(token_B1)
        batch.group_BN.index_copy_(1, self._column_1, token_B1.masked_fill(batch.has_ended_B[:, None], ENDED))
        self._column_1 += 1
