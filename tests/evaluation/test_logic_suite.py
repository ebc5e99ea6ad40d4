"""The logic suite contains no problem of the training text and counts correct answers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st

from savant_ray.data.quickstart.problems import is_held_out, problems
from savant_ray.data.tokenizer import Tokenizer, train_tokenizer
from savant_ray.errors import DataError
from savant_ray.evaluation.logic_suite import (
    Answer,
    Question,
    Score,
    answer_questions,
    logic_suite,
    read_questions,
    refuse_empty_prompts,
    scores,
    total,
)
from savant_ray.model.transformer import UniversalTransformer
from tests.training.tiny import tiny_config

SUITE = logic_suite()


def test_the_suite_has_six_templates_equally_often_and_new_wordings_of_each() -> None:
    counts = Counter(question.template for question in SUITE)
    trained = {name: n for name, n in counts.items() if not name.endswith(", new wording")}
    assert len(trained) >= 6 and sum(trained.values()) >= 600 and max(trained.values()) - min(trained.values()) <= 1
    assert set(counts) - set(trained) == {f"{name}, new wording" for name in trained}
    assert len({question.prompt for question in SUITE}) == len(SUITE) and logic_suite() == SUITE


def test_no_question_and_no_pair_of_operands_is_in_the_training_text() -> None:
    trained = problems(0, 5000)
    assert not {question.prompt for question in SUITE} & {problem.prompt for problem in trained}
    assert not any(is_held_out(*problem.operands[:2]) for problem in trained)


def test_the_worked_answer_is_correct_and_one_more_is_incorrect() -> None:
    for problem in problems(1, 200, held_out=True):
        question = Question(problem.template, problem.prompt, str(problem.answer))
        assert Answer(question, problem.answer_text).correct
        wrong = problem.answer_text.replace(f"The answer is {problem.answer}.", f"The answer is {problem.answer + 1}.")
        assert not Answer(question, wrong).correct and not Answer(question, "").correct


@given(st.integers(0, 2000), st.data())
def test_the_interval_contains_the_fraction_and_narrows_with_more_questions(n: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, n))
    low, high = Score(n, correct).interval
    assert (
        0 <= low <= Score(n, correct).fraction + 1e-12
        and high <= 1
        and (n == 0 or Score(n, correct).fraction <= high + 1e-12)
    )
    wider_low, wider_high = Score(n // 4, correct // 4).interval
    assert n < 100 or high - low < wider_high - wider_low


def test_the_interval_is_wilsons() -> None:
    assert Score(600, 540).interval == pytest.approx((0.8734, 0.9215), abs=1e-4)


def test_new_wordings_are_scored_separately() -> None:
    seen, new = Question("sum", "a", "1"), Question("sum, new wording", "b", "1")
    templates = scores([Answer(seen, "1"), Answer(seen, "2"), Answer(new, "1")])
    assert templates == {"sum": Score(2, 1), "sum, new wording": Score(1, 1)}
    assert total(templates) == Score(2, 1) and total(templates, new_wordings=True) == Score(1, 1)


def test_each_question_is_answered_once_and_as_if_alone() -> None:
    torch.manual_seed(1)
    model = UniversalTransformer(tiny_config().model.model_copy(update={"vocab_size": 300}))
    with torch.no_grad():
        model.head.weight.mul_(20)  # so that no two tokens are nearly alike
    tokenizer = train_tokenizer(iter(["ab cd 0123456789"] * 50), vocab_size=300)
    questions = [Question("t", "ab" * (1 + i % 7) + str(i), "1") for i in range(70)]
    answers = list(answer_questions(model, tokenizer, questions, max_new_tokens=5))
    assert sorted(answer.question.prompt for answer in answers) == sorted(question.prompt for question in questions)
    (alone,) = answer_questions(model, tokenizer, [answers[3].question], max_new_tokens=5)
    assert alone == answers[3]


def test_a_file_of_questions_is_read_and_an_invalid_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    lines = [{"prompt": "2 + 2?", "answer": 4}, {"prompt": "Is it?", "answer": "Yes", "template": "logic"}]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    first, second = read_questions(path)
    assert first == Question("questions", "2 + 2?", "4") and second == Question("logic", "Is it?", "Yes")
    assert Answer(second, "The answer is yes.").correct
    for line, message in (
        ("{", "line 1: not valid JSON"),
        ('{"prompt": "x", "answer": "x\\ud800"}', "line 1: not valid JSON"),
        ('{"prompt": "x"}', 'line 1: "prompt" must be a string and "answer" a string or a number (found prompt: "x")'),
        ('{"prompt": 1, "answer": 1}', "found prompt: 1, answer: 1)"),
        ('{"prompt": "x", "answer": [1]}', "answer: [1])"),
        ('{"prompt": "x", "answer": null}', "answer: null)"),
        ('{"prompt": "x", "answer": true}', "answer: true)"),
        ('{"prompt": "x", "answer": " "}', "line 1"),
        ('{"prompt": "x", "answer": 1}\n\n{"prompt": "", "answer": 1}', "line 3"),
        ("[1]", "expected a JSON object"),
        ("", "no questions"),
    ):
        path.write_text(line)
        with pytest.raises(DataError, match="own.jsonl") as error:
            read_questions(path)
        assert message in str(error.value)
    with pytest.raises(DataError, match="No such file"):
        read_questions(tmp_path / "missing.jsonl")


@pytest.mark.parametrize("number", ["42", "3.14", "3.140", "-5", "1e3", "123456789012345678901234567890"])
def test_answers_that_are_json_numbers_keep_all_their_digits(number: str, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(f'\ufeff{{"prompt": "x", "answer": {number}}}\n', encoding="utf-8")
    (question,) = read_questions(path)
    assert question.answer == number and Answer(question, f"The answer is {number}.").correct


def test_a_prompt_without_tokens_is_refused_with_its_line_or_counts_as_incorrect(
    tmp_path: Path,
) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1}))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer, path = Tokenizer(words), tmp_path / "own.jsonl"
    path.write_text('{"prompt": "a", "answer": "a"}\n{"prompt": " ", "answer": "b"}\n')
    questions = read_questions(path)
    with pytest.raises(DataError, match=r"own.jsonl line 2: the prompt ' ' has no tokens"):
        refuse_empty_prompts(tokenizer, questions)
    model = UniversalTransformer(tiny_config().model)
    _, unanswered = answer_questions(model, tokenizer, questions, max_new_tokens=3)
    assert unanswered == Answer(questions[1], "") and not unanswered.correct
    assert list(answer_questions(model, tokenizer, questions[1:], max_new_tokens=3)) == [unanswered]


def test_an_endless_device_is_refused_as_a_file_of_questions() -> None:
    with pytest.raises(DataError, match=r"^/dev/zero: larger than"):
        read_questions(Path("/dev/zero"))
