"""Periodic evaluation, every `validation.every_steps` steps: loss on held-out text, logic problems, a sample."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from savant_ray.config import Config
from savant_ray.data.order import GlobalOrder, rank_slice
from savant_ray.data.token_cache import TokenCache
from savant_ray.data.tokenizer import Tokenizer
from savant_ray.evaluation.held_out_loss import bits_per_byte, loss_sums
from savant_ray.evaluation.logic_suite import (
    BATCH_SIZE,
    GPU_BATCH_SIZE,
    Answer,
    Question,
    Score,
    answer_questions,
    logic_suite,
    total,
)
from savant_ray.evaluation.loop_statistics import LoopStatistics, loop_statistics
from savant_ray.events import Event, LogicScored, Notice, SampleGenerated, ValidationDone
from savant_ray.inference.generate import generate
from savant_ray.inference.sampling import Sampling
from savant_ray.training.device import autocast, none_on_oom, retry_on_oom, runs_compiled, skip_on_oom
from savant_ray.training.host_copies import WeightChanges
from savant_ray.training.reduction import all_reduce_sum, any_rank
from savant_ray.training.seeds import derived_seed
from savant_ray.training.state import TrainingState
from savant_ray.training.step import MicroBatch, micro_batches

Item = TypeVar("Item")
SEQUENCE_SEED = 0  # not `run.seed`, so that runs with different seeds are compared on the same sequences
STATISTICS_ROWS = 2  # sequences for the loop statistics
COLLAPSE = (
    "WARNING: step {step:,}: after the last loop all tokens are nearly alike (mean cosine {cosine:.2f}), so the loops "
    "may have collapsed; lower training.learning_rate or model.n_loops"
)


@dataclass
class Validator:
    """Evaluates the current state; every rank has one and calls it. Rank 0 emits the results; any rank emits notices."""

    config: Config
    tokenizer: Tokenizer
    micro_batches: list[MicroBatch]  # this rank's validation sequences, the same every time, in host memory
    target_tokens: int  # of the complete validation text
    trained_bytes: int  # of the complete validation text without what is masked, UTF-8
    rank: int
    emit: Callable[[Event], None]
    stop_requested: Callable[[], bool]
    logic_evaluator: LogicEvaluator | None = None
    step_sequences: int | None = None  # of this rank in a training step; None: it has at least one full micro-batch
    max_rows: int | None = None  # sequences that fit into a forward pass; None: no limit is known
    weight_changes: WeightChanges = field(default_factory=WeightChanges)

    @classmethod
    def from_cache(
        cls,
        folder: str | Path,
        config: Config,
        tokenizer: Tokenizer,
        rank: int,
        world_size: int,
        emit: Callable[[Event], None],
        stop_requested: Callable[[], bool],
    ) -> Self:
        """Return a validator with this rank's slice of `validation.batches` batches from the token cache in `folder`.

        The sequences are drawn from the complete text, because packing puts the longest documents first. They are the
        same for every run on that text.

        Raises:
            DataError: there is no readable token cache.
        """
        cache = TokenCache.open(str(folder))
        n_sequences = min(config.validation.batches * config.training.batch_size, cache.n_sequences)
        _, rows = GlobalOrder([cache.n_sequences], [1.0], SEQUENCE_SEED).locate(np.arange(n_sequences))
        # Whole micro-batches, so that the loss has the same bits on any number of ranks.
        local_slice = rank_slice(n_sequences, rank, world_size, config.training.batch_size)
        rows = rows[np.asarray(local_slice, dtype=np.int64)]
        with_logic = config.validation.logic_problems > 0
        return cls(
            config=config,
            tokenizer=tokenizer,
            micro_batches=micro_batches(cache.take(rows), rows, config),
            target_tokens=cache.manifest.target_tokens,
            trained_bytes=cache.manifest.trained_bytes,
            rank=rank,
            emit=emit,
            stop_requested=stop_requested,
            step_sequences=len(rank_slice(config.training.effective_batch, rank, world_size)),
            logic_evaluator=LogicEvaluator(config, tokenizer, rank, world_size, stop_requested) if with_logic else None,
        )

    def __call__(self, state: TrainingState) -> bool:
        """Evaluate the state and return whether a stop was requested on some rank. Collective.

        With `training.ema_decay` the averaged weights are evaluated. Losses and correct answers are summed over all ranks;
        rank 0 generates the sample. A part that a stop request interrupts emits nothing.

        Raises:
            DeviceMemoryError: the device has no memory for one sequence or one question.
        """
        weights_moved = self._weights_moved(state) if self.rank == 0 else None
        # In the precision of training, with detached gradients, as `loop_states` requires.
        with state.averaged_weights(), state.gradients.detached(), autocast(state.settings.precision, state.device):
            self._validate(state, weights_moved)
            logic = None if self.logic_evaluator is None else self.logic_evaluator(state)
            if self.rank == 0 and logic is not None:
                self.emit(logic)
            if self.rank == 0 and not self.stop_requested():
                self._sample(state, logic)
        return any_rank(self.stop_requested(), state.device)

    def remember_weights(self, state: TrainingState) -> None:
        """Copy the weights that the next validation compares with; emit a notice if there is no memory for it."""
        self._weights_moved(state)

    def _validate(self, state: TrainingState, weights_moved: float | None) -> None:
        started = time.perf_counter()
        sums = self._loss_sums(state)
        stopped = torch.tensor([float(self.stop_requested())], dtype=sums.dtype)
        loss, tokens, stops = all_reduce_sum(torch.cat([sums, stopped]).to(state.device)).tolist()
        if self.rank == 0 and not stops:
            mean_loss = loss / tokens if tokens else math.nan  # all tokens of these sequences may be masked
            self._emit_validation(state, mean_loss, weights_moved, time.perf_counter() - started)

    def _loss_sums(self, state: TrainingState) -> Tensor:
        """Return the sums over this rank's sequences; while a forward pass does not fit into memory, halve its size.

        This does not change the micro-batches of training.

        Raises:
            DeviceMemoryError: one sequence does not fit.
        """
        while True:
            rows = self._rows(state)
            sum_losses = functools.partial(self._loss_sums_in_parts, rows, state)
            if rows == 1:
                return retry_on_oom(sum_losses, state.device, f"the validation after step {state.step:,}")
            sums = none_on_oom(sum_losses, state.device)
            if sums is not None:
                return sums
            self.max_rows = (rows + 1) // 2
            limit = f"at most {self.max_rows} sequences per forward pass"
            self.emit(Notice(text=f"validation did not fit into memory: from now on {limit}"))

    def _loss_sums_in_parts(self, rows: int, state: TrainingState) -> Tensor:
        """Return the sums over this rank's sequences, with at most `rows` sequences in a forward pass."""
        parts = (self._on_device(part, state) for batch in self.micro_batches for part in batch.parts(rows))
        return loss_sums(
            state.model,
            self._until_stopped(parts),
            memory_limit_gb=state.batch_fit.limit_gb,
            training_graph=runs_compiled(state.model, state.device),
        )

    def _rows(self, state: TrainingState) -> int:
        """Return the number of sequences of a forward pass.

        A compiled model gets as many as in a training step if they fit, so that it is not compiled for another shape. With
        `training.deterministic` that is a whole micro-batch on any number of ranks.
        """
        rows = self.config.training.batch_size
        if runs_compiled(state.model, state.device):
            rows = min(state.batch_fit.rows, rows if state.settings.deterministic else self.step_sequences or rows)
        return min(rows, self.max_rows or rows)

    def _on_device(self, part: MicroBatch, state: TrainingState) -> MicroBatch:
        """Return the sequences on the state's device; for a compiled model with rows of padding up to `_rows`."""
        n_missing = self._rows(state) - len(part.tokens_BT) if runs_compiled(state.model, state.device) else 0
        padded = replace(
            part,
            tokens_BT=F.pad(part.tokens_BT, (0, 0, 0, n_missing)),
            document_ids_BT=F.pad(part.document_ids_BT, (0, 0, 0, n_missing), value=-1),
            is_trained_BT=F.pad(part.is_trained_BT, (0, 0, 0, n_missing), value=True),
        )
        return padded.to(state.device)

    def _emit_validation(self, state: TrainingState, loss: float, weights_moved: float | None, seconds: float) -> None:
        statistics = self._skip_on_oom(state, "loop statistics", functools.partial(self._loop_statistics, state))
        statistics = statistics or LoopStatistics((), ())
        if statistics.has_collapsed:
            self.emit(Notice(text=COLLAPSE.format(step=state.step, cosine=statistics.cosines[-1])))
        self.emit(
            ValidationDone(
                step=state.step,
                validation_loss=loss,
                bits_per_byte=bits_per_byte(loss, self.target_tokens, self.trained_bytes),
                weights_moved=weights_moved,
                seconds=seconds,
                residuals=statistics.residuals,
                cosines=statistics.cosines,
            )
        )

    def _weights_moved(self, state: TrainingState) -> float | None:
        return self._skip_on_oom(state, "comparing weights", functools.partial(self.weight_changes.measure, state))

    def _loop_statistics(self, state: TrainingState) -> LoopStatistics:
        """Return the statistics over a few sequences; empty if this rank has none (more workers than sequences)."""
        if not self.micro_batches:
            return LoopStatistics((), ())
        part = next(self.micro_batches[0].parts(min(STATISTICS_ROWS, self._rows(state))))
        part = self._on_device(part, state)
        training_graph = runs_compiled(state.model, state.device)
        return loop_statistics(state.model, part.tokens_BT, part.document_ids_BT, training_graph=training_graph)

    def _sample(self, state: TrainingState, logic: LogicScored | None) -> None:
        started = time.perf_counter()
        settings = self.config.validation
        seed = derived_seed(self.config.run.seed, state.step, "sample")
        sampling = Sampling.for_tokenizer(self.tokenizer, settings.max_new_tokens, settings.temperature, seed)
        (prompt,) = self.tokenizer.encode_prompts([settings.prompt])
        if not prompt:
            self.emit(Notice(text="validation.prompt has no tokens in this tokenizer, so no sample is generated"))
            return
        new_tokens = self._until_stopped(generate(state.model, prompt, sampling))
        tokens = self._skip_on_oom(state, "the answer to the prompt", lambda: list(new_tokens))
        if tokens is None or self.stop_requested():
            return
        self.emit(
            SampleGenerated(
                step=state.step,
                prompt=settings.prompt,
                text=self.tokenizer.decode_continuation(prompt, tokens),
                seconds=time.perf_counter() - started,
                logic_score=None if logic is None else logic.score,
            )
        )

    def _skip_on_oom(self, state: TrainingState, work: str, function: Callable[[], Item]) -> Item | None:
        """Return the result of `function`; if the device runs out of memory, emit a notice and return None."""
        work = f"step {state.step:,}: {work}"
        return skip_on_oom(function, state.device, work, lambda text: self.emit(Notice(text=text)))

    def _until_stopped(self, items: Iterable[Item]) -> Iterator[Item]:
        return takewhile(lambda _: not self.stop_requested(), items)


