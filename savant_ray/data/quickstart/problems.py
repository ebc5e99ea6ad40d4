r"""Arithmetic and logic problems with worked answers, and the rule for which of them are held out.

A problem has the form `Question: …\nAnswer: Let's think step by step: …`. Its answer repeats the expression, computes
digit by digit from the ones (comparisons: from the tens), and ends with `The answer is 61.`:

    27 + 34. 7 + 4 = 11. 20 + 30 = 50. So 61. The answer is 61.
    61 - 27. 1 - 7 = -6. 60 - 20 = 40. So 34. The answer is 34.
    27 * 4. 7 * 4 = 28. 20 * 4 = 80. 20 + 80 = 100. 0 + 100 = 100. So 108. The answer is 108.
    Larger of 27 and 34. 20 < 30. So 34. The answer is 34.

Held out are some wordings (see `wordings.py`), and some unordered pairs of operands for all operations:

- {5, 10}, the pair in the default of `validation.prompt`, and about one in ten of the other pairs of 0 … 99, selected by
  hash.
- Except for {5, 10}, pairs of round numbers (one digit, or multiples of ten) are never held out, because the worked steps
  consist of them: a model that has not seen 7 + 4 cannot compute 27 + 34.
- A training problem combines no held-out pair: not in its question (any two of three operands), not with an intermediate
  result (27 + 34 - 5 combines 61 and 5), and not in a worked step (17 * 5 contains 10 * 5).
- The first two operands of a held-out problem are a held-out pair.

All functions are pure: the same seed gives the same problems.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, cycle, islice
from operator import add, mul, sub
from random import Random

from savant_ray.data.quickstart.wordings import ITEMS, LETTERS, NAMES, PATTERNS, UNITS, Wording, draw_wording, is_chosen

TEMPLATES = tuple(PATTERNS)
LARGEST_OPERAND = 99
HELD_OUT_FRACTION = 0.1

_OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": add, "-": sub, "*": mul, ">": max, "<": min}
_EXPRESSIONS = {">": "Larger of {} and {}.", "<": "Smaller of {} and {}."}  # all others have a sign
_EXPRESSION_OF_LETTERS = re.compile(r"\{a\} [-+*] \{b\}")
_SMALL_FRACTION = 0.25  # fraction of operands drawn from 0 … 19, so that one-digit numbers are not too rare


@dataclass(frozen=True)
class Problem:
    """A question, its worked answer, and the number with which the answer ends."""

    template: str
    wording: str
    operands: tuple[int, ...]
    prompt: str
    answer_text: str
    answer: int

    @property
    def text(self) -> str:
        """Return the training document: prompt and answer."""
        return f"{self.prompt} {self.answer_text}"


@cache
def is_held_out(x: int, y: int) -> bool:
    """Return whether the pair of x and y, in either order, is held out from the training text."""
    low, high = sorted((x, y))
    if (low, high) == (5, 10):
        return True
    if not 0 <= low <= high <= LARGEST_OPERAND or (_is_round(low) and _is_round(high)):
        return False
    return is_chosen(f"{low} {high}", HELD_OUT_FRACTION)


def problems(
    seed: int,
    n: int,
    held_out: bool = False,
    templates: Sequence[str] = TEMPLATES,
    unseen_wordings: bool = False,
) -> list[Problem]:
    """Generate n different problems, cycling through the templates.

    `held_out` selects held-out pairs of operands, `unseen_wordings` the held-out wordings. A template that is listed twice
    contributes two problems per cycle.
    """
    rng = Random(f"{seed} {held_out} {unseen_wordings}")
    by_prompt: dict[str, Problem] = {}
    for template in islice(cycle(templates), n):
        problem = _draw_problem(rng, template, held_out, unseen_wordings)
        while problem.prompt in by_prompt:
            problem = _draw_problem(rng, template, held_out, unseen_wordings)
        by_prompt[problem.prompt] = problem
    return list(by_prompt.values())


def combined_pairs(operands: Sequence[int], operations: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield all pairs of numbers that a problem combines: in its question, its intermediate results and worked steps."""
    yield from combinations(operands, 2)
    left = operands[0]
    for operation, right in zip(operations, operands[1:], strict=True):
        yield left, right
        yield from _places(left, operation, right)
        left = _OPERATIONS[operation](left, right)


def _is_round(x: int) -> bool:
    return x < 10 or x % 10 == 0


def _draw_problem(rng: Random, template: str, held_out: bool, unseen_wordings: bool) -> Problem:
    while True:
        wording = draw_wording(rng, template, unseen_wordings)
        operands = _draw_operands(rng, wording.operations, held_out)
        if operands is not None:
            return _make_problem(rng, template, wording, operands)


