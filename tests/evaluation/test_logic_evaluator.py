"""The logic suite at a validation: divided over ranks, complete after the last step, cut short by a stop."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from savant_ray.config import Config
from savant_ray.data.tokenizer import Tokenizer, train_tokenizer
from savant_ray.evaluation import logic_evaluator as examiner
from savant_ray.evaluation.logic_evaluator import Examiner
from savant_ray.evaluation.logic_suite import AT_ONCE, logic_suite
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
    """Answers one digit after the other, so that some answers are right."""
    state = new_state(config(), CPU)
    digits = torch.tensor([TOKENIZER.encode(str(digit))[0] for digit in range(10)])
    with torch.no_grad():
        state.model.head.weight[digits] *= 50
    return state


def of_rank(
    rank: int, world_size: int, stopped: bool = False, tokenizer: Tokenizer = TOKENIZER, **settings: Any
) -> Examiner:
    return Examiner(config(**settings), tokenizer, rank, world_size, lambda: stopped)


def right(examined: Any) -> dict[str, int]:
    return {name: round(each["score"] * each["n"]) for name, each in examined.templates.items()}


def test_the_ranks_answers_together_are_those_of_one(state: TrainingState) -> None:
    alone = of_rank(0, 1)(state)
    shares = [of_rank(rank, 4)(state) for rank in range(4)]
    assert alone is not None and alone.n == 18 and not alone.final and 0 <= alone.low <= alone.score <= alone.high
    for name, n in right(alone).items():
        assert n == sum(right(share)[name] for share in shares)


def test_after_the_last_step_the_whole_suite_is_asked_with_new_wordings_apart(state: TrainingState) -> None:
    state.step = 6
    scored = of_rank(0, 1)(state)
    assert scored is not None and scored.final and scored.n == 600
    assert sum(each["n"] for each in scored.templates.values()) == len(logic_suite()) == 720
    assert sum(right(scored).values()) > 0


def test_a_stop_cuts_it_short_and_nothing_is_told(state: TrainingState) -> None:
    assert of_rank(0, 1, stopped=True)(state) is None


def test_not_even_one_question_that_fits_is_a_failure_of_the_worker(
    state: TrainingState, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(examiner, "ask", no_room)
    with pytest.raises(DeviceMemoryError, match="the logic problems after step 0 ran out of device memory"):
        of_rank(0, 1)(state)


def test_what_does_not_fit_into_memory_is_asked_with_less_at_once(
    state: TrainingState, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    ask = examiner.ask

    def little_room(*arguments: Any, at_once: int, **options: Any) -> Any:
        asked.append(at_once)
        if at_once > 10:
            raise torch.OutOfMemoryError("no room")
        return ask(*arguments, at_once=at_once, **options)

    monkeypatch.setattr(examiner, "ask", little_room)
    examined = of_rank(0, 1)
    scored = examined(state)
    assert scored is not None and scored.n == 18 and asked == [64, 32, 16, 8] and examined.at_once == 8 < AT_ONCE
