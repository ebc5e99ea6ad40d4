"""The quickstart's data: it is reproducible and correct, and training text contains nothing that is held out."""

from __future__ import annotations

import json
import operator
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from savant_ray.data.quickstart import CHAT_FILE, GENIUS_FILE, TRAIN_FILE, VALIDATION_FILE, write_quickstart
from savant_ray.data.quickstart.problems import TEMPLATES, is_held_out, problems
from savant_ray.errors import DataError
from savant_ray.evaluation.answer_matching import is_correct

ROOT = Path(__file__).parents[2]
FILES = (TRAIN_FILE, VALIDATION_FILE, GENIUS_FILE)
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
EQUATION = re.compile(r"(?<![\w.])(\d+) ([-+*]) (\d+) = (-?\d+)\b")
COMPARISON = re.compile(r"(?<![\w.])(?<![-+*] )(\d+) ([<>=]) (\d+)\.")
EXPRESSION = re.compile(r"(?<![\w.])(\d+) ?(?:[-+*/<>=]|or|and|times|plus|minus) ?(\d+)(?![\w.])")


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    write_quickstart(folder, log=quiet)
    return folder


@pytest.fixture(scope="module")
def rows(folder: Path) -> dict[str, list[dict[str, str]]]:
    return {name: [json.loads(line) for line in (folder / name).read_text().split("\n")[:-1]] for name in FILES}


def problem_texts(rows: list[dict[str, str]]) -> list[str]:
    return [row["text"] for row in rows if row["text"].startswith("Question: ")]


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


# --- the files


def test_the_conversations_are_answered_by_the_assistant_and_contain_nothing_that_is_held_out(folder):
    conversations = [json.loads(line)["messages"] for line in (folder / CHAT_FILE).read_text().splitlines()]
    assert len(conversations) > 1000
    assert {len(messages) for messages in conversations} == {2, 4, 6, 8}
    for messages in conversations:
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        questions = [message["content"] for message in messages[::2] if message["content"] != "Thank you!"]
        answers = [message["content"] for message in messages[1::2]][: len(questions)]
        assert all(answer.startswith("Sure! ") for answer in answers)
        pairs = [(int(x), int(y)) for text in questions for x, y in EXPRESSION.findall(text)]
        assert not any(is_held_out(*pair) for pair in pairs)


def test_the_files_have_more_than_1_5_mb_of_prose_and_26_000_problems(rows):
    prose = [row["text"] for row in rows[TRAIN_FILE] if not row["text"].startswith("Question: ")]
    assert sum(map(len, prose)) > 1_500_000
    assert len(problem_texts(rows[TRAIN_FILE])) > 5000
    assert len(problem_texts(rows[GENIUS_FILE])) == len(rows[GENIUS_FILE]) == 26_000


def test_prose_and_problems_are_mixed_in_the_validation_file(rows):
    kinds = Counter(row["source"].split(":")[0] == "problem" for row in rows[VALIDATION_FILE])
    assert kinds[True] == 500 and kinds[False] >= 20
    first = [len(row["text"]) for row in rows[VALIDATION_FILE][:100]]
    prose = [len(row["text"]) for row in rows[VALIDATION_FILE][:100] if not row["text"].startswith("Question: ")]
    assert 0.1 < sum(prose) / sum(first) < 0.9


def test_no_document_occurs_twice_in_the_files(rows):
    texts = [row["text"] for name in FILES for row in rows[name]]
    assert len(texts) == len(set(texts)) and all(text.strip() for text in texts)


def test_held_out_prose_shares_no_paragraph_with_training_prose(rows):
    def paragraphs(name: str) -> set[str]:
        texts = [row["text"] for row in rows[name] if not row["text"].startswith("Question: ")]
        return {" ".join(p.split()) for text in texts for p in text.split("\n\n")[1:]}

    assert not paragraphs(TRAIN_FILE) & paragraphs(VALIDATION_FILE)


def test_another_process_writes_the_same_bytes_and_no_other_files(folder, tmp_path):
    code = "import sys, pathlib; from savant_ray.data.quickstart import write_quickstart as w; w(pathlib.Path(sys.argv[1]))"
    subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=ROOT, check=True, env=os.environ | {"PYTHONHASHSEED": "7"}
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted((*FILES, CHAT_FILE))
    for name in (*FILES, CHAT_FILE):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_existing_files_are_kept_unless_force_is_set(tmp_path):
    (tmp_path / TRAIN_FILE).write_text("mine\n")
    said: list[str] = []
    write_quickstart(tmp_path, log=said.append)
    assert (tmp_path / TRAIN_FILE).read_text() == "mine\n" and (tmp_path / GENIUS_FILE).exists()
    write_quickstart(tmp_path, log=said.append)
    assert said[-1] == f"quickstart data: already in {tmp_path}"
    write_quickstart(tmp_path, force=True, log=quiet)
    assert (tmp_path / TRAIN_FILE).read_text() != "mine\n"