def _draw_operands(rng: Random, operations: Sequence[str], held_out: bool) -> tuple[int, ...] | None:
    """Draw operands; return None if they do not fit the operations, or combine a held-out pair in training text."""
    pair = rng.choice(_held_out_pairs()) if held_out else (_draw_number(rng), _draw_number(rng))
    operands = rng.sample(pair, 2) + [_draw_number(rng) for _ in operations[1:]]
    if operations[0] == "-":
        operands[:2] = sorted(operands[:2], reverse=True)
    elif operations[0] == "*" and not held_out:
        operands[1] = rng.randrange(10)
    if not _fits(operands, operations):
        return None
    if not held_out and any(is_held_out(x, y) for x, y in combined_pairs(operands, operations)):
        return None
    return tuple(operands)


def _draw_number(rng: Random) -> int:
    return rng.randrange(20 if rng.random() < _SMALL_FRACTION else LARGEST_OPERAND + 1)


@cache
def _held_out_pairs() -> tuple[tuple[int, int], ...]:
    numbers = range(LARGEST_OPERAND + 1)
    return tuple(pair for pair in combinations(numbers, 2) if is_held_out(*pair)) + tuple(
        (x, x) for x in numbers if is_held_out(x, x)
    )


def _fits(operands: Sequence[int], operations: Sequence[str]) -> bool:
    """Return whether operands are allowed for these operations.

    No result may be negative, intermediate results are at most 99, second factors have one digit, and compared numbers
    differ.
    """
    left = operands[0]
    for i, (operation, right) in enumerate(zip(operations, operands[1:], strict=True)):
        if i > 0 and left > LARGEST_OPERAND:
            return False
        if operation in "<>" and left == right:
            return False
        if operation == "*" and right > 9:
            return False
        left = _OPERATIONS[operation](left, right)
        if left < 0:
            return False
    return True


def _make_problem(rng: Random, template: str, wording: Wording, operands: tuple[int, ...]) -> Problem:
    name, other = rng.sample(NAMES, 2)
    slots: dict[str, object] = {"name": name, "other": other, "items": rng.choice(ITEMS), "unit": rng.choice(UNITS)}
    slots |= dict(zip("abc", rng.choice(LETTERS), strict=True)) | dict(zip("xyz", operands, strict=False))
    lead = _EXPRESSION_OF_LETTERS.search(wording.form) if len(operands) == 2 else None
    steps, answer = _work_out(operands, wording.operations)
    return Problem(
        template=template,
        wording=wording.form,
        operands=operands,
        prompt=f"Question: {wording.question.format(**slots)}\nAnswer: Let's think step by step:",
        answer_text=f"{f'{lead[0]} = '.format(**slots) if lead else ''}{' '.join(steps)} The answer is {answer}.",
        answer=answer,
    )


def _work_out(operands: Sequence[int], operations: Sequence[str]) -> tuple[list[str], int]:
    """Return the worked steps as sentences, and the result."""
    sentences: list[str] = []
    left = operands[0]
    for operation, right in zip(operations, operands[1:], strict=True):
        sentences.append(_EXPRESSIONS.get(operation, f"{{}} {operation} {{}}.").format(left, right))
        sentences += [_step(x, operation, y) for x, y in _places(left, operation, right)]
        if operation == "*":
            sentences += _carry(left, right)
        left = _OPERATIONS[operation](left, right)
        sentences.append(f"So {left}.")
    return sentences, left


def _places(left: int, operation: str, right: int) -> list[tuple[int, int]]:
    """Return the pairs of the worked steps: ones, then tens; for a comparison tens and, if they are equal, ones."""
    ones, tens = (left % 10, right % 10), (left - left % 10, right - right % 10)
    if operation in "<>":
        return [tens, ones] if tens[0] == tens[1] else [tens]
    if operation == "*":
        return [(left % 10, right), (left - left % 10, right)]
    return [ones, tens]


def _carry(left: int, right: int) -> list[str]:
    """Return the sentences that add the two partial products: tens first, then hundreds."""
    ones, rest = left % 10 * right, (left - left % 10) * right
    tens = ones - ones % 10 + rest % 100
    return [_step(ones - ones % 10, "+", rest % 100), _step(rest - rest % 100, "+", tens)]


def _step(x: int, operation: str, y: int) -> str:
    if operation in "<>":
        return f"{x} {'=' if x == y else '>' if x > y else '<'} {y}."
    return f"{x} {operation} {y} = {_OPERATIONS[operation](x, y)}."
