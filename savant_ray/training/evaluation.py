"""A checkpoint takes an exam: what `savant evaluate` calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from savant_ray.inference.logic import Answer, Question, Score, ask, scores, total
from savant_ray.training.sampling import load_model


def answers_of(
    checkpoint: Path, questions: Sequence[Question], max_new_tokens: int | None = None, n_loops: int | None = None
) -> Iterator[Answer]:
    """Yields the checkpoint's answers; what is None is taken from its settings.

    Raises:
        CheckpointError: there is no readable checkpoint.
        DataError: a question has an empty prompt.
    """
    model, tokenizer, config = load_model(checkpoint)
    longest = config.validation.max_new_tokens if max_new_tokens is None else max_new_tokens
    yield from ask(model, tokenizer, questions, longest, n_loops)


def result(answers: Sequence[Answer]) -> dict[str, Any]:
    """Scores and answers as plain values: of all trained wordings, of the new ones, and of each template."""
    templates = scores(answers)
    return {
        **_told(total(templates)),
        "new_wordings": _told(total(templates, new_wordings=True)),
        "templates": {name: _told(score) for name, score in templates.items()},
        "answers": [
            {
                "template": answer.question.template,
                "prompt": answer.question.prompt,
                "expected": answer.question.answer,
                "text": answer.text,
                "correct": answer.correct,
            }
            for answer in answers
        ],
    }


def _told(score: Score) -> dict[str, Any]:
    return {"score": score.share, "n": score.n, "interval": list(score.interval)}
