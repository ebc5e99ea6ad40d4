"""The logic suite: arithmetic and comparison problems with held-out operands, and the score of a model on them.

The pairs of operands are held out from every generated training text, whatever the operation; in one part of the suite
the wordings are new as well (see `savant_ray/data/quickstart/problems.py`). Answers are decoded greedily.
"""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from savant_ray.data.quickstart.problems import problems
from savant_ray.data.tokenizer import Tokenizer
from savant_ray.errors import DataError
from savant_ray.evaluation.answer_matching import is_correct
from savant_ray.inference.generate import generate_many
from savant_ray.inference.sampling import Sampling
from savant_ray.model.transformer import UniversalTransformer

SUITE_SEED = 20_000
N_TRAINED_WORDINGS, N_NEW_WORDINGS = 600, 120  # questions in wordings of the training text, and in others
NEW_WORDING_SUFFIX = ", new wording"  # of the template's name; these questions are scored separately
BATCH_SIZE = 64  # questions
GPU_BATCH_SIZE = 256  # questions; 4 GiB of keys and values in bf16 (default model, 512 tokens per question and answer)
MAX_FILE_BYTES = 256 << 20  # of a file of questions; a device such as /dev/zero never ends
Z = 1.959964  # 97.5 % quantile of the normal distribution, for a 95 % interval


@dataclass(frozen=True)
class Question:
    """A prompt and the expected answer, a number or a text."""

    template: str
    prompt: str
    answer: str
    source: str = field(default="", compare=False)  # file and line; "" if it was not read from a file


@dataclass(frozen=True)
class Answer:
    """A model's answer to a question."""

    question: Question
    text: str

    @property
    def correct(self) -> bool:
        """Return whether the text states the expected answer; `answer_matching.py` defines the rule."""
        return is_correct(self.text, self.question.answer)


@dataclass(frozen=True)
class Score:
    """The number of correct answers to `n` questions."""

    n: int
    correct: int

    @property
    def fraction(self) -> float:
        """Return the fraction of correct answers, 0 without questions."""
        return self.correct / self.n if self.n else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % confidence interval of the fraction (E. B. Wilson, JASA 22, 1927)."""
        if not self.n:
            return 0.0, 1.0
        middle = (self.fraction + Z**2 / (2 * self.n)) / (1 + Z**2 / self.n)
        spread = (
            math.sqrt(self.fraction * (1 - self.fraction) / self.n + Z**2 / (4 * self.n**2)) * Z / (1 + Z**2 / self.n)
        )
        return max(0.0, min(self.fraction, middle - spread)), min(1.0, max(self.fraction, middle + spread))


def logic_suite() -> list[Question]:
    """Return the questions, always the same: held-out pairs in trained wordings, then held-out pairs in new wordings."""
    trained_wordings = problems(SUITE_SEED, N_TRAINED_WORDINGS, held_out=True)
    new_wordings = problems(SUITE_SEED, N_NEW_WORDINGS, held_out=True, unseen_wordings=True)
    return [
        *(Question(p.template, p.prompt, str(p.answer)) for p in trained_wordings),
        *(Question(f"{p.template}{NEW_WORDING_SUFFIX}", p.prompt, str(p.answer)) for p in new_wordings),
    ]


def read_questions(path: Path) -> list[Question]:
    """Return the questions of a JSONL file: `prompt`, `answer` and optionally `template`, the group of the question.

    Raises:
        DataError: the file cannot be read, is too large or has no questions, or a line has no valid prompt and answer; the
            message names the line.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    if len(content) > MAX_FILE_BYTES:
        raise DataError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB, so it is not a file of questions")
    lines = content.removeprefix(codecs.BOM_UTF8).splitlines()
    questions = [_question(line, f"{path} line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise DataError(f"{path}: no questions; expected one JSON object per line with prompt and answer")
    return questions


def answer_questions(
    model: UniversalTransformer,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    max_new_tokens: int,
    n_loops: int | None = None,
    batch_size: int = BATCH_SIZE,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Iterator[Answer]:
    """Yield the model's greedy answer to each question, short prompts first, until `stop_requested` returns True.

    The answer to a prompt without tokens is ""; `refuse_empty_prompts` detects them beforehand.
    """
    sampling = Sampling.for_tokenizer(tokenizer, max_new_tokens, temperature=0.0)
    # Sorted so that short prompts need little padding.
    by_length = sorted(questions, key=lambda question: len(question.prompt))
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start : start + batch_size]
        prompts = tokenizer.encode_prompts([question.prompt for question in batch])
        not_empty = [prompt for prompt in prompts if prompt]
        answers = iter(generate_many(model, not_empty, sampling, n_loops, stop_requested))
        if stop_requested():
            return
        for question, prompt in zip(batch, prompts, strict=True):
            yield Answer(question, tokenizer.decode_continuation(prompt, next(answers)) if prompt else "")


def refuse_empty_prompts(tokenizer: Tokenizer, questions: Sequence[Question]) -> None:
    """Raise an error if a prompt has no tokens.

    Raises:
        DataError: the tokenizer encodes a prompt as no tokens; names file and line.
    """
    prompts = tokenizer.encode_prompts([question.prompt for question in questions])
    for question, prompt in zip(questions, prompts, strict=True):
        if not prompt:
            where = f"{question.source}: " if question.source else ""
            raise DataError(f"{where}the prompt {question.prompt!r} has no tokens in the checkpoint's tokenizer")


def scores(answers: Iterable[Answer]) -> dict[str, Score]:
    """Return the score of each template, sorted by name."""
    correct: dict[str, list[bool]] = {}
    for answer in answers:
        correct.setdefault(answer.question.template, []).append(answer.correct)
    return {name: Score(len(correct[name]), sum(correct[name])) for name in sorted(correct)}


def total(templates: dict[str, Score], new_wordings: bool = False) -> Score:
    """Return the sum over the templates with trained wordings, or with `new_wordings` over the others."""
    selected = [score for name, score in templates.items() if name.endswith(NEW_WORDING_SUFFIX) == new_wordings]
    return Score(sum(score.n for score in selected), sum(score.correct for score in selected))


def _question(line: bytes, where: str) -> Question:
    try:
        fields: Any = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(fields, dict):
        raise DataError(f"{where}: expected a JSON object with prompt and answer")
    prompt, answer = fields.get("prompt"), fields.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = json.loads(line, parse_int=str, parse_float=str)["answer"]  # as written, with all digits
    if not isinstance(prompt, str) or not prompt or not isinstance(answer, str) or not answer.strip():
        found = ", ".join(f"{name}: {_shortened(value)}" for name, value in fields.items()) or "no fields"
        raise DataError(f'{where}: "prompt" must be a string and "answer" a string or a number (found {found})')
    return Question(str(fields.get("template", "questions")), prompt, answer, where)


def _shortened(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:40]}…"
