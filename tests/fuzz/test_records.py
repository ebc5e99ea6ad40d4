"""The record of a run and a file of questions can be read after any damage."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from savant_ray.errors import DataError
from savant_ray.evaluation.logic_suite import read_questions
from savant_ray.reporting.page.history import read_history
from savant_ray.reporting.record import (
    METRICS,
    JsonLines,
    continues,
    has_finished,
    is_same_run,
    read_records,
    saved_a_checkpoint,
    to_line,
)
from savant_ray.reporting.runs import status, summarize, to_json
from tests.fuzz.drawing import damaged, from_seed, random_text, random_value
from tests.fuzz.property import holds_for, scratch
from tests.reporting.events import attempt, checkpoint, idle, sample, step_done, validation

LINES = [
    json.dumps(to_line(event), ensure_ascii=False).encode() + b"\n"
    for event in (attempt(), *map(step_done, range(1, 5)), validation(4), sample(4), checkpoint(4), step_done(5))
]


def random_record(rng: Random) -> bytes:
    """Return the lines of a run's record, some of them duplicated, missing, damaged or replaced."""
    lines = [line for line in LINES for _ in range(rng.choice((0, 1, 1, 1, 1, 2)))]
    for _ in range(rng.randrange(3)):
        junk = rng.choice(
            (json.dumps(random_value(rng)).encode(), b"[" * 3000, b"\x00" * 40, rng.randbytes(5), b'{"event": 1}')
        )
        lines.insert(rng.randrange(len(lines) + 1), junk + b"\n")
    content = b"".join(lines)
    return damaged(content, rng) if rng.random() < 0.7 else content


@holds_for(
    "a run's metrics.jsonl with lines duplicated, missing, damaged or of anything else",
    quick=100,
    one_in=10,
    content=from_seed(random_record),
)
def test_a_damaged_record_keeps_its_valid_lines_and_can_be_appended_to(content: bytes) -> None:
    (folder := scratch() / "record").mkdir(exist_ok=True)
    path: Path = folder / METRICS
    path.write_bytes(content)
    if content:
        summary = summarize(folder, idle)  # `savant runs` looks at what a run is writing
        assert status(summary) and to_json([summary])
        assert read_history(folder, idle).summary == summary  # as does `savant report`
    file = JsonLines(path)
    remaining = read_records(path)
    assert all(json.loads(line) in remaining for line in content.splitlines(keepends=True) if line in LINES), "in order"
    file.append({"event": "step", "step": 6})
    file.keep(lambda line: line["event"] in ("attempt", "end") or line["step"] > 4)
    file.close()
    assert list(read_records(path))[-1] == {"event": "step", "step": 6}
    assert is_same_run(path, path) and continues(path, path)
    saved_a_checkpoint(folder), has_finished(folder, 5)


def random_questions(rng: Random) -> bytes:
    """Return lines with prompt and answer, some with wrong fields or damaged."""
    fields = ("prompt", "answer", "template", "text")
    lines = [
        {
            name: rng.choice((random_text(rng), "5", 5, random_value(rng)))
            for name in rng.sample(fields, rng.randrange(2, 4))
        }
        for _ in range(rng.randrange(4))
    ]
    content = b"\n".join(
        json.dumps(line, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass") for line in lines
    )
    return damaged(content, rng) if rng.random() < 0.5 else content


@holds_for(
    "up to 3 questions for `savant evaluate`, with fields of any kind, half of them damaged",
    quick=100,
    one_in=5,
    content=from_seed(random_questions),
)
def test_a_file_of_questions_is_read_or_refused_with_its_name(content: bytes) -> None:
    path = scratch() / "questions.jsonl"
    path.write_bytes(content)
    try:
        questions = read_questions(path)
    except DataError as error:
        assert str(error).startswith(str(path)) and str(error).encode()
    else:
        assert questions and all(each.prompt and each.prompt.encode() and each.answer.encode() for each in questions)
