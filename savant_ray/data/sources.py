"""Files, folders, globs and URIs → the files behind them.

The same rules for the local disk and for every `pyarrow.fs` store (s3://, gs://, hdfs://, hf://). Local folders are
listed by Python, because Arrow raises for a name that is not UTF-8 and follows a link back to its own folder 40 times.
"""

# ruff: noqa: PTH112, PTH114, PTH115, PTH116, PTH118, PTH119, PTH120, PTH123, PTH207
# Names may hold bytes that are no UTF-8, links may loop, rights may be missing: os.path answers where Path raises.

from __future__ import annotations

import errno
import glob
import logging
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path, PurePosixPath

import pyarrow.fs as pafs

from savant_ray.data.formats import CODECS, HEAD_BYTES, format_of
from savant_ray.errors import DataError, SavantError
from savant_ray.locations import (
    absolute_path,
    canonical_uri,
    decoded_uri,
    encoded_uri,
    is_standard_stream,
    is_uri,
    printable,
    split_query,
    why,
)

PLAIN_SUFFIXES = (".jsonl", ".json", ".ndjson")
SUFFIXES = tuple(suffix + packed for suffix in PLAIN_SUFFIXES for packed in ("", *CODECS))
NAMED_AT_MOST = 5  # of the files that a warning or error is about
GCS_SECONDS = 30  # of retries; by default its client tries for 15 minutes where there is no network
LISTING_THREADS = 16  # a network file system answers each with a delay

Warn = Callable[[str], None]


@dataclass(frozen=True)
class SourceFile:
    """A file of JSON lines, and what tells whether it has changed since it was listed."""

    path: str  # absolute, or a URI with `%20` decoded
    size: int  # bytes as stored
    mtime_ns: int
    query: str = ""  # options of a URI: "?endpoint_override=…"
    version: str = ""  # of a local file: inode and time of the last change of content or attributes
    format: str = ""  # by the first bytes: a name in `formats.READABLE`; "": go by the suffix

    @property
    def codec(self) -> str | None:
        """How its bytes become UTF-8 lines: a compression or an encoding; None if they are."""
        if self.format:
            return None if self.format == "text" else self.format
        return CODECS.get(PurePosixPath(self.path).suffix.lower())

    def resolve(self) -> tuple[pafs.FileSystem, str]:
        """Return the file system and the path in it.

        Raises:
            DataError: the URI's file system cannot be used.
        """
        if not is_uri(self.path):
            return pafs.LocalFileSystem(), self.path
        return file_system(encoded_uri(self.path) + self.query, DataError)

    def current(self) -> SourceFile:
        """Return the file as it is now; size and times differ if it was changed.

        Raises:
            DataError: it is gone or cannot be reached.
        """
        if not is_uri(self.path):
            return _local_file(self.path, self.path)
        filesystem, path = self.resolve()
        with _errors_named(self.path):
            info = filesystem.get_file_info(path)
        if info.type != pafs.FileType.File:
            raise DataError(f"{printable(self.path)}: was there a moment ago and is gone")
        return SourceFile(self.path, info.size, info.mtime_ns or 0, self.query)


def expand(pattern: str | Sequence[str], warn: Warn | None = None) -> list[SourceFile]:
    """List the files behind a path, folder (recursively), glob or URI, sorted, each once.

    In a glob `*`, `?` and `[…]` stay within a folder and `**` crosses folders. A name is read literally first, so that
    the folder `[2024-01]` is found. `warn` (by default the log) receives a line for each thing that is left
    out: broken links, names that are not UTF-8, folders that may not be read, files that are listed under two names.

    Raises:
        DataError: nothing is there, or what is there cannot be read as text; names the pattern.
    """
    warn = warn or logging.getLogger(__name__).warning
    patterns = [pattern] if isinstance(pattern, str) else pattern
    if not patterns or "" in patterns:
        raise DataError("no file, folder, glob or URI is given")
    found: dict[str, SourceFile] = {}
    for each in patterns:
        for file in _remote_files(each) if is_uri(each) else _local_files(each, warn):
            found.setdefault(file.path, file)
    return _each_once([found[path] for path in sorted(found)], warn)


