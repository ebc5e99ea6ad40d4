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

from savant_ray.data import quickstart
from savant_ray.data.quickstart import CHAT_FILE, GENIUS_FILE, TRAIN_FILE, VALIDATION_FILE, write_quickstart
from savant_ray.data.quickstart.problems import TEMPLATES, is_held_out, problems
from savant_ray.data.quickstart.wordings import ITEMS, NAMES, UNITS, UNSEEN, is_held_out_form
from savant_ray.errors import DataError
from savant_ray.evaluation.answer_matching import is_correct

ROOT = Path(__file__).parents[2]
FILES = (TRAIN_FILE, VALIDATION_FILE, GENIUS_FILE)
WORDS = dict(zip("xyzabc", "000XXX", strict=True), name="Ada", other="Ada", items="books", unit="hours")
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


def test_existing_files_are_kept_unless_force_is_set(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "_generate", lambda: {name: [{"text": "generated"}] for name in quickstart.FILES})
    (tmp_path / TRAIN_FILE).write_text("mine\n")
    messages: list[str] = []
    write_quickstart(tmp_path, log=messages.append)
    assert (tmp_path / TRAIN_FILE).read_text() == "mine\n" and (tmp_path / GENIUS_FILE).exists()
    write_quickstart(tmp_path, log=messages.append)
    assert messages[-1] == f"quickstart data: already in {tmp_path}"
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


# --- wordings


def shape(text: str) -> str:
    """Return the text with the same word for all numbers, all names, all items, all units and all letters."""
    for words, word in ((NAMES, "Ada"), (ITEMS, "books"), (UNITS, "hours")):
        text = re.sub(rf"\b(?:{'|'.join(words)})\b", word, text)
    return re.sub(r"\b[A-Z]\b", "X", re.sub(r"\d+", "0", text))


def sentence_starts(text: str) -> list[int]:
    return [0, *(match.end() for match in re.finditer(r"[.?] ", text))]


def questions_of(text: str) -> list[str]:
    return re.findall(r"Question: (.*)\nAnswer:", text)


def test_each_template_has_more_than_60_wordings_without_counting_what_is_said_before_the_question():
    wordings = {template: {p.wording for p in problems(1, 600, templates=[template])} for template in TEMPLATES}
    assert min(map(len, wordings.values())) > 200


def test_no_training_text_contains_a_held_out_wording(folder, rows):
    texts = [text for name in (TRAIN_FILE, GENIUS_FILE) for text in problem_texts(rows[name])]
    trained = {shape(question) for question in questions_of("\n".join(texts))}
    for line in (folder / CHAT_FILE).read_text().splitlines():
        trained |= {shape(message["content"]) for message in json.loads(line)["messages"]}
    after_an_opening = {question[place:] for question in trained for place in sentence_starts(question)}
    for problem in problems(20_000, 120, True, unseen_wordings=True) + problems(0, 600, True, unseen_wordings=True):
        assert shape(problem.wording.format(**WORDS)) not in after_an_opening, problem.prompt


def test_the_wordings_that_were_always_held_out_are_not_in_the_training_text(rows):
    number, word = r"\d+", r"\w+"
    patterns = (
        rf"Let {word} = {number} and {word} = {number}\. Find {word} [-+*] {word}\.",
        rf"How much are {number} and {number} altogether\?",
        rf"By how much is {number} more than {number}\?",
        rf"How much is {number} times {number}\?",
        rf"Two numbers are {number} and {number}\. What is the (?:larger|smaller) one\?",
        rf"{word} has {number} {word}\. {word} has {number}\. How many {word} do both have\?",
        rf"Of {number} {word} {word} loses {number}\. How many {word} does {word} have now\?",
        rf"Each of {number} boxes has {number} {word}\. How many {word} is that in all\?",
        rf"Add {number} and {number}, then subtract {number}\. What do you get\?",
        rf"Subtract {number} from {number}, then add {number}\. What do you get\?",
    )
    training = "\n".join(row["text"] for name in (TRAIN_FILE, GENIUS_FILE) for row in rows[name])
    unseen = "\n".join(p.prompt for p in problems(20_000, 600, held_out=True, unseen_wordings=True))
    assert not [pattern for pattern in patterns if re.search(pattern, training)]
    assert not [pattern for pattern in patterns if not re.search(pattern, unseen)]


