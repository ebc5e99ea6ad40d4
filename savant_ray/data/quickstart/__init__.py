"""Generates the quickstart's text: prose from Python's standard library, and problems with worked answers.

Writes four files with one object per line, without downloading anything. The first three contain
`{"text": …, "source": …}`, the last one `{"messages": [{"role": …, "content": …}, …]}`:

    savant_dataset_train.jsonl   prose, and word problems
    savant_dataset_val.jsonl     held-out prose, and problems with held-out pairs of operands, some in held-out wordings
    genius_dataset.jsonl         problems of all templates
    conversations.jsonl          conversations about other problems, in which the assistant's answers begin with "Sure!"

The docstrings of the modules `prose` and `problems` define which documents and pairs are held out.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from savant_ray.data.quickstart.problems import TEMPLATES, Problem, problems
from savant_ray.data.quickstart.prose import Document, prose
from savant_ray.errors import DataError
from savant_ray.locations import replacing

TRAIN_FILE = "savant_dataset_train.jsonl"
VALIDATION_FILE = "savant_dataset_val.jsonl"
GENIUS_FILE = "genius_dataset.jsonl"
CHAT_FILE = "conversations.jsonl"
FILES = (TRAIN_FILE, VALIDATION_FILE, GENIUS_FILE, CHAT_FILE)

_GENIUS_PROBLEMS = 26_000
_WORD_PROBLEMS = 6_000
_CHAT_PROBLEMS = 6_000
_CHAT_TURNS = (1, 2, 3)
_QUESTION, _ANSWER = "Question: ", "\nAnswer:"
_VALIDATION_PROBLEMS = 400
_VALIDATION_UNSEEN_WORDINGS = 100
# Additional problems of templates that are learned slowly:
_HARD = ("product", "difference", "difference", "comparison")
_SEED = 20240


def write_quickstart(folder: Path, force: bool = False, log: Callable[[str], None] = print) -> None:
    """Write the four files into `folder`; existing files are replaced only with `force`.

    The content depends only on the Python installation (see `prose`). `log` receives progress messages.

    Raises:
        DataError: the folder cannot be written to, or Python was installed without the sources of its library.
    """
    missing = [name for name in FILES if force or not (folder / name).exists()]
    if not missing:
        log(f"quickstart data: already in {folder}")
        return
    log(f"quickstart data: collecting prose and generating problems for {folder} …")
    started = time.monotonic()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = _generate()
        for name in missing:
            size = _write(folder / name, files[name])
            log(f"quickstart data: {name} has {len(files[name]):,} documents, {size / 1e6:.1f} MB")
    except OSError as error:
        raise DataError(f"{folder}: the quickstart data cannot be written ({error.strerror or error})") from error
    log(f"quickstart data: ready after {time.monotonic() - started:.0f} s")


def _generate() -> dict[str, list[dict[str, Any]]]:
    """Return the objects of each file."""
    training_prose, held_out_prose = prose()
    if not training_prose or not held_out_prose:
        raise DataError(
            "quickstart data: this Python was installed without the sources of its standard library, from which"
            " the prose is taken; use another Python, or your own text (data.quickstart: false, data.sources)"
        )
    genius = problems(_SEED, _GENIUS_PROBLEMS, templates=(*TEMPLATES, *_HARD))
    genius_prompts = {problem.prompt for problem in genius}
    word_problems = problems(_SEED + 1, _WORD_PROBLEMS, templates=("word_problem", "two_step"))
    validation = problems(_SEED + 2, _VALIDATION_PROBLEMS, held_out=True) + problems(
        _SEED + 3, _VALIDATION_UNSEEN_WORDINGS, held_out=True, unseen_wordings=True
    )
    return {
        TRAIN_FILE: _shuffled(
            [*training_prose, *_documents(p for p in word_problems if p.prompt not in genius_prompts)]
        ),
        VALIDATION_FILE: _shuffled([*held_out_prose, *_documents(validation)]),
        GENIUS_FILE: _shuffled(_documents(genius)),
        CHAT_FILE: _conversations([p for p in problems(_SEED + 4, _CHAT_PROBLEMS) if p.prompt not in genius_prompts]),
    }


def _conversations(problems: Sequence[Problem]) -> list[dict[str, Any]]:
    """Return conversations of one to three questions each; every other one ends with thanks."""
    conversations: list[dict[str, Any]] = []
    remaining = list(problems)
    while remaining:
        n_turns = _CHAT_TURNS[len(conversations) % len(_CHAT_TURNS)]
        turns = [
            (problem.prompt.removeprefix(_QUESTION).partition(_ANSWER)[0], f"Sure! {problem.answer_text}")
            for problem in remaining[:n_turns]
        ]
        if len(conversations) % 2:
            turns.append(("Thank you!", "You are welcome."))
        messages = [
            {"role": role, "content": content}
            for turn in turns
            for role, content in zip(("user", "assistant"), turn, strict=True)
        ]
        conversations.append({"messages": messages})
        remaining = remaining[n_turns:]
    return conversations


def _documents(problems: Iterable[Problem]) -> list[Document]:
    return [Document(f"problem:{p.template}", p.text) for p in problems]


def _shuffled(documents: list[Document]) -> list[dict[str, Any]]:
    """Return the documents sorted by the hash of their text, an order that is the same on all machines."""
    documents = sorted(documents, key=lambda d: hashlib.blake2b(d.text.encode()).digest())
    return [{"text": document.text, "source": document.source} for document in documents]


def _write(path: Path, rows: list[dict[str, Any]]) -> int:
    """Write the file atomically and return its size in bytes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with replacing(path, temporary), temporary.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return path.stat().st_size