def refuse_empty(files: Sequence[SourceFile]) -> None:
    """Check that there is anything to read; some empty files among others do not matter.

    Raises:
        DataError: all files are empty.
    """
    if not any(file.size for file in files):
        raise DataError(
            f"{printable(files[0].path)}: is empty" + f", as are all {len(files):,} files" * (len(files) > 1)
        )


def file_system(uri: str, error: type[SavantError]) -> tuple[pafs.FileSystem, str]:
    """Return the file system of a URI and the path in it.

    Raises:
        error: pyarrow knows no such file system, or it cannot be used on this machine.
    """
    uri = canonical_uri(uri, error=error)
    base, query = split_query(uri)
    decoded = decoded_uri(base)
    try:
        filesystem, path = pafs.FileSystem.from_uri(encoded_uri(decoded) + query)
    except Exception as reason:  # ArrowInvalid, OSError, ImportError, or any error of a file system written in Python
        raise error(f"{printable(decoded + query)}: no storage that could be used ({why(reason)})") from reason
    return filesystem, path


def with_short_retries(uri: str) -> str:
    """Return the URI with a limit for the retries of Google Cloud Storage's client, unless it has one."""
    base, query = split_query(uri)
    if not base.lower().startswith(("gs://", "gcs://")) or "retry_limit_seconds" in query:
        return uri
    return f"{base}{query or '?'}{'&' * bool(query.removeprefix('?'))}retry_limit_seconds={GCS_SECONDS}"


def _each_once(files: Sequence[SourceFile], warn: Warn) -> list[SourceFile]:
    """Drop local files that are another one of them under a second name: links."""
    real_folder = cache(os.path.realpath)

    def real_path(path: str) -> str:
        if is_uri(path):
            return path
        if os.path.islink(path):
            return os.path.realpath(path)
        return os.path.join(real_folder(os.path.dirname(path)), os.path.basename(path))

    real = {file.path: real_path(file.path) for file in files}
    first: dict[str, str] = {}
    for path in sorted(real, key=lambda path: (real[path] != path, path)):  # links last
        first.setdefault(real[path], path)
    twice = [path for path in real if first[real[path]] != path]
    _warn_of(
        warn,
        [
            f"{printable(path)}: a link to {printable(first[real[path]])}, which is read already; left out"
            for path in twice
        ],
    )
    return [file for file in files if file.path not in set(twice)]


def _warn_of(warn: Warn, texts: Sequence[str]) -> None:
    for text in _shortened(texts):
        warn(text)


def _shortened(texts: Sequence[str]) -> list[str]:
    """The first of them and how many more there are."""
    more = len(texts) - NAMED_AT_MOST
    return [*texts[:NAMED_AT_MOST], *([f"… and {more:,} more like this"] if more > 0 else [])]


@contextmanager
def _errors_named(pattern: str) -> Iterator[None]:
    """Turn whatever a file system raises inside a `with` block into a `DataError` that names the pattern."""
    try:
        yield
    except SavantError:
        raise
    except Exception as error:  # a file system that is written in Python may raise anything
        raise DataError(f"{printable(pattern)}: cannot be listed ({why(error)})") from error


def _local_files(pattern: str, warn: Warn) -> list[SourceFile]:
    path = _without_dots(absolute_path(pattern, error=DataError))
    problems: list[str] = []
    with _errors_named(pattern):
        is_folder = os.path.isdir(path)
        if not is_folder and (is_standard_stream(path) or _is_there(path)):
            return [_local_file(path, pattern)]
        if is_folder:
            os.scandir(path).close()  # raises where it may not be listed
            paths = {each for each in _files_below(path, problems) if _has_suffix(each)}
        else:
            paths = set(_local_matches(path, problems))
        folders = {each for each in paths if os.path.isdir(each)}
    files, refused = _read_heads(sorted(paths - folders), problems)
    if refused:
        raise DataError("\n".join(_shortened(refused)))
    if not files:
        raise DataError("\n".join([_nothing_found(pattern, is_folder, bool(folders)), *_shortened(problems)]))
    _warn_of(warn, problems)
    return files


