"""The quickstart's text, made on the spot: prose that Python brings along, and problems with worked answers.

Three files of one `{"text": …, "source": …}` object per line:

    savant_dataset_train.jsonl   prose, and word problems
    savant_dataset_val.jsonl     held-out prose, and problems on held-out pairs of operands, some worded as in no other
    genius_dataset.jsonl         problems of every template

What is held out, and how strictly: `prose` and `problems` say it for their kind. Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from savant_ray.data.quickstart.problems import TEMPLATES, Problem, is_held_out, problems
from savant_ray.data.quickstart.prose import Document, prose
from savant_ray.errors import DataError

__all__ = ["GENIUS_FILE", "TRAIN_FILE", "VALIDATION_FILE", "Problem", "is_held_out", "problems", "write_quickstart"]

TRAIN_FILE = "savant_dataset_train.jsonl"
VALIDATION_FILE = "savant_dataset_val.jsonl"
GENIUS_FILE = "genius_dataset.jsonl"

_GENIUS_PROBLEMS = 26_000
_WORD_PROBLEMS = 6_000
_VALIDATION_PROBLEMS = 400
_VALIDATION_UNSEEN_WORDINGS = 100
_HARD = ("product", "product", "difference", "comparison")  # templates that take longest to learn have further turns
_SEED = 20240


def write_quickstart(folder: Path, force: bool = False, say: Callable[[str], None] = print) -> None:
    """Write the three files into `folder`; those that are there already stay, but for `force`.

    The same Python version always writes the same bytes. Raises DataError where the folder cannot be written or
    Python came without the sources of its library.
    """
    wanted = (TRAIN_FILE, VALIDATION_FILE, GENIUS_FILE)
    missing = [name for name in wanted if force or not (folder / name).exists()]
    if not missing:
        say(f"quickstart data: already in {folder}")
        return
    say(f"quickstart data: collecting prose and making problems for {folder} …")
    started = time.monotonic()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = _make()
        for name in missing:
            size = _write(folder / name, files[name])
            say(f"quickstart data: {name} has {len(files[name]):,} documents, {size / 1e6:.1f} MB")
    except OSError as error:
        raise DataError(f"{folder}: the quickstart data cannot be written here ({error.strerror or error})") from error
    say(f"quickstart data: ready after {time.monotonic() - started:.0f} s")


def _make() -> dict[str, list[Document]]:
    """The documents of each file, shuffled."""
    training_prose, held_out_prose = prose()
    if not training_prose or not held_out_prose:
        raise DataError(
            "quickstart data: this Python came without the sources of its standard library, which the quickstart's"
            " prose is taken from; use another Python, or your own text (data.quickstart: false, data.sources)"
        )
    genius = problems(_SEED, _GENIUS_PROBLEMS, templates=(*TEMPLATES, *_HARD))
    known = {problem.prompt for problem in genius}
    school = problems(_SEED + 1, _WORD_PROBLEMS, templates=("word_problem", "two_step"))
    validation = problems(_SEED + 2, _VALIDATION_PROBLEMS, held_out=True) + problems(
        _SEED + 3, _VALIDATION_UNSEEN_WORDINGS, held_out=True, unseen_wordings=True
    )
    return {
        TRAIN_FILE: _shuffled([*training_prose, *_documents(p for p in school if p.prompt not in known)]),
        VALIDATION_FILE: _shuffled([*held_out_prose, *_documents(validation)]),
        GENIUS_FILE: _shuffled(_documents(genius)),
    }


def _documents(found: Iterable[Problem]) -> list[Document]:
    return [Document(f"problem:{p.template}/{p.wording}", p.text) for p in found]


def _shuffled(documents: list[Document]) -> list[Document]:
    """By the hash of the text: mixed, and the same on every machine."""
    return sorted(documents, key=lambda d: hashlib.blake2b(d.text.encode()).digest())


def _write(path: Path, documents: list[Document]) -> int:
    """Write aside, rename last; returns the size in bytes."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("w", encoding="utf-8", newline="\n") as file:
            for document in documents:
                file.write(json.dumps({"text": document.text, "source": document.source}, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        size = aside.stat().st_size
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return size