def test_half_of_the_problems_in_unseen_wordings_are_compositions_of_the_grammar():
    wordings = [p.wording for p in problems(20_000, 120, held_out=True, unseen_wordings=True)]
    always_held_out = {form for forms in UNSEEN.values() for some in forms.values() for form in some}
    assert 40 < sum(wording in always_held_out for wording in wordings) < 80
    assert len(set(wordings)) > 50


def test_a_question_is_one_or_more_complete_sentences():
    for problem in problems(3, 3000) + problems(3, 300, True, unseen_wordings=True):
        (question,) = questions_of(problem.prompt)
        assert re.fullmatch(r"[A-Z0-9][-\w+*=,:' .?]*[.?]", question), question
        assert not re.search(r"  | [.,?:]|[.?][^ ]", question[:-1]), question
        assert all(sentence[0].isupper() or sentence[0].isdigit() for sentence in re.split(r"[.?] ", question)), (
            question
        )


def test_expressions_of_letters_are_calculated_with_the_values_that_the_question_gives():
    n = 0
    for problem in problems(5, 3000):
        values = {
            letter: int(number)
            for letter, number in re.findall(r"\b([A-Z])(?: =| is| be| equals) (\d+)", problem.prompt)
        }
        if found := re.search(r"\b([A-Z]) ([-+*]) ([A-Z])\b(?: ([-+]) ([A-Z])\b)?", problem.prompt):
            x, sign, y, second, z = found.groups()
            value = OPERATORS[sign](values[x], values[y])
            assert problem.answer == (OPERATORS[second](value, values[z]) if second else value), problem.prompt
            n += 1
            if not second:
                assert problem.answer_text.startswith(f"{found[0]} = {values[x]} {sign} {values[y]}. ")
    assert n > 200


def test_expressions_of_numbers_are_calculated_as_they_stand():
    signs = {"plus": "+", "minus": "-", "times": "*"}
    n = 0
    for problem in problems(6, 6000):
        for x, sign, y, second, z in re.findall(
            r"(\d+) ([-+*]|plus|minus|times) (\d+)(?: ([-+]|plus|minus) (\d+))?", problem.prompt
        ):
            value = OPERATORS[signs.get(sign, sign)](int(x), int(y))
            assert problem.answer == (OPERATORS[signs.get(second, second)](value, int(z)) if second else value)
            n += 1
    assert n > 100


def test_a_question_for_the_larger_number_has_the_larger_one_as_its_answer():
    for problem in problems(7, 600, templates=["comparison"]):
        (word,) = re.findall(r"\b(larger|bigger|greater|higher|smaller|lower|lesser)\b", problem.prompt)
        largest = word in ("larger", "bigger", "greater", "higher")
        (first, second) = numbers(problem.prompt)
        assert problem.answer == (max if largest else min)(first, second), problem.prompt


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


def test_the_prompt_of_the_training_guide_has_a_wording_of_the_training_text_and_held_out_numbers():
    form = "If {a} = {x} and {b} = {y}, what is {a} + {b}?"
    (first, *_) = [p for p in problems(0, 3000, held_out=True, templates=["sum"]) if p.wording == form]
    a, b, x, y = re.search(r"If (\w) = (\w+) and (\w) = (\w+), what is", first.prompt).group(1, 3, 2, 4)
    assert first.answer_text.startswith(f"{a} + {b} = {x} + {y}. ")
    assert is_held_out(5, 10) and not is_held_out_form(form)


def test_templates_alternate_and_the_same_seed_gives_the_same_problems():
    assert problems(7, 60) == problems(7, 60) != problems(8, 60)
    assert Counter(p.template for p in problems(7, 60)) == dict.fromkeys(TEMPLATES, 10)
    assert len({p.prompt for p in problems(7, 600)}) == 600
    assert {p.template for p in problems(7, 5, templates=["product"])} == {"product"}
