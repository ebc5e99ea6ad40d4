"""The logic suite at a validation: each rank answers its share of the problems, and the right ones are added up."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from savant_ray.config import Config
from savant_ray.data.tokenizer import Tokenizer
from savant_ray.evaluation.logic_suite import AT_ONCE, Answer, Question, Score, ask, logic_suite, total
from savant_ray.events import LogicScored
from savant_ray.training.device import none_on_oom, retry_on_oom
from savant_ray.training.state import TrainingState
from savant_ray.training.step import all_reduce_sum


@dataclass
class Examiner:
    """Called with the state by every rank."""

    config: Config
    tokenizer: Tokenizer
    rank: int
    world_size: int
    stop_requested: Callable[[], bool]
    at_once: int = AT_ONCE  # questions; fewer once they did not fit into memory

    def __call__(self, state: TrainingState) -> LogicScored | None:
        """`validation.logic_problems` of the suite, after the last step all of it; None when a stop cut it short.

        Collective; the same on every rank.

        Raises:
            DeviceMemoryError: one question does not fit.
        """
        started = time.perf_counter()
        final = state.step >= self.config.training.max_steps
        questions = logic_suite()[: None if final else self.config.validation.logic_problems]
        names = sorted({question.template for question in questions})
        answers = self._answers(state, questions[self.rank :: self.world_size])
        right = [sum(answer.correct for answer in answers if answer.question.template == name) for name in names]
        sums = torch.tensor([*right, float(self.stop_requested())], device=state.device)
        *right, stops = all_reduce_sum(sums).tolist()
        if stops:
            return None
        asked = [sum(question.template == name for question in questions) for name in names]
        templates = {name: Score(n, int(k)) for name, n, k in zip(names, asked, right, strict=True)}
        return _told(state.step, templates, final, time.perf_counter() - started)

    def _answers(self, state: TrainingState, mine: list[Question]) -> list[Answer]:
        longest = self.config.validation.max_new_tokens

        def asked() -> list[Answer]:
            stop, at_once = self.stop_requested, self.at_once
            return list(ask(state.model, self.tokenizer, mine, longest, at_once=at_once, stop_requested=stop))

        while self.at_once > 1:
            if (answers := none_on_oom(asked, state.device)) is not None:
                return answers
            self.at_once = (self.at_once + 1) // 2
        return retry_on_oom(asked, state.device, f"the logic problems after step {state.step:,}")


def _told(step: int, templates: dict[str, Score], final: bool, seconds: float) -> LogicScored:
    all_ = total(templates)
    low, high = all_.interval
    return LogicScored(
        step=step,
        score=all_.share,
        n=all_.n,
        low=low,
        high=high,
        templates={name: {"score": score.share, "n": score.n} for name, score in templates.items()},
        final=final,
        seconds=seconds,
    )
