"""The logic suite in a validation: divided over ranks, complete after the last step, interrupted by a stop."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from savant_ray.config import Config
from savant_ray.data.tokenizer import Tokenizer, train_tokenizer
from savant_ray.evaluation import validator as validator_module
from savant_ray.evaluation.logic_suite import BATCH_SIZE, logic_suite
from savant_ray.evaluation.validator import LogicEvaluator
from savant_ray.training.device import DeviceMemoryError
from savant_ray.training.state import TrainingState
from tests.training.tiny import CPU, MODEL, new_state

TOKENIZER = train_tokenizer(iter(["The answer is 0 1 2 3 4 5 6 7 8 9."] * 50), vocab_size=300)


def config(**validation: Any) -> Config:
    settings = {"max_new_tokens": 2, "logic_problems": 18, **validation}
    return Config.from_dict(
        {
            "model": MODEL | {"vocab_size": 300},
            "validation": settings,
            "training": {"precision": "fp32", "max_steps": 6},
        }
    )


@pytest.fixture
def state() -> TrainingState:
    """Return a model that generates digits, so that some answers are correct."""
    state = new_state(config(), CPU)
    digits = torch.tensor([TOKENIZER.encode(str(digit))[0] for digit in range(10)])
    with torch.no_grad():
        state.model.head.weight[digits] *= 50
    return state


def evaluator(
    rank: int, world_size: int, stopped: bool = False, tokenizer: Tokenizer = TOKENIZER, **settings: Any
) -> LogicEvaluator:
    return LogicEvaluator(config(**settings), tokenizer, rank, world_size, lambda: stopped)


def correct(scored: Any) -> dict[str, int]:
    """Return the number of correct answers of each template."""
    return {name: round(score["score"] * score["n"]) for name, score in scored.templates.items()}


def test_the_answers_of_all_ranks_are_those_of_one_rank(state: TrainingState) -> None:
    alone = evaluator(0, 1)(state)
    of_ranks = [evaluator(rank, 4)(state) for rank in range(4)]
    assert alone is not None and alone.n == 18 and not alone.final and 0 <= alone.low <= alone.score <= alone.high
    for name, n in correct(alone).items():
        assert n == sum(correct(scored)[name] for scored in of_ranks)


def test_after_the_last_step_the_complete_suite_is_scored_with_new_wordings_apart(state: TrainingState) -> None:
    state.step = 6
    scored = evaluator(0, 1)(state)
    assert scored is not None and scored.final and scored.n == 600
    assert sum(score["n"] for score in scored.templates.values()) == len(logic_suite()) == 720
    assert sum(correct(scored).values()) > 0


def test_an_evaluation_that_a_stop_interrupts_has_no_score(state: TrainingState) -> None:
    assert evaluator(0, 1, stopped=True)(state) is None


def test_a_question_that_does_not_fit_into_memory_is_a_failure_of_the_worker(
    state: TrainingState, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(validator_module, "answer_questions", no_room)
    with pytest.raises(DeviceMemoryError, match="the logic problems after step 0 ran out of device memory"):
        evaluator(0, 1)(state)


def test_questions_that_do_not_fit_into_memory_are_answered_in_smaller_batches(
    state: TrainingState, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    answer_questions = validator_module.answer_questions

    def little_room(*arguments: Any, batch_size: int, **options: Any) -> Any:
        sizes.append(batch_size)
        if batch_size > 10:
            raise torch.OutOfMemoryError("no room")
        return answer_questions(*arguments, batch_size=batch_size, **options)

    monkeypatch.setattr(validator_module, "answer_questions", little_room)
    of_one_rank = evaluator(0, 1)
    scored = of_one_rank(state)
    assert (
        scored is not None and scored.n == 18 and sizes == [64, 32, 16, 8] and of_one_rank.batch_size == 8 < BATCH_SIZE
    )
