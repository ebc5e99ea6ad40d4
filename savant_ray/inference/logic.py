"""The logic suite: problems that no training text can have given away, scored by the number that the answer ends in.

Half of the questions' worth lies in what is held out: the pairs of operands, whatever is done with them, and in a part of
the suite the wordings too (`savant_ray/data/quickstart/problems.py` has the rule). Answers are greedy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from savant_ray.data.quickstart.problems import problems
from savant_ray.data.tokenizer import Tokenizer
from savant_ray.errors import DataError
from savant_ray.inference.generate import Sampling, generate_many
from savant_ray.model.transformer import UniversalTransformer

SUITE_SEED = 20_000  # no training text is made with it, and it would not matter
HELD_OUT_PAIRS, NEW_WORDINGS = 600, 120  # questions
NEW_WORDING = ", new wording"  # behind the template's name: counted apart
AT_ONCE = 64  # questions
Z = 1.959964  # of the normal distribution, for 95 %


@dataclass(frozen=True)
class Question:
    """A prompt, and the number or text that its answer has to end in."""

    template: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Answer:
    """What a model said."""

    question: Question
    text: str

    @property
    def correct(self) -> bool:
        """Exact match; of numbers, as numbers."""
        return _normal(conclusion(self.text)) == _normal(self.question.answer)


@dataclass(frozen=True)
class Score:
    """How many of n were right."""

    n: int
    correct: int

    @property
    def share(self) -> float:
        """0 to 1; 0 of none."""
        return self.correct / self.n if self.n else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Within which the share lies at 95 % confidence (E. B. Wilson, JASA 22, 1927)."""
        if not self.n:
            return 0.0, 1.0
        middle = (self.share + Z**2 / (2 * self.n)) / (1 + Z**2 / self.n)
        spread = math.sqrt(self.share * (1 - self.share) / self.n + Z**2 / (4 * self.n**2)) * Z / (1 + Z**2 / self.n)
        return max(0.0, min(self.share, middle - spread)), min(1.0, max(self.share, middle + spread))


def logic_suite() -> list[Question]:
    """The same questions each time: held-out pairs in the trained wordings, and some in wordings held out as well."""
    seen = problems(SUITE_SEED, HELD_OUT_PAIRS, held_out=True)
    new = problems(SUITE_SEED, NEW_WORDINGS, held_out=True, unseen_wordings=True)
    return [
        *(Question(each.template, each.prompt, str(each.answer)) for each in seen),
        *(Question(f"{each.template}{NEW_WORDING}", each.prompt, str(each.answer)) for each in new),
    ]


def read_questions(path: Path) -> list[Question]:
    """Own questions from JSONL: `prompt` and `answer`, and `template` to group them by.

    Raises:
        DataError: naming file and line, what was found and what was expected.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    questions = [_question(line, f"{path} line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise DataError(f"{path}: no questions; one JSON object a line with prompt and answer is expected")
    return questions


def ask(
    model: UniversalTransformer,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    max_new_tokens: int,
    n_loops: int | None = None,
    at_once: int = AT_ONCE,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Iterator[Answer]:
    """Yields the model's greedy answer to each question, those with short prompts first, until `stop_requested`.

    Raises:
        DataError: a prompt has no tokens.
    """
    sampling = Sampling.of(tokenizer, max_new_tokens, temperature=0.0)
    by_length = sorted(questions, key=lambda question: len(question.prompt))  # little padding in front of short ones
    for start in range(0, len(by_length), at_once):
        some = by_length[start : start + at_once]
        prompts = tokenizer.encode_batch([question.prompt for question in some])
        if not all(prompts):
            raise DataError("a question has an empty prompt")
        answers = generate_many(model, prompts, sampling, n_loops, stop_requested)
        if stop_requested():
            return
        for question, tokens in zip(some, answers, strict=True):
            yield Answer(question, tokenizer.decode(tokens))


def scores(answers: Iterable[Answer]) -> dict[str, Score]:
    """Of each template, in the order of their names."""
    grouped: dict[str, list[bool]] = {}
    for answer in answers:
        grouped.setdefault(answer.question.template, []).append(answer.correct)
    return {name: Score(len(grouped[name]), sum(grouped[name])) for name in sorted(grouped)}


def total(templates: dict[str, Score], new_wordings: bool = False) -> Score:
    """Of the templates whose wordings are trained, or of the others."""
    chosen = [score for name, score in templates.items() if name.endswith(NEW_WORDING) == new_wordings]
    return Score(sum(score.n for score in chosen), sum(score.correct for score in chosen))


def conclusion(text: str) -> str:
    """What an answer ends in: behind the first "The answer is", or else its last number; "" if it has neither."""
    said = re.search(r"The answer is\s+([^\n.]*[^\n.\s])", text)
    if said:
        return said[1]
    numbers = re.findall(r"-?\d+", text)
    return numbers[-1] if numbers else ""


def _normal(text: str) -> str:
    words = " ".join(text.split()).casefold()
    return str(int(words)) if re.fullmatch(r"-?\d+", words) else words


def _question(line: bytes, where: str) -> Question:
    try:
        fields: Any = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise DataError(f"{where}: no JSON ({error})") from error
    if not isinstance(fields, dict):
        raise DataError(f"{where}: a JSON object with prompt and answer is expected")
    prompt, answer = fields.get("prompt"), fields.get("answer")
    is_answer = isinstance(answer, str | int) and not isinstance(answer, bool) and str(answer).strip()
    if not isinstance(prompt, str) or not prompt or not is_answer:
        found = ", ".join(fields) or "no fields"
        raise DataError(f'{where}: "prompt" has to be a text and "answer" a text or a whole number (found: {found})')
    return Question(str(fields.get("template", "questions")), prompt, str(answer))