@dataclass
class LogicEvaluator:
    """Scores the state on the logic suite; every rank has one, calls it, and answers its part of the questions."""

    config: Config
    tokenizer: Tokenizer
    rank: int
    world_size: int
    stop_requested: Callable[[], bool]
    batch_size: int = 0  # questions; set by the first call, lowered if a batch does not fit into memory

    def __call__(self, state: TrainingState) -> LogicScored | None:
        """Return the score, the same on every rank, or None if a stop request interrupted the evaluation. Collective.

        The model answers `validation.logic_problems` questions; after the last step, the complete suite. Questions in new
        wordings count in `templates` only, not in the score.

        Raises:
            DeviceMemoryError: one question does not fit.
        """
        started = time.perf_counter()
        final = state.step >= self.config.training.max_steps
        questions = logic_suite()[: None if final else self.config.validation.logic_problems]
        names = sorted({question.template for question in questions})
        answers = self._answer(state, questions[self.rank :: self.world_size])
        correct = [sum(answer.correct for answer in answers if answer.question.template == name) for name in names]
        sums = torch.tensor([*correct, float(self.stop_requested())], device=state.device)
        *correct, stops = all_reduce_sum(sums).tolist()
        if stops:
            return None
        counts = [sum(question.template == name for question in questions) for name in names]
        templates = {name: Score(n, int(k)) for name, n, k in zip(names, counts, correct, strict=True)}
        return _logic_scored(state.step, templates, final, time.perf_counter() - started)

    def _answer(self, state: TrainingState, questions: Sequence[Question]) -> list[Answer]:
        def answer() -> list[Answer]:
            answers = answer_questions(
                state.model,
                self.tokenizer,
                questions,
                self.config.validation.max_new_tokens,
                batch_size=self.batch_size,
                stop_requested=self.stop_requested,
            )
            return list(answers)

        if not self.batch_size:
            self.batch_size = GPU_BATCH_SIZE if state.device.type == "cuda" else BATCH_SIZE
        while self.batch_size > 1:
            if (answers := none_on_oom(answer, state.device)) is not None:
                return answers
            self.batch_size = (self.batch_size + 1) // 2
        return retry_on_oom(answer, state.device, f"the logic problems after step {state.step:,}")


def _logic_scored(step: int, templates: dict[str, Score], final: bool, seconds: float) -> LogicScored:
    score = total(templates)
    low, high = score.interval
    return LogicScored(
        step=step,
        score=score.fraction,
        n=score.n,
        low=low,
        high=high,
        templates={name: {"score": score.fraction, "n": score.n} for name, score in templates.items()},
        final=final,
        seconds=seconds,
    )
