"""Files, folders, globs and URIs → the files behind them.

One way for the local disk and for every `pyarrow.fs` store (s3://, gs://, hdfs://).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.fs as pafs

from savant_ray.errors import DataError

CODECS = {".gz": "gzip", ".zst": "zstd"}
SUFFIXES = tuple(suffix + packed for suffix in (".jsonl", ".json", ".ndjson") for packed in ("", *CODECS))


@dataclass(frozen=True)
class SourceFile:
    """A file of JSON lines: an absolute path or a URI, and what tells whether it changed."""

    path: str
    size: int  # bytes as stored
    mtime_ns: int
    query: str = ""  # options of a URI: "?endpoint_override=…"

    @property
    def codec(self) -> str | None:
        """The compression, known by the file's suffix."""
        return CODECS.get(PurePosixPath(self.path).suffix)

    def resolve(self) -> tuple[pafs.FileSystem, str]:
        """The file system and the path in it."""
        return _resolve(self.path + self.query)


def expand(pattern: str | Sequence[str]) -> list[SourceFile]:
    """The files behind a path, folder (recursively), glob or `pyarrow.fs` URI, sorted, each once.

    Raises:
        DataError: nothing is there; names the pattern.
    """
    patterns = [pattern] if isinstance(pattern, str) else pattern
    found = {file.path: file for each in patterns for file in _expand_one(each)}
    return [found[path] for path in sorted(found)]


def is_uri(path: str) -> bool:
    """Whether it names a place that `pyarrow.fs` reaches."""
    return "://" in path


def split_query(path: str) -> tuple[str, str]:
    """A URI, and its options from the `?` on; a local path has none."""
    base, mark, options = path.partition("?") if is_uri(path) else (path, "", "")
    return base, mark + options


def _resolve(pattern: str) -> tuple[pafs.FileSystem, str]:
    """The file system and the path in it; a URI's wildcards are kept from the URI parser, `?` begins its options."""
    if not is_uri(pattern):
        return pafs.LocalFileSystem(), os.path.abspath(Path(pattern).expanduser())  # noqa: PTH100 - links stay as they are
    path, query = split_query(pattern)
    plain = _fixed_folder(path) if _is_glob(path) else path
    filesystem, resolved = pafs.FileSystem.from_uri(plain + query)
    return filesystem, resolved + path[len(plain) :]


def _expand_one(pattern: str) -> list[SourceFile]:
    try:
        filesystem, path = _resolve(pattern)
        info = filesystem.get_file_info(path)
        if info.type == pafs.FileType.File:
            infos = [info]
        elif info.type == pafs.FileType.Directory:
            infos = [each for each in _files_below(filesystem, path) if each.path.endswith(SUFFIXES)]
        else:
            infos = _matching(filesystem, path) if _is_glob(path) else []
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{pattern}: cannot be listed ({error})") from error
    if not infos:
        raise DataError(_nothing_found(pattern, info.type == pafs.FileType.Directory))
    prefix, query = _around(pattern, path)
    return [SourceFile(prefix + each.path, each.size, each.mtime_ns or 0, query) for each in infos]


def _around(pattern: str, path: str) -> tuple[str, str]:
    """What a URI has before the path in its file system, and its options."""
    uri, query = split_query(pattern)
    return (uri.rstrip("/").removesuffix(path), query) if is_uri(uri) else ("", "")


def _nothing_found(pattern: str, is_folder: bool) -> str:
    if is_folder:
        return f"{pattern}: the folder holds no {', '.join(SUFFIXES[::3])} …"
    return f"{pattern}: no such {'match' if _is_glob(pattern) else 'file or folder'}"


def _matching(filesystem: pafs.FileSystem, path: str) -> list[pafs.FileInfo]:
    folder = _fixed_folder(path)
    deep = "/" in path[len(folder) :].lstrip("/")
    matches = _glob_expression(path).fullmatch
    return [each for each in _files_below(filesystem, folder, deep) if matches(each.path)]


def _files_below(filesystem: pafs.FileSystem, folder: str, deep: bool = True) -> list[pafs.FileInfo]:
    """Files but the hidden ones, which editors and notebooks leave."""
    infos = filesystem.get_file_info(pafs.FileSelector(folder, recursive=deep, allow_not_found=True))
    return [each for each in infos if each.type == pafs.FileType.File and "/." not in each.path[len(folder) :]]


def _is_glob(path: str) -> bool:
    return any(character in path for character in "*?[")


def _fixed_folder(path: str) -> str:
    """The deepest folder above every match of a glob."""
    return re.split(r"[*?\[]", path, maxsplit=1)[0].rpartition("/")[0] or "/"


def _glob_expression(path: str) -> re.Pattern[str]:
    """`*` and `?` stay within a folder, `**/` crosses folders, `[…]` is a set of characters."""
    meanings = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", path)
    literal_at_even = (part if i % 2 else re.escape(part) for i, part in enumerate(parts))
    return re.compile("".join(meanings.get(part, part.replace("[!", "[^")) for part in literal_at_even))
