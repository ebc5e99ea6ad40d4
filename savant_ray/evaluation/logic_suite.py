"""The logic suite: problems that no training text can have given away, and how many of them a model answers rightly.

Half of the questions' worth lies in what is held out: the pairs of operands, whatever is done with them, and in a part of
the suite the wordings too (`savant_ray/data/quickstart/problems.py` has the rule). Answers are greedy.
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
from savant_ray.evaluation.answer_matching import is_right
from savant_ray.inference.generate import Sampling, generate_many
from savant_ray.model.transformer import UniversalTransformer

SUITE_SEED = 20_000  # no training text is made with it, and it would not matter
HELD_OUT_PAIRS, NEW_WORDINGS = 600, 120  # questions
NEW_WORDING = ", new wording"  # behind the template's name: counted apart
AT_ONCE = 64  # questions
MOST_BYTES = 256 << 20  # of a file of questions; /dev/zero has no end
Z = 1.959964  # of the normal distribution, for 95 %


@dataclass(frozen=True)
class Question:
    """A prompt, and the number or text that its answer has to give."""

    template: str
    prompt: str
    answer: str
    source: str = field(default="", compare=False)  # file and line, if it was read from a file


@dataclass(frozen=True)
class Answer:
    """What a model said."""

    question: Question
    text: str

    @property
    def correct(self) -> bool:
        """Whether the text gives the expected answer (`savant_ray/evaluation/answer_matching.py` has the rule)."""
        return is_right(self.text, self.question.answer)


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
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    if len(content) > MOST_BYTES:
        raise DataError(f"{path}: holds more than {MOST_BYTES >> 20} MiB, so it is not a file of questions")
    lines = content.removeprefix(codecs.BOM_UTF8).splitlines()
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

    A prompt without tokens has the answer ""; `refuse_empty_prompts` finds them before.
    """
    sampling = Sampling.of(tokenizer, max_new_tokens, temperature=0.0)
    by_length = sorted(questions, key=lambda question: len(question.prompt))  # little padding in front of short ones
    for start in range(0, len(by_length), at_once):
        some = by_length[start : start + at_once]
        prompts = tokenizer.encode_prompts([question.prompt for question in some])
        answers = iter(
            generate_many(model, [prompt for prompt in prompts if prompt], sampling, n_loops, stop_requested)
        )
        if stop_requested():
            return
        for question, prompt in zip(some, prompts, strict=True):
            yield Answer(question, tokenizer.decode(next(answers)) if prompt else "")


def refuse_empty_prompts(tokenizer: Tokenizer, questions: Sequence[Question]) -> None:
    """Check that each prompt has tokens.

    Raises:
        DataError: the tokenizer encodes a prompt as nothing; names file and line.
    """
    prompts = tokenizer.encode_prompts([question.prompt for question in questions])
    for question, prompt in zip(questions, prompts, strict=True):
        if not prompt:
            where = f"{question.source}: " if question.source else ""
            raise DataError(f"{where}the prompt {question.prompt!r} has no tokens in the checkpoint's tokenizer")


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


def _question(line: bytes, where: str) -> Question:
    try:
        fields: Any = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise DataError(f"{where}: no JSON ({error})") from error
    if not isinstance(fields, dict):
        raise DataError(f"{where}: a JSON object with prompt and answer is expected")
    prompt, answer = fields.get("prompt"), fields.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = json.loads(line, parse_int=str, parse_float=str)["answer"]  # as it is written, with all its digits
    if not isinstance(prompt, str) or not prompt or not isinstance(answer, str) or not answer.strip():
        found = ", ".join(f"{name}: {_shortened(value)}" for name, value in fields.items()) or "no fields"
        raise DataError(f'{where}: "prompt" has to be a text and "answer" a text or a number (found {found})')
    return Question(str(fields.get("template", "questions")), prompt, answer, where)


def _shortened(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:40]}…"