def _read_heads(paths: Sequence[str], problems: list[str]) -> tuple[list[SourceFile], list[str]]:
    """The files, and why others are refused; why more are left out goes to `problems`."""
    files, refused = [], []

    def read(path: str) -> SourceFile | DataError:
        try:
            return _local_file(path, path)
        except DataError as error:
            return error

    with ThreadPoolExecutor(LISTING_THREADS) as threads:
        for file in threads.map(read, paths):
            if isinstance(file, SourceFile):
                files.append(file)
            elif isinstance(file, _NotAFileError):
                problems.append(f"{file}; left out")
            else:
                refused.append(str(file))
    return files, refused


class _NotAFileError(DataError):
    """A broken link, a device, a pipe, or a name that is not UTF-8: in a folder it is left out."""


def _local_file(path: str, named: str) -> SourceFile:
    """Raise `DataError` for what is no regular file with text, without opening a device or a pipe."""
    named = printable(named)
    if not _is_utf8(path):
        raise _NotAFileError(f"{named}: its name is not UTF-8; rename it")
    if is_standard_stream(path):
        raise _NotAFileError(f"{named}: is not the same file in every process; write the text to a file first")
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise _NotAFileError(f"{named}: is a {_kind(status.st_mode)}, not a file")
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
    except FileNotFoundError:
        if os.path.islink(path):
            raise _NotAFileError(f"{named}: a broken link, to {printable(os.readlink(path))}") from None
        raise _NotAFileError(f"{named}: was there a moment ago and is gone") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _NotAFileError(f"{named}: a link that leads back to itself") from error
        raise DataError(f"{named}: cannot be read ({why(error)})") from error
    version = f"{status.st_ino}-{status.st_ctime_ns}"
    return SourceFile(path, status.st_size, status.st_mtime_ns, "", version, format_of(head, named))


def _is_there(path: str) -> bool:
    """Also if it is a broken link. Raises OSError where it cannot be known."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(mode: int) -> str:
    names = {stat.S_ISDIR: "folder", stat.S_ISFIFO: "pipe", stat.S_ISSOCK: "socket"}
    return next((name for is_one, name in names.items() if is_one(mode)), "device")


def _without_dots(path: str) -> str:
    """Resolve `..` as the operating system does, that is behind links."""
    parts = Path(path).parts
    if ".." in parts:
        end = len(parts) - parts[::-1].index("..")
        return str(Path(os.path.realpath(Path(*parts[:end])), *parts[end:]))
    return str(Path(path))


def _files_below(folder: str, problems: list[str]) -> Iterator[str]:
    for each in _folders_below(folder, problems):
        for entry in _entries(each, problems):
            if not _is_folder(entry):
                yield entry.path


def _folders_below(folder: str, problems: list[str]) -> Iterator[str]:
    """The folder and those below it but hidden ones, each once whatever links lead to it; links are followed last."""
    seen = set[str]()
    waiting: list[str] = [folder]
    links: list[str] = []
    while waiting or links:
        each = waiting.pop() if waiting else links.pop()
        if (real := os.path.realpath(each)) in seen:
            continue
        seen.add(real)
        yield each
        for entry in _entries(each, problems):
            if _is_folder(entry):
                (links if entry.is_symlink() else waiting).append(entry.path)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or to what may not be read
        return False


def _entries(folder: str, problems: list[str]) -> list[os.DirEntry[str]]:
    """What lies in the folder but hidden names, which editors and notebooks leave."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        if (problem := f"{printable(folder)}: cannot be listed ({why(error)}); left out") not in problems:
            problems.append(problem)
        return []


def _local_matches(path: str, problems: list[str]) -> list[str]:
    """The matches of a glob; if there are none, those with brackets read literally."""
    if not _is_glob(path):
        return []
    fixed, rest = _fixed_folder(re.sub(r"(?<=/)\*\*(?=[^/])", "**/*", path))  # `**.jsonl` crosses folders, too
    if os.path.isdir(fixed) and not os.access(fixed, os.R_OK | os.X_OK):
        problems.append(f"{printable(fixed)}: may not be read by this user")
    return list(_glob_below(fixed, rest, problems)) or list(_glob_below(fixed, rest.replace("[", "[[]"), problems))


def _glob_below(folder: str, pattern: str, problems: list[str]) -> Iterator[str]:
    """`glob.glob(recursive=True)`, but a folder that links lead back to is entered once."""
    before, deep, after = _split_at_double_star(pattern)
    if not deep:
        yield from glob.glob(os.path.join(glob.escape(folder), pattern))
        return
    starts = glob.glob(os.path.join(glob.escape(folder), before)) if before else [folder]
    for start in filter(os.path.isdir, starts):
        for each in _folders_below(start, problems):
            yield from _glob_below(each, after or "*", problems)


