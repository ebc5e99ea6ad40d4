"""What happens every `validation.every_steps` steps: the loss on held-out text, logic problems, an answer to a prompt."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TypeVar

import torch
from torch import Tensor

from savant_ray.config import Config
from savant_ray.data.tokenizer import Tokenizer
from savant_ray.evaluation.logic_evaluator import Examiner
from savant_ray.evaluation.loop_statistics import LoopStatistics, loop_statistics
from savant_ray.evaluation.loss import bits_per_byte, loss_sums
from savant_ray.events import Event, LogicScored, Notice, SampleGenerated, ValidationDone
from savant_ray.inference.generate import Sampling, generate
from savant_ray.training.device import autocast, none_on_oom, retry_on_oom, skip_on_oom, uncompiled
from savant_ray.training.host_copies import WeightChanges
from savant_ray.training.seeds import derived_seed
from savant_ray.training.state import TrainingState
from savant_ray.training.step import MicroBatch, all_reduce_sum, any_rank

Item = TypeVar("Item")
ROWS_OF_DEPTH = 2  # sequences that show what the loops do
COLLAPSE = (
    "WARNING: step {step:,}: after the last loop all tokens are nearly alike (mean cosine {cosine:.2f}), so the loops "
    "may have collapsed; lower training.learning_rate or model.n_loops"
)


@dataclass
class Validator:
    """Called with the state by every rank; `emit` is used by rank 0 only."""

    config: Config
    tokenizer: Tokenizer
    micro_batches: list[MicroBatch]  # this rank's share of the validation sequences, the same every time
    target_tokens: int  # of the whole validation text
    text_bytes: int  # of the whole validation text, UTF-8
    rank: int
    emit: Callable[[Event], None]
    stop_requested: Callable[[], bool]
    examiner: Examiner | None = None
    rows: int = 0  # sequences of a forward pass at most; 0 = as they come
    weight_changes: WeightChanges = field(default_factory=WeightChanges)

    def __call__(self, state: TrainingState) -> bool:
        """Collective: all ranks add up losses and right answers, rank 0 goes on with the prompt.

        What a stop cuts short is not emitted.

        Returns whether some rank was asked to stop.
        """
        with _evaluating(state):
            self._validate(state)
            scored = None if self.examiner is None else self.examiner(state)
            if self.rank == 0 and scored is not None:
                self.emit(scored)
            if self.rank == 0 and not self.stop_requested():
                self._sample(state, scored)
        return any_rank(self.stop_requested(), state.device)

    def _validate(self, state: TrainingState) -> None:
        started = time.perf_counter()
        sums = self._loss_sums(state)
        stopped = torch.tensor([float(self.stop_requested())], dtype=sums.dtype)
        loss, tokens, stops = all_reduce_sum(torch.cat([sums, stopped]).to(state.device)).tolist()
        if self.rank == 0 and not stops:
            self._tell(state, loss / tokens, time.perf_counter() - started)

    def _loss_sums(self, state: TrainingState) -> Tensor:
        """Sums over this rank's sequences, fewer at once if they do not fit; training's micro-batches stay as they are.

        Raises:
            DeviceMemoryError: one sequence does not fit.
        """
        while True:
            rows = self.rows or self.config.training.batch_size
            sums_at_once = functools.partial(self._loss_sums_at_once, state, rows)
            if rows == 1:
                return retry_on_oom(sums_at_once, state.device, f"the validation after step {state.step:,}")
            sums = none_on_oom(sums_at_once, state.device)
            if sums is not None:
                return sums
            self.rows = (rows + 1) // 2
            self.emit(
                Notice(
                    text="validation did not fit into memory: from here on its sequences go through at most "
                    f"{self.rows} at once"
                )
            )

    def _loss_sums_at_once(self, state: TrainingState, rows: int) -> Tensor:
        parts = (part.to(state.device) for batch in self.micro_batches for part in batch.parts(rows))
        batches = self._unless_stopped((part.tokens_BT, part.document_ids_BT) for part in parts)
        return loss_sums(state.model, batches)

    def _tell(self, state: TrainingState, loss: float, seconds: float) -> None:
        depth = self._unless_oom(state, "loop statistics", functools.partial(self._depth, state))
        depth = depth or LoopStatistics((), ())
        if depth.has_collapsed:
            self.emit(Notice(text=COLLAPSE.format(step=state.step, cosine=depth.cosines[-1])))
        self.emit(
            ValidationDone(
                step=state.step,
                validation_loss=loss,
                bits_per_byte=bits_per_byte(loss, self.target_tokens, self.text_bytes),
                weights_moved=self._weights_moved(state),
                seconds=seconds,
                residuals=depth.residuals,
                cosines=depth.cosines,
            )
        )

    def remember_weights(self, state: TrainingState) -> None:
        """Copy the weights that the next validation compares with; a notice if there is no memory for it."""
        self._weights_moved(state)

    def _weights_moved(self, state: TrainingState) -> float | None:
        return self._unless_oom(state, "comparing weights", functools.partial(self.weight_changes.measure, state))

    def _depth(self, state: TrainingState) -> LoopStatistics:
        """Of a few sequences; empty where this rank has none, as there are more workers than held-out sequences."""
        for batch in self.micro_batches:
            rows = next(batch.parts(ROWS_OF_DEPTH)).to(state.device)
            return loop_statistics(state.model, rows.tokens_BT, rows.document_ids_BT)
        return LoopStatistics((), ())

    def _sample(self, state: TrainingState, scored: LogicScored | None) -> None:
        started = time.perf_counter()
        settings = self.config.validation
        seed = derived_seed(self.config.run.seed, state.step, "sample")
        sampling = Sampling.of(self.tokenizer, settings.max_new_tokens, settings.temperature, seed)
        (prompt,) = self.tokenizer.encode_prompts([settings.prompt])
        if not prompt:
            self.emit(Notice(text="validation.prompt has no tokens in this tokenizer, so there is no answer to it"))
            return
        answer = self._unless_stopped(generate(state.model, prompt, sampling))
        tokens = self._unless_oom(state, "the answer to the prompt", lambda: list(answer))
        if tokens is None or self.stop_requested():
            return
        self.emit(
            SampleGenerated(
                step=state.step,
                prompt=settings.prompt,
                text=self.tokenizer.decode(tokens),
                seconds=time.perf_counter() - started,
                logic_score=None if scored is None else scored.score,
            )
        )

    def _unless_oom(self, state: TrainingState, work: str, act: Callable[[], Item]) -> Item | None:
        return skip_on_oom(act, state.device, f"step {state.step:,}: {work}", lambda text: self.emit(Notice(text=text)))

    def _unless_stopped(self, items: Iterable[Item]) -> Iterator[Item]:
        return takewhile(lambda _: not self.stop_requested(), items)


@contextmanager
def _evaluating(state: TrainingState) -> Iterator[None]:
    """Forward passes as in training, but uncompiled: a graph without gradients would be compiled for a few batches."""
    with uncompiled(state.model), autocast(state.precision, state.device):
        yield
