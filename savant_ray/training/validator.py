"""What happens every `validation.every_steps` steps: the loss on held-out text, and an answer to the logic prompt."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import TypeVar

import torch

from savant_ray.config import Config
from savant_ray.data.tokenizer import Tokenizer
from savant_ray.events import Event, SampleGenerated, ValidationDone
from savant_ray.inference.generate import Sampling, generate
from savant_ray.inference.validation import bits_per_byte, loss_sums
from savant_ray.training.precision import autocast
from savant_ray.training.ranks import add_up, any_rank
from savant_ray.training.seeds import derived_seed
from savant_ray.training.state import TrainingState
from savant_ray.training.step import MicroBatch

Item = TypeVar("Item")


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

    def __call__(self, state: TrainingState) -> bool:
        """Collective: all ranks add up their losses, rank 0 generates; what a stop cuts short is not emitted.

        Returns whether some rank was asked to stop.
        """
        with _evaluating(state):
            self._validate(state)
            if self.rank == 0 and not self.stop_requested():
                self._sample(state)
        return any_rank(self.stop_requested(), state.device)

    def _validate(self, state: TrainingState) -> None:
        started = time.perf_counter()
        batches = [(batch.tokens_BT, batch.document_ids_BT) for batch in self.micro_batches]
        sums = loss_sums(state.model, self._unless_stopped(batches))
        stopped = torch.tensor([float(self.stop_requested())], dtype=sums.dtype)
        loss, tokens, stops = add_up(torch.cat([sums, stopped]).to(state.device)).tolist()
        if self.rank == 0 and not stops:
            self._tell(state, loss / tokens, time.perf_counter() - started)

    def _tell(self, state: TrainingState, loss: float, seconds: float) -> None:
        self.emit(
            ValidationDone(
                step=state.step,
                validation_loss=loss,
                bits_per_byte=bits_per_byte(loss, self.target_tokens, self.text_bytes),
                weights_moved=state.weights_moved(),
                seconds=seconds,
            )
        )

    def _sample(self, state: TrainingState) -> None:
        started = time.perf_counter()
        settings = self.config.validation
        sampling = Sampling(
            vocab_size=self.tokenizer.vocab_size,
            end_of_document=self.tokenizer.end_of_document,
            never_sampled=self.tokenizer.never_sampled,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=derived_seed(self.config.run.seed, state.step, "sample"),
        )
        tokens = list(self._unless_stopped(generate(state.model, self.tokenizer.encode(settings.prompt), sampling)))
        if self.stop_requested():
            return
        self.emit(
            SampleGenerated(
                step=state.step,
                prompt=settings.prompt,
                text=self.tokenizer.decode(tokens),
                seconds=time.perf_counter() - started,
            )
        )

    def _unless_stopped(self, items: Iterable[Item]) -> Iterator[Item]:
        return takewhile(lambda _: not self.stop_requested(), items)


@contextmanager
def _evaluating(state: TrainingState) -> Iterator[None]:
    """Forward passes as in training, but uncompiled: a graph without gradients would be compiled for a few batches."""
    with torch.compiler.set_stance("force_eager"), autocast(state.precision, state.device):
        yield