def _split_at_double_star(pattern: str) -> tuple[str, bool, str]:
    parts = pattern.split("/")
    if "**" not in parts:
        return pattern, False, ""
    at = parts.index("**")
    after = parts[at + 1 :]
    while after[:1] == ["**"]:
        del after[0]
    return "/".join(parts[:at]), True, "/".join(after)


def _fixed_folder(path: str) -> tuple[str, str]:
    """The deepest folder that is there under its literal name, and the rest of the glob."""
    parts = path.split("/")
    ends = range(1, len(parts))
    at = next((i for i in ends if _is_glob(parts[i]) and not os.path.isdir("/".join(parts[: i + 1]))), len(parts) - 1)
    return "/".join(parts[:at]) or "/", "/".join(parts[at:])


def _is_glob(path: str) -> bool:
    return any(character in path for character in "*?[")


def _has_suffix(path: str) -> bool:
    return path.lower().endswith(SUFFIXES)


def _nothing_found(pattern: str, is_folder: bool, only_folders: bool = False) -> str:
    shown = printable(pattern)
    if is_folder:
        return f"{shown}: the folder holds no {', '.join(PLAIN_SUFFIXES)} …"
    if only_folders:
        return f"{shown}: no such match; it matches folders only, whose files are {shown.rstrip('/')}/**/*.jsonl"
    hint = ""
    if "{" in pattern and "," in pattern:
        hint = "; {a,b} is no pattern here, give a list of both"
    elif "\\" in pattern:
        hint = "; folders are separated by /, not by \\"
    return f"{shown}: no such {'match' if _is_glob(pattern) else 'file or folder'}{hint}"


def _remote_files(pattern: str) -> list[SourceFile]:
    uri, query = split_query(canonical_uri(pattern, error=DataError))
    uri = decoded_uri(uri)
    uri = uri if uri.endswith("://") else uri.rstrip("/")
    filesystem, path = file_system(with_short_retries(encoded_uri(uri) + query), DataError)
    with _errors_named(pattern):
        info = filesystem.get_file_info(path)
        if info.type == pafs.FileType.File:
            return [SourceFile(uri, info.size, info.mtime_ns or 0, query)]
        is_folder = info.type == pafs.FileType.Directory
        if is_folder:
            infos = [each for each in _remote_infos(filesystem, path, deep=True) if _has_suffix(each.path)]
        elif _is_glob(path):
            wildcards = re.search(r"[^/]*[*?\[].*", path)
            rest = wildcards[0] if wildcards else ""
            uri, path = (each.removesuffix(rest).rstrip("/") for each in (uri, path))
            infos = _remote_matches(filesystem, path, rest)
            if not infos and "[" in rest:  # as in `_local_matches`
                infos = _remote_matches(filesystem, path, rest.replace("[", "[[]"))
        else:
            infos = []
    if not infos:
        raise DataError(_nothing_found(pattern, is_folder))
    return [SourceFile(uri + each.path[len(path) :], each.size, each.mtime_ns or 0, query) for each in infos]


def _remote_matches(filesystem: pafs.FileSystem, folder: str, pattern: str) -> list[pafs.FileInfo]:
    pattern = re.sub(r"(?:(?<=/)|^)\*\*(?=[^/])", "**/*", pattern)
    parts = pattern.split("/")
    wanted = [part for i, part in enumerate(parts) if part != "**" or parts[i - 1 : i] != ["**"]]
    infos = _remote_infos(filesystem, folder, deep=len(wanted) > 1 or wanted == ["**"])
    return [each for each in infos if _matches(each.path[len(folder) :].strip("/").split("/"), wanted)]


def _remote_infos(filesystem: pafs.FileSystem, folder: str, deep: bool) -> list[pafs.FileInfo]:
    infos = filesystem.get_file_info(pafs.FileSelector(folder, recursive=deep, allow_not_found=True))
    return [each for each in infos if each.type == pafs.FileType.File and "/." not in each.path[len(folder) :]]


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        if pattern[1:]:
            return any(_matches(parts[i:], pattern[1:]) for i in range(len(parts)))
        return True
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])
