"""An answer is correct if it contains the expected number or text, in any notation."""

from __future__ import annotations

import re

import pytest

from savant_ray.data.quickstart.problems import problems
from savant_ray.evaluation.answer_matching import is_correct


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4 + 3 = 7. The answer is 61. The answer is 5.", "61"),
        ("So -34. The answer is -34", "-34"),
        ("The answer is yes, both.", "yes, both"),
        ("7 and then 8 or so", "8"),
        ("The answer is 61.The next one", "61"),
        ("The answer is 42!", "42"),
        ("The answer is **42**.", "42"),
        ("The answer is: 42.", "42"),
        ("The answer is 042.", "42"),
        ("The answer is +42.", "42"),
        # decimals, thousands, exponents, fractions
        ("The answer is 3.14.", "3.14"),
        ("The answer is 3.140.", "3.14"),
        ("The answer is .5.", "0.5"),
        ("The answer is 1,000.", "1000"),
        ("The answer is 1 000.", "1,000"),
        ("The answer is 1,234,567.5.", "1234567.5"),
        ("The answer is 1e3.", "1000"),
        ("The answer is 1.5e-07.", "1.5e-7"),
        ("The answer is \u22125.", "-5"),
        ("The answer is 3/4.", "3/4"),
        ("The answer is 0.75.", "3/4"),
        ("The answer is 1 1/2.", "1.5"),
        ("We get -3.5 in the end", "-3.5"),
        ("It is 3/4, I think", "0.75"),
        ("It takes 1 1/2 hours", "1.5"),
        # units
        ("The answer is 50%.", "50%"),
        ("The answer is 50 percent.", "50%"),
        ("The answer is 0.5.", "50%"),
        ("The answer is $5.00.", "$5"),
        ("The answer is -$5.", "$-5"),
        ("It costs $5 today.", "$5"),
        ("The answer is 5 km. That is far.", "5 km"),
        ("It is 5 km away.", "5 km"),
        ("The answer is 5 km/h.", "5 km/h"),
        # text
        ("The answer is U.S.", "U.S."),
        ("The answer is U.S. and nothing else.", "U.S."),
        ("The answer is Dr. Smith. He is old.", "Dr. Smith"),
        ("yes", "yes"),
        ("Yes.", "yes"),
        ("I have thought about it.\nThe yes.\n", "yes"),
        ("I have thought. Yes.", "yes"),
        ("The answer is the cat.", "A cat"),
        ("The answer is (C).", "C"),
        ("The answer is A.", "A"),
        ("The answer is (A).", "A"),
        ("The answer is A", "(A)"),
        ("The answer is C#.", "c#"),
        ("The answer is ?", "?"),
        ("The answer is 2024-01-05.", "2024-01-05"),
        ("The answer is 10:30.", "10:30"),
        ("The answer is one\ntwo", "one two"),
        ("The answer is 42", "The answer is 42"),
        # too long to be compared by value
        (f"The answer is {'9' * 5000}.", "9" * 5000),
        ("The answer is 1e999999999.", "1e999999999"),
        ("The answer is 1/0.", "1/0"),
    ],
)
def test_the_expected_answer_is_correct_in_any_notation(text: str, expected: str) -> None:
    assert is_correct(text, expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "yes"),
        ("no idea", "yes"),
        ("yes and no", "yes"),
        ("The answer is 5. The answer is 61.", "61"),
        ("The answer is 42.5.", "42"),
        ("So 3.5", "5"),
        ("It is 3/4, I think", "4"),
        ("The answer is 3.15.", "3.14"),
        ("The answer is 314.", "3.14"),
        ("The answer is 3,14.", "314"),
        ("The answer is 5\u00b2.", "52"),
        ("The answer is -5.", "5"),
        ("The answer is 5 miles.", "5 km"),
        ("It is 5 miles away.", "5 km"),
        ("The answer is 5.", "5 km"),
        ("The answer is 50.", "50%"),
        ("The answer is \u20ac5.", "$5"),
        ("The answer is C#.", "C"),
        ("The answer is B.", "A"),
        ("The answer is (the).", "A"),
        ("The answer is the.", "A"),
        ("The answer is 2024-01-05.", "2024-01-06"),
        ("The answer is 10:30.", "1030"),
        (f"The answer is {'9' * 5000}.", "9" * 4999),
        ("The answer is 1e999999999.", "1e999999998"),
    ],
)
def test_a_different_answer_is_incorrect(text: str, expected: str) -> None:
    assert not is_correct(text, expected)


def whole_number(text: str) -> str:
    """Return the text after the first "The answer is", or else the last integer."""
    phrase = re.search(r"The answer is\s+([^\n.]*[^\n.\s])", text)
    numbers = re.findall(r"-?\d+", text)
    return phrase[1] if phrase else numbers[-1] if numbers else ""


def test_integers_of_the_suite_are_scored_as_by_a_plain_comparison() -> None:
    suite = [*problems(20_000, 600, held_out=True), *problems(20_000, 120, held_out=True, unseen_wordings=True)]
    for problem, other in zip(suite, suite[1:] + suite[:1], strict=True):
        worked = problem.answer_text
        for text in (
            *(worked, other.answer_text, "", worked[: len(worked) // 2], worked[:-3], f"{worked} {other.answer_text}"),
            *(worked.replace("The answer is", "So"), f"{worked}\n{other.answer_text}", f"{problem.answer} apples"),
            *(f"The answer is {problem.answer} apples.", f"The answer is {-problem.answer}.", f"0{problem.answer}"),
        ):
            expected = whole_number(text).strip()
            is_number = re.fullmatch(r"-?\d+", expected)
            assert is_correct(text, str(problem.answer)) == bool(is_number and int(expected) == problem.answer), text


def test_a_long_repetitive_answer_is_scored() -> None:
    """Each sentence is compared together with all earlier ones, which would take hours without a bound."""
    assert is_correct("The answer is 5. " + "x. " * 100_000, "5")
    assert not is_correct("The answer is 5. " + "x. " * 100_000, "7")