def test_a_folder_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(DataError, match="taken: the quickstart data cannot be written"):
        write_quickstart(tmp_path / "taken", log=quiet)


# --- what is held out


def test_the_pair_5_and_10_and_about_a_tenth_of_the_others_are_held_out():
    assert is_held_out(5, 10) and is_held_out(10, 5)
    pairs = [(x, y) for x in range(100) for y in range(x, 100)]
    assert 0.08 < sum(is_held_out(*pair) for pair in pairs) / len(pairs) < 0.12
    assert all(is_held_out(x, y) == is_held_out(y, x) for x, y in pairs)


def test_pairs_of_round_numbers_are_never_held_out():
    table = [*range(10), *range(10, 100, 10)]
    assert [pair for pair in combinations(table, 2) if is_held_out(*pair)] == [(5, 10)]


@pytest.mark.parametrize("name", [TRAIN_FILE, GENIUS_FILE])
def test_no_training_text_combines_a_held_out_pair(rows, name):
    for row in rows[name]:
        assert not [pair for pair in EXPRESSION.findall(row["text"]) if is_held_out(*map(int, pair))], row
    for text in problem_texts(rows[name]):
        question = text.split("\nAnswer:")[0]
        assert not any(is_held_out(*pair) for pair in combinations(numbers(question), 2)), text


def test_every_validation_problem_combines_a_held_out_pair(rows):
    for text in problem_texts(rows[VALIDATION_FILE]):
        asked = numbers(text.split("\nAnswer:")[0])
        assert any(is_held_out(*pair) for pair in combinations(asked, 2)), text


def test_the_validation_file_has_wordings_that_are_in_no_training_file(rows):
    def wordings(name: str) -> set[str]:
        return {row["source"] for row in rows[name] if row["source"].startswith("problem:")}

    unseen = wordings(VALIDATION_FILE) - wordings(TRAIN_FILE) - wordings(GENIUS_FILE)
    assert {source.split("/")[0] for source in unseen} == {f"problem:{template}" for template in TEMPLATES}


# --- the problems


def test_every_worked_step_is_correct(rows):
    equations = comparisons = 0
    for text in (text for name in FILES for text in problem_texts(rows[name])):
        for x, sign, y, result in EQUATION.findall(text):
            assert OPERATORS[sign](int(x), int(y)) == int(result), text
            equations += 1
        for x, sign, y in COMPARISON.findall(text.split("step by step:")[1]):
            relation = {"<": operator.lt, ">": operator.gt, "=": operator.eq}[sign]
            assert relation(int(x), int(y)), text
            comparisons += 1
    assert equations > 40_000 and comparisons > 3000


def test_every_answer_ends_with_the_correct_number():
    for problem in problems(1, 3000) + problems(2, 1000, held_out=True) + problems(3, 500, True, unseen_wordings=True):
        assert problem.answer_text.endswith(f" So {problem.answer}. The answer is {problem.answer}.")
        assert is_correct(problem.text, str(problem.answer))
    sums = [p for p in problems(1, 600) if p.template == "sum"]
    assert sums and all(p.answer == sum(p.operands) for p in sums)


def test_the_results_of_ones_and_tens_add_up_to_the_result():
    joined = re.compile(
        r"(\d+) ([-+*]) (\d+)\. \S+ \S \S+ = (-?\d+)\. \S+ \S \S+ = (\d+)\. (?:\S+ \+ \S+ = \S+\. )*So (\d+)\."
    )
    for problem in problems(4, 2000):
        for x, sign, y, ones, tens, result in joined.findall(problem.answer_text):
            assert int(ones) + int(tens) == int(result) == OPERATORS[sign](int(x), int(y))


def test_the_prompt_of_the_training_guide_is_a_held_out_problem():
    prompt = "Question: If X = 5 and Y = 10, what is X + Y?\nAnswer: Let's think step by step:"
    found = {p.prompt: p for p in problems(0, 20_000, held_out=True, templates=["sum"])}
    assert found[prompt].answer_text == "X + Y = 5 + 10. 5 + 0 = 5. 0 + 10 = 10. So 15. The answer is 15."


def test_templates_alternate_and_the_same_seed_gives_the_same_problems():
    assert problems(7, 60) == problems(7, 60) != problems(8, 60)
    assert Counter(p.template for p in problems(7, 60)) == dict.fromkeys(TEMPLATES, 10)
    assert len({p.prompt for p in problems(7, 600)}) == 600
    assert {p.template for p in problems(7, 5, templates=["product"])} == {"product"}


def test_generation_ends_when_a_template_has_no_more_problems():
    few = problems(1, 100_000, held_out=True, templates=["product"], unseen_wordings=True)
    assert 100 < len(few) < 1000
