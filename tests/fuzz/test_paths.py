"""Paths, globs and URIs: for any text and any folder, files are found or each problem is reported in one line."""

from __future__ import annotations

import gzip
import os
import shutil
from collections.abc import Iterator
from contextlib import chdir, suppress
from pathlib import Path
from random import Random
from urllib.parse import quote

from savant_ray.config import Config
from savant_ray.data.content import content_hashes
from savant_ray.data.record_reader import documents
from savant_ray.data.sources import expand
from savant_ray.errors import DataError, SavantError, SettingsError
from savant_ray.locations import is_uri
from savant_ray.storage.paths import with_absolute_paths
from tests.fuzz.drawing import damaged, from_seed, random_text
from tests.fuzz.property import holds_for, scratch

TEXT = b'{"text": "x"}\n'
PARTS = (
    *(
        "a",
        "b",
        "c",
        "é",
        "漢字",
        " ",
        "#",
        "%",
        "%20",
        "%2F",
        "?",
        "&",
        "=",
        "+",
        ":",
        "@",
        "~",
        "-",
        "\\",
        "'",
        '"',
        "$",
    ),
    *("*", "**", "[1]", "[a-c]", "[z-a]", "[!a]", "[", "]", "{a,b}", "\n", "\x1b[31m", "\x7f", "r\udce9sum", "\ud83d"),
    *(".", "..", ".h", "~root", "~nobody_of_that_name", "file:", "s3:", "C:", "a" * 300, "\0"),
)
SUFFIXES = (".jsonl", ".jsonl", ".json", ".JSONL", ".jsonl.gz", ".GZ", ".zst", ".txt", "")
CONTENTS = (
    TEXT,
    TEXT,
    TEXT,
    TEXT * 3,
    b"",
    gzip.compress(TEXT),
    '{"text": "x"}'.encode("utf-16"),
    b"%PDF",
    b"[\n{}\n]",
    b"\0",
)
PREFIXES = (
    *("", "", "", "", "./", "../", "~/nowhere/", "~root/nowhere", "~nobody_of_that_name/", "TREE/", "TREE/", "TREE/"),
    *("/nowhere", "//nowhere/", "file:TREE/", "file://TREE/", "FILE://localhost/TREE/", "file://host/", "file:"),
    *(
        "mock://",
        "mock:///",
        "MOCK://a/",
        "foo://",
        "s3://b?unusual=",
        "hdfs://[",
        "://",
        "hf://",
        "/dev/",
        "/dev/fd/0/",
    ),
)


def random_name(rng: Random) -> str:
    """Return a name for a file or folder, except `.` and `..`."""
    parts = (*rng.choices(PARTS, k=rng.randrange(1, 3)), rng.choice(SUFFIXES))
    name = "".join(parts).replace("\0", "").replace("\ud83d", "")
    return name[:200] if name.strip(".") else "a"


def random_tree(rng: Random) -> list[tuple[str, bytes | str]]:
    """Return relative paths, each with the content of a file, the target of a link or, for a pipe, an empty target."""
    tree: list[tuple[str, bytes | str]] = []
    for _ in range(rng.randrange(1, 6)):
        path = "/".join(random_name(rng) for _ in range(rng.choice((1, 1, 2, 3))))
        content = rng.choice(CONTENTS)
        tree.append((path, damaged(content, rng) if rng.random() < 0.1 else content))
    for _ in range(rng.randrange(4)):
        target = rng.choice((".", "..", "gone", "/dev/zero", tree[0][0], tree[-1][0], random_name(rng)))
        tree.append((random_name(rng), target))
    return [*tree, (random_name(rng), "")] if rng.random() < 0.2 else tree


def random_pattern(rng: Random, tree: list[tuple[str, bytes | str]]) -> str:
    """Return an existing path, possibly modified, or a path, glob or URI of random parts."""
    parts = list(rng.choice(tree)[0].split("/")) if rng.random() < 0.6 else []
    for _ in range(rng.randrange(3)):
        at = rng.randrange(len(parts) + 1)
        piece = rng.choice((*PARTS, "**", "*", "?", random_text(rng)))
        parts[at : at + rng.randrange(2)] = [piece]
    pattern = rng.choice(PREFIXES) + "/".join(parts)
    absolute = os.path.abspath(os.path.expanduser(pattern))  # noqa: PTH100, PTH111 - by its text, and for any user
    is_whole_disk = ".." in pattern and absolute.count("/") < 2
    return "/nowhere" if is_whole_disk else pattern  # to search it would take a minute


