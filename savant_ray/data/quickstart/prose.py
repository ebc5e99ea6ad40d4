"""Extracts English prose from the Python installation: the language reference and the documentation of the library.

Sources are `pydoc_data.topics` and the docstrings and longer comments of the standard library, read from the source
files without importing them. The documents depend only on the version of Python and on the modules that its distribution
includes.

No paragraph occurs twice, and none combines a held-out pair of numbers. Documents of whole packages and topics are held
out, selected by a hash of their name; held-out documents that share more than a few passages with the training documents
are dropped.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from savant_ray.data.quickstart.problems import is_held_out
from savant_ray.data.quickstart.wordings import is_chosen

HELD_OUT_FRACTION = 0.04
DOCUMENT_CHARACTERS = 3000  # a document ends with the paragraph that reaches this length

# Generated tables, modules that some distributions package separately, and tests.
_SKIPPED = frozenset(
    "__pycache__ _pyrepl distutils encodings ensurepip idlelib lib2to3 pydoc_data"
    " dist-packages site-packages test tests tkinter turtledemo".split()
)
_MIN_DOCSTRING_CHARACTERS = 60
_MIN_COMMENT_CHARACTERS = 150
_SHINGLE_WORDS = 8
_MAX_SHARED_SHINGLES = 0.05  # a held-out document that shares a larger fraction of its 8-word passages is dropped

_COMMENT_BLOCK = re.compile(r"(?:^[ \t]*#[^\n]*\n){3,}", re.MULTILINE)
_RULER = re.compile(r"^[ \t]*[-=~*^#+_\"']{4,}[ \t]*$", re.MULTILINE)
_COMBINATION = re.compile(r"(?<![\w.])(\d+) ?(?:[-+*/<>=]|and|or|plus|minus|times) ?(\d+)(?![\w.])")


@dataclass(frozen=True)
class Document:
    """A document; `source` is for instance `topic:lambda` or `module:heapq`."""

    source: str
    text: str


@cache
def prose() -> tuple[list[Document], list[Document]]:
    """Return training and held-out documents; both lists are empty if Python was installed without its sources."""
    seen: set[str] = set()
    documents = [
        Document(source, text)
        for source, passages in [*_topics(), *_modules()]
        for text in _join(source, _new_paragraphs(passages, seen))
    ]
    training = [d for d in documents if not _is_held_out_source(d.source)]
    known = {shingle for d in training for shingle in _shingles(d.text)}
    held_out = [d for d in documents if _is_held_out_source(d.source) and _is_new(d.text, known)]
    return training, held_out


def _topics() -> Iterator[tuple[str, list[str]]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it separately
        return
    for name in sorted(topics):
        yield f"topic:{name}", [topics[name]]


def _modules() -> Iterator[tuple[str, list[str]]]:
    library = Path(sysconfig.get_path("stdlib"))
    for path in _source_files(library):
        parts = path.relative_to(library).with_suffix("").parts
        yield "module:" + ".".join(parts).removesuffix(".__init__"), _passages(path)


def _source_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name in _SKIPPED or path.name.startswith(("config-", "_sysconfigdata")):
            continue
        if path.is_dir():
            yield from _source_files(path)
        elif path.suffix == ".py":
            yield path


def _passages(path: Path) -> list[str]:
    """Return the docstrings, each after its signature, and the comments of a source file, in the order of the file."""
    try:
        with tokenize.open(path) as file:
            code = file.read()
        tree = ast.parse(code)
    except (OSError, SyntaxError, ValueError):
        return []
    passages = sorted([*_docstrings(tree), *_comments(code)])
    return [text.encode("utf-8", "ignore").decode() for _, text in passages]  # without lone surrogates


def _docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in [tree, *_statements(tree)]:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring and len(docstring) >= _MIN_DOCSTRING_CHARACTERS:
                yield getattr(node, "lineno", 0), f"{_heading(node)}{docstring}"


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield all statements below a node; expressions, about 90 % of the nodes, contain no docstrings and are skipped."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.ExceptHandler):
            yield child
            yield from _statements(child)


def _heading(node: ast.AST) -> str:
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}:\n"
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"{node.name}({ast.unparse(node.args)}):\n"
    return ""


def _comments(code: str) -> Iterator[tuple[int, str]]:
    for block in _COMMENT_BLOCK.finditer(code):
        text = re.sub(r"^[ \t]*#+ ?", "", block[0], flags=re.MULTILINE).strip()
        if len(text) >= _MIN_COMMENT_CHARACTERS and not re.search("copyright|licen[cs]e", text, re.IGNORECASE):
            yield code.count("\n", 0, block.start()) + 1, text


def _new_paragraphs(passages: Iterable[str], seen: set[str]) -> Iterator[str]:
    """Yield the paragraphs that are not in `seen` and combine no held-out pair of numbers; add them to `seen`."""
    for passage in passages:
        for paragraph in re.split(r"\n[ \t]*\n", _RULER.sub("", passage.expandtabs())):
            key = " ".join(paragraph.lower().split())
            if key and key not in seen and not _combines_held_out(paragraph):
                seen.add(key)
                yield "\n".join(line.rstrip() for line in paragraph.strip("\n").splitlines())


def _combines_held_out(text: str) -> bool:
    """Return whether the text combines a held-out pair of numbers with an operator or a word such as `plus`."""
    return any(is_held_out(int(x), int(y)) for x, y in _COMBINATION.findall(text))


def _join(source: str, paragraphs: Iterable[str]) -> Iterator[str]:
    """Join paragraphs to documents of about `DOCUMENT_CHARACTERS`, each with the name of the source as its title."""
    title = source.replace(":", " ").capitalize()
    parts: list[str] = []
    for paragraph in paragraphs:
        parts.append(paragraph)
        if sum(map(len, parts)) >= DOCUMENT_CHARACTERS:
            yield "\n\n".join([title, *parts])
            parts = []
    if sum(map(len, parts)) >= _MIN_COMMENT_CHARACTERS:
        yield "\n\n".join([title, *parts])


def _is_held_out_source(source: str) -> bool:
    """Return whether a source is held out; modules of a package are held out together, because their texts are similar."""
    return is_chosen(source.partition(".")[0], HELD_OUT_FRACTION)


def _shingles(text: str) -> Iterator[str]:
    words = re.findall(r"\w+", text.lower())
    return (" ".join(words[i : i + _SHINGLE_WORDS]) for i in range(len(words) - _SHINGLE_WORDS + 1))


def _is_new(text: str, known: set[str]) -> bool:
    shingles = list(_shingles(text))
    return sum(s in known for s in shingles) <= _MAX_SHARED_SHINGLES * len(shingles)