def tree_and_pattern(rng: Random) -> tuple[list[tuple[str, bytes | str]], str]:
    """Return the content of a folder, and a pattern."""
    tree = random_tree(rng)
    return tree, random_pattern(rng, tree)


def plant(tree: list[tuple[str, bytes | str]]) -> tuple[Path, list[Path]]:
    """Create a folder with that tree, as far as the file system supports it; return it and its regular files."""
    folder = scratch() / "deep/down/below/tree"  # so that no `..` leads out of it
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    files = []
    for name, content in tree:
        path = folder / name
        with suppress(FileExistsError, NotADirectoryError, IsADirectoryError):  # an earlier entry has the name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
                files.append(path)
            elif content:
                path.symlink_to(content)
            else:
                os.mkfifo(path)
    return folder, sorted(set(files))


def check_message(text: str) -> None:
    for line in text.split("\n"):
        assert line.isprintable() and 0 < len(line) < 2_000


def texts_or_refusal(pattern: str) -> Iterator[str]:
    """Yield the documents of the files that match, or "" if the pattern is refused; check files and messages."""
    warned: list[str] = []
    try:
        files = expand(pattern, warned.append)
        real = [file.path if is_uri(file.path) else os.path.realpath(file.path) for file in files]
        assert len(set(real)) == len(real) > 0, "each file once"
        assert all(Path(path).is_file() for path in real)
        content_hashes(files, scratch() / "cache")
        yield from (document.text for document in documents(files))
    except SavantError as error:
        check_message(str(error))
        yield ""
    for line in warned:
        check_message(line)


@holds_for(
    "folders with up to 6 files and 4 links or pipes under unusual names, and a path, glob or URI in them or elsewhere",
    case=from_seed(tree_and_pattern),
)
def test_any_pattern_yields_each_file_once_or_a_one_line_message_per_problem(
    case: tuple[list[tuple[str, bytes | str]], str],
) -> None:
    tree, pattern = case
    folder, _ = plant(tree)
    with chdir(folder):
        found = list(texts_or_refusal(pattern.replace("TREE", str(folder))))
    assert len(found) <= sum(isinstance(content, bytes) for _, content in tree) * 3 + 1


@holds_for("the same folders", one_in=2, tree=from_seed(random_tree))
def test_a_file_with_any_name_is_found_by_its_path_and_uri(
    tree: list[tuple[str, bytes | str]],
) -> None:
    folder, files = plant(tree)
    for path in files:
        uri = "file://" + quote(os.fsencode(path))
        with chdir(folder):
            for pattern in (str(path), uri, f"./{path.relative_to(folder)}"):
                try:
                    assert [file.path for file in expand(pattern)] == [str(path)]
                except DataError as error:
                    check_message(str(error))
                    assert "no such" not in str(error) and "no user" not in str(error)


@holds_for("unusual texts as each setting that is a path", case=from_seed(tree_and_pattern))
def test_any_text_as_a_path_setting_becomes_an_absolute_path_or_uri_or_is_refused(
    case: tuple[list[tuple[str, bytes | str]], str],
) -> None:
    settings = Config().to_dict()
    text = case[1].encode("utf-8", "ignore").decode() or "x"
    for section, name in (("run", "storage_path"), ("run", "init_from"), ("data", "cache_dir"), ("data", "validation")):
        changed = {**settings, section: {**settings[section], name: text}}
        try:
            config = with_absolute_paths(Config.from_dict(changed), Path("/in"), Path("/out"))
        except SettingsError as error:
            assert str(error).startswith(f"{section}.{name}: ")
            check_message(str(error))
        else:
            value = config.to_dict()[section][name]
            assert is_uri(value) or value.startswith("/")
            assert with_absolute_paths(config, Path("/elsewhere"), Path("/elsewhere")) == config
