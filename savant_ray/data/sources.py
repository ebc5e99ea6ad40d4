"""Lists the source files that paths, folders, globs and URIs refer to.

The rules are the same for local files and for all `pyarrow.fs` file systems (s3://, gs://, hdfs://, hf://), except that `?`
begins the options of a URI and is no wildcard there. Local folders are listed with `os`: Arrow raises an error for a name
that is not UTF-8, and follows a cycle of symbolic links 40 times.
"""

# ruff: noqa: PTH109, PTH112, PTH113, PTH114, PTH115, PTH116, PTH118, PTH119, PTH120, PTH123, PTH207
# For names that are not UTF-8, link cycles and missing permissions, os.path returns a result where Path raises an error.

from __future__ import annotations

import errno
import glob
import logging
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path

import pyarrow.fs as pafs

from savant_ray.data.formats import CODECS, FORMAT_SUFFIXES, FORMATS, TABLES, data_suffix, inspect
from savant_ray.data.splits import CARD, choose_splits, names_by_split, split_of_folder, used_splits
from savant_ray.errors import DataError, SavantError
from savant_ray.locations import (
    absolute_path,
    canonical_uri,
    decoded_uri,
    encoded_uri,
    error_text,
    is_standard_stream,
    is_uri,
    printable,
    split_query,
)

HUB_SCHEME = "hf://datasets/"
DATA_SUFFIXES = tuple(dict.fromkeys(suffix for suffixes in FORMAT_SUFFIXES.values() for suffix in suffixes))
DATASET_FILES = ("dataset_info.json", "state.json")  # beside the Arrow files that `datasets.save_to_disk` writes
DATASET_DICT = "dataset_dict.json"  # above their folders
RUN_FILES = ("metrics.jsonl", "training_log.txt")  # in the folder of a run, from the start of its first attempt on
MAX_CARD_CHARACTERS = 1 << 20  # of the card of a data set that are read
MAX_NAMED = 5  # files that a warning or error names
GCS_RETRY_SECONDS = 30  # without a network the client would retry for 15 minutes by default
LISTING_THREADS = 16  # hide the latency of network file systems

Warn = Callable[[str], None]


@dataclass(frozen=True)
class SourceFile:
    """A file as it was listed; size, time and `version` identify its content."""

    path: str  # absolute, or a URI with `%20` decoded
    size: int  # bytes as stored
    mtime_ns: int
    query: str = ""  # options of a URI: "?endpoint_override=…"
    version: str = ""  # of a local file: inode and ctime
    # What `formats.inspect` returns; format "": not known yet, because a listing opens no file in object storage.
    encoding: str = field(default="", compare=False)
    format: str = field(default="", compare=False)
    format_setting: str = "auto"  # what the user has set: "auto", or one of `formats.FORMATS`
    text_blocks: bool = False  # of plain text: each block of lines between blank lines is a document
    quotes: bool = True  # of CSV: a field can be in quotes

    def inspected(self) -> SourceFile:
        """Return the file with encoding and format, which are detected by its first bytes if they are not known yet.

        Raises:
            DataError: the file cannot be read, or its format is not supported.
        """
        if self.format:
            return self
        filesystem, path = self.resolve()
        with errors_as_data_error(self.path, "read"), filesystem.open_input_file(path) as stored:
            encoding, detected = inspect(stored, printable(self.path), self.format_setting)
        return replace(self, encoding=encoding, format=detected)

    @property
    def reading(self) -> tuple[str | bool, ...]:
        """What determines, besides the content, which records are read."""
        without_quotes = () if self.quotes else ("without quotes",)
        return self.format_setting, self.text_blocks, data_suffix(self.path), *without_quotes

    @property
    def record_name(self) -> str:
        """What a message calls a record: a line, row, record, block or document."""
        if self.format == "text":
            return "block" if self.text_blocks else "document"
        return "row" if self.format in (*TABLES, "csv") else "record" if self.format == "json" else "line"

    def resolve(self) -> tuple[pafs.FileSystem, str]:
        """Return the file system and the path in it.

        Raises:
            DataError: the URI's file system cannot be used.
        """
        if not is_uri(self.path):
            return pafs.LocalFileSystem(), self.path
        return file_system(encoded_uri(self.path) + self.query, DataError)

    def current(self) -> SourceFile:
        """List the file again; size, time or version of the result differ if it was changed.

        Raises:
            DataError: it was removed or cannot be accessed.
        """
        if not is_uri(self.path):
            return _local_file(self.path, self.path, self.format_setting)
        filesystem, path = self.resolve()
        with errors_as_data_error(self.path, "listed"):
            info = filesystem.get_file_info(path)
        if info.type != pafs.FileType.File:
            raise DataError(f"{printable(self.path)}: was removed after it was listed")
        return replace(self, size=info.size, mtime_ns=info.mtime_ns or 0)


def expand(
    pattern: str | Sequence[str],
    warn: Warn | None = None,
    file_format: str = "auto",
    text_blocks: bool = False,
    splits: Sequence[str] = (),
    quotes: bool = True,
    cache_dir: str = "",
) -> list[SourceFile]:
    """Return the files of a path, folder (recursively), glob or URI, or of a list of them: sorted and without duplicates.

    In a glob, `*`, `?` and `[…]` match within a folder and `**` matches across folders. A path that exists is not treated
    as a glob, so a folder named `[2024-01]` can be used. `warn` (by default the logger) receives a message for broken links,
    names that are not UTF-8, folders without read permission and links to listed files, which are skipped. Hidden files, and
    files of a folder with other suffixes, are skipped without a message.

    Of a folder, the files with a suffix of a supported format are listed, or of `file_format` unless it is "auto". Plain
    text (.txt, .text, .md) is listed only if the folder contains no files in other formats, because a README.md or
    requirements.txt is not training text; the same holds for plain text that a glob matches. Plain text is always listed if
    its path is given, or with `file_format="text"`. Files in several formats are all listed, with a warning, because they
    may have the same documents. Of a folder that `datasets.save_to_disk` has written, the Arrow files with the data are
    listed.

    If a folder has several splits, only the files of the first one of `splits` that it has are listed, with a warning;
    without `splits` all are. The splits are the folders that `datasets.save_to_disk` has written, those that the card
    (README.md) of a data set of the Hub lists, or those in the names of files and folders (train.jsonl,
    data/test-00000-of-00001.parquet).

    What this program writes is no text: of a local folder or glob, the files in `cache_dir` (the folder of the token caches)
    and in run folders are skipped without a message, unless the path is in such a folder itself.

    Raises:
        DataError: there is no file, or a file cannot be read or has an unsupported format; or a folder is `cache_dir`. The
            message names the file or the pattern.
    """
    warn = warn or logging.getLogger(__name__).warning
    patterns = [pattern] if isinstance(pattern, str) else pattern
    if not patterns or "" in patterns:
        raise DataError("no file, folder, glob or URI is given")
    if file_format not in ("auto", *FORMATS):
        raise DataError(f"format: {printable(file_format)} is not one of auto, {', '.join(FORMATS)}")
    files: dict[str, SourceFile] = {}
    for item in patterns:
        listed = (
            _remote_files(item, file_format, splits, warn)
            if is_uri(item)
            else _local_files(item, file_format, splits, warn, cache_dir)
        )
        for file in listed:
            files.setdefault(file.path, replace(file, text_blocks=text_blocks, quotes=quotes))
    return _without_links([files[path] for path in sorted(files)], warn)


def relative_paths(files: Sequence[SourceFile]) -> list[str]:
    """Return the paths relative to the deepest common folder; unchanged if the files are in several file systems."""
    parts = [file.path.split("/") for file in files]
    folder = os.path.commonprefix([path[:-1] for path in parts])  # noqa: RUF071 - compares lists element by element
    return ["/".join(path[len(folder) :]) for path in parts]


def refuse_empty(files: Sequence[SourceFile]) -> None:
    """Check that at least one file is not empty.

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
        error: pyarrow does not support the scheme, or the file system cannot be used on this machine.
    """
    uri = canonical_uri(uri, error=error)
    base, query = split_query(uri)
    decoded = decoded_uri(base)
    try:
        filesystem, path = pafs.FileSystem.from_uri(encoded_uri(decoded) + query)
    except Exception as reason:  # ArrowInvalid, OSError, ImportError, or any exception of a file system in Python
        raise error(f"{printable(decoded + query)}: the file system cannot be used ({error_text(reason)})") from reason
    return filesystem, path


def with_short_retries(uri: str) -> str:
    """Add a time limit for retries to a URI of Google Cloud Storage that has none; return other URIs unchanged."""
    base, query = split_query(uri)
    if not base.lower().startswith(("gs://", "gcs://")) or "retry_limit_seconds" in query:
        return uri
    return f"{base}{query or '?'}{'&' * bool(query.removeprefix('?'))}retry_limit_seconds={GCS_RETRY_SECONDS}"


def _without_links(files: Sequence[SourceFile], warn: Warn) -> list[SourceFile]:
    """Drop symbolic links to local files that are in the list as well."""
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
    duplicates = {path: first[real[path]] for path in real if first[real[path]] != path}
    messages = [
        f"{printable(path)}: a link to {printable(other)}, which is already included; skipped"
        for path, other in duplicates.items()
    ]
    for message in _shortened(messages):
        warn(message)
    return [file for file in files if file.path not in duplicates]


def _shortened(messages: Sequence[str]) -> list[str]:
    """Return the first `MAX_NAMED` messages and one with the number of the others."""
    more = len(messages) - MAX_NAMED
    return [*messages[:MAX_NAMED], *([f"… and {more:,} more like this"] if more > 0 else [])]


@contextmanager
def errors_as_data_error(path: str, action: str) -> Iterator[None]:
    """Convert exceptions of file systems and decoders into a `DataError`: `path` cannot be read, or listed (`action`)."""
    try:
        yield
    except SavantError:
        raise
    except Exception as error:  # a file system in Python may raise any exception
        raise DataError(f"{printable(path)}: cannot be {action} ({error_text(error)})") from error


def _local_files(pattern: str, file_format: str, splits: Sequence[str], warn: Warn, cache_dir: str) -> list[SourceFile]:
    path = _resolve_parent_references(absolute_path(pattern, error=DataError))
    problems: list[str] = []
    with errors_as_data_error(pattern, "listed"):
        is_folder = os.path.isdir(path)
        if not is_folder and (is_standard_stream(path) or _exists(path)):
            return [_local_file(path, pattern, file_format)]
        if is_folder:
            os.scandir(path).close()  # raises if the user may not list it
            if cache_dir and os.path.realpath(path) == os.path.realpath(cache_dir):
                raise DataError(
                    f"{printable(pattern)}: is data.cache_dir, where the program writes files; keep the text in another "
                    "folder, or set data.cache_dir to one"
                )
            below = _without_outputs(path, _files_below(path, problems), cache_dir)
            paths = _of_folder(path, below, file_format, splits, _read_text, warn)
        else:
            matches = _without_outputs(_fixed_folder(path)[0], _local_matches(path, problems), cache_dir)
            paths = _without_dataset_files(matches)
            _warn_of_several_splits(pattern, paths, splits, warn)
        folders = {match for match in paths if os.path.isdir(match)}
    files, errors = _read_heads(sorted(paths - folders), file_format, problems)
    files = files if is_folder else _without_plain_text(files, file_format, warn)
    _warn_of_several_formats(pattern, files, file_format, warn)
    if errors:
        raise DataError("\n".join(_shortened(errors)))
    if not files:
        nothing = _nothing_found(pattern, is_folder, file_format, bool(folders))
        raise DataError("\n".join([nothing, *_shortened(problems)]))
    for message in _shortened(problems):
        warn(message)
    return files


def _read_heads(paths: Sequence[str], file_format: str, problems: list[str]) -> tuple[list[SourceFile], list[str]]:
    """Return the files, and the errors of unreadable ones; messages about skipped files are added to `problems`."""
    files, errors = [], []

    def read(path: str) -> SourceFile | DataError:
        try:
            return _local_file(path, path, file_format)
        except DataError as error:
            return error

    with ThreadPoolExecutor(LISTING_THREADS) as threads:
        for file in threads.map(read, paths):
            if isinstance(file, SourceFile):
                files.append(file)
            elif isinstance(file, _NotAFileError):
                problems.append(f"{file}; skipped")
            else:
                errors.append(str(file))
    return files, errors


class _NotAFileError(DataError):
    """Broken link, device, pipe, or name that is not UTF-8; skipped if a folder or glob contains it."""


def _local_file(path: str, name: str, format_setting: str) -> SourceFile:
    """List a regular file, which messages call `name`; raise `DataError` for anything else, and open no device or pipe."""
    name = printable(name)
    try:
        path.encode()
    except UnicodeEncodeError:
        raise _NotAFileError(f"{name}: its name is not UTF-8; rename it") from None
    if is_standard_stream(path):
        raise _NotAFileError(f"{name}: is not the same file in every process; write the text to a file first")
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise _NotAFileError(f"{name}: is a {_kind(status.st_mode)}, not a file")
        with open(path, "rb") as file:
            encoding, detected = inspect(file, name, format_setting)
    except FileNotFoundError:
        if os.path.islink(path):
            raise _NotAFileError(f"{name}: a broken link to {printable(os.readlink(path))}") from None
        raise _NotAFileError(f"{name}: was removed after it was listed") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _NotAFileError(f"{name}: a link that leads back to itself") from error
        raise DataError(f"{name}: cannot be read ({error_text(error)})") from error
    version = f"{status.st_ino}-{status.st_ctime_ns}"
    return SourceFile(path, status.st_size, status.st_mtime_ns, "", version, encoding, detected, format_setting)


def _exists(path: str) -> bool:
    """Return whether the path exists, possibly as a broken link. Raises OSError if that cannot be determined."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _kind(mode: int) -> str:
    names = {stat.S_ISDIR: "folder", stat.S_ISFIFO: "pipe", stat.S_ISSOCK: "socket"}
    return next((name for is_one, name in names.items() if is_one(mode)), "device")


def _resolve_parent_references(path: str) -> str:
    """Resolve `..` as the operating system does, after following links."""
    parts = Path(path).parts
    if ".." in parts:
        end = len(parts) - parts[::-1].index("..")
        return str(Path(os.path.realpath(Path(*parts[:end])), *parts[end:]))
    return str(Path(path))


def _files_below(folder: str, problems: list[str]) -> Iterator[str]:
    for subfolder in _folders_below(folder, problems):
        for entry in _entries(subfolder, problems):
            if not _is_folder(entry):
                yield entry.path


def _folders_below(folder: str, problems: list[str]) -> Iterator[str]:
    """Yield the folder and all folders in it except hidden ones, each once; symbolic links are followed last."""
    visited = set[str]()
    pending: list[str] = [folder]
    links: list[str] = []
    while pending or links:
        subfolder = pending.pop() if pending else links.pop()
        if (real := os.path.realpath(subfolder)) in visited:
            continue
        visited.add(real)
        yield subfolder
        for entry in _entries(subfolder, problems):
            if _is_folder(entry):
                (links if entry.is_symlink() else pending).append(entry.path)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or to a folder without read permission
        return False


def _entries(folder: str, problems: list[str]) -> list[os.DirEntry[str]]:
    """Return the entries of a folder except hidden ones, which editors and notebooks create."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        if (problem := f"{printable(folder)}: cannot be listed ({error_text(error)}); skipped") not in problems:
            problems.append(problem)
        return []


def _without_outputs(folder: str, paths: Iterable[str], cache_dir: str) -> Iterator[str]:
    """Leave out the paths that are, below `folder`, in the folder of the token caches or in that of a run."""
    cache_folder = os.path.realpath(cache_dir) if cache_dir else ""

    @cache
    def is_output(subfolder: str) -> bool:
        if len(subfolder) <= len(folder):
            return False
        if is_output(os.path.dirname(subfolder)) or os.path.realpath(subfolder) == cache_folder:
            return True
        return all(os.path.isfile(os.path.join(subfolder, name)) for name in RUN_FILES)

    return (path for path in paths if not is_output(os.path.dirname(path)))


def _local_matches(path: str, problems: list[str]) -> list[str]:
    """Return the matches of a glob; if there are none, those of the glob with its brackets taken literally."""
    if not _is_glob(path):
        return []
    fixed, rest = _fixed_folder(re.sub(r"(?<=/)\*\*(?=[^/])", "**/*", path))  # `**.jsonl` matches in subfolders too
    if os.path.isdir(fixed) and not os.access(fixed, os.R_OK | os.X_OK):
        problems.append(f"{printable(fixed)}: this user has no permission to read it")
    return list(_glob_below(fixed, rest, problems)) or list(_glob_below(fixed, rest.replace("[", "[[]"), problems))


def _glob_below(folder: str, pattern: str, problems: list[str]) -> Iterator[str]:
    """Yield the same matches as `glob.glob(recursive=True)`, but visit each folder once even if links form a cycle."""
    before, deep, after = _split_at_double_star(pattern)
    if not deep:
        yield from glob.glob(os.path.join(glob.escape(folder), pattern))
        return
    starts = glob.glob(os.path.join(glob.escape(folder), before)) if before else [folder]
    for start in filter(os.path.isdir, starts):
        for subfolder in _folders_below(start, problems):
            yield from _glob_below(subfolder, after or "*", problems)


def _split_at_double_star(pattern: str) -> tuple[str, bool, str]:
    """Return the part before the first `**`, whether there is a `**`, and the part after it."""
    parts = pattern.split("/")
    if "**" not in parts:
        return pattern, False, ""
    at = parts.index("**")
    after = parts[at + 1 :]
    while after[:1] == ["**"]:
        del after[0]
    return "/".join(parts[:at]), True, "/".join(after)


def _fixed_folder(path: str) -> tuple[str, str]:
    """Split a glob before its first part with a wildcard; a part such as `[2024]` has none if a folder has this name."""
    parts = path.split("/")
    ends = range(1, len(parts))
    at = next((i for i in ends if _is_glob(parts[i]) and not os.path.isdir("/".join(parts[: i + 1]))), len(parts) - 1)
    return "/".join(parts[:at]) or "/", "/".join(parts[at:])


def _is_glob(path: str) -> bool:
    return any(character in path for character in "*?[")


def _of_folder(
    folder: str, paths: Iterable[str], file_format: str, splits: Sequence[str], read: Callable[[str], str], warn: Warn
) -> set[str]:
    """Return the paths in a folder that have a suffix of the format and belong to the split.

    Plain text is used only if the format is text, or the folder has no other files. `read` returns the content of a file.
    """
    paths = set(paths)
    by_suffix = {path: format_by_suffix(path, file_format) for path in _of_saved_split(paths, splits, warn)}
    supported = {path for path, suffix_format in by_suffix.items() if suffix_format}
    structured = {path for path in supported if by_suffix[path] != "text"}
    files = _without_dataset_files(structured or supported)
    if not splits or any(os.path.basename(path) == DATASET_DICT for path in paths):
        return files
    card = os.path.join(folder, CARD)
    return _of_named_split(folder, files, read(card) if card in paths else "", splits, warn)


def _of_named_split(folder: str, paths: set[str], card: str, preferred_splits: Sequence[str], warn: Warn) -> set[str]:
    """Leave out the files of other splits, if the card or the names of the files tell several splits apart.

    Raises:
        DataError: there are splits, but not this one.
    """
    by_name = {os.path.relpath(path, folder): path for path in sorted(paths)}
    chosen = split_of_folder(list(by_name), card, preferred_splits)
    if chosen is None:
        return paths
    available = ", ".join(map(printable, chosen.available))
    if not chosen.files:
        splits = " or ".join(preferred_splits)
        raise DataError(f"{printable(folder)}: has no split {splits}; its splits: {available}")
    if len(chosen.files) < len(paths):
        warn(f"{printable(folder)}: {used_splits(chosen.taken, chosen.available)}")
    return {by_name[name] for name in chosen.files}


def _warn_of_several_splits(pattern: str, paths: Iterable[str], preferred_splits: Sequence[str], warn: Warn) -> None:
    """Warn of a glob that matches several splits, of which some may not be meant for training."""
    splits = names_by_split([os.path.basename(path) for path in paths])
    if preferred_splits and len(splits) > 1:
        warn(
            f"{printable(pattern)}: matches the splits {', '.join(map(printable, sorted(splits)))}; all are used (to choose "
            "one, name the folder and set split)"
        )


def _read_text(path: str) -> str:
    """Return the beginning of a text file; "" if it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(MAX_CARD_CHARACTERS)
    except OSError:
        return ""


def _read_remote_text(filesystem: pafs.FileSystem, path: str) -> str:
    with filesystem.open_input_stream(path) as stream:
        return str(stream.read(MAX_CARD_CHARACTERS).decode(errors="replace"))


def _of_saved_split(paths: Iterable[str], preferred_splits: Sequence[str], warn: Warn) -> set[str]:
    """Leave out the other splits of data sets with several splits that `datasets.save_to_disk` has written.

    Raises:
        DataError: there is no such split.
    """
    paths = set(paths)
    for dataset in [os.path.dirname(path) for path in sorted(paths) if os.path.basename(path) == DATASET_DICT]:
        below = {path for path in paths if path.startswith(f"{dataset}/")}
        splits = sorted({path[len(dataset) + 1 :].partition("/")[0] for path in below if path.endswith(".arrow")})
        if not preferred_splits or not splits:
            continue
        taken = choose_splits(splits, preferred_splits)
        if not taken:
            names, available = " or ".join(preferred_splits), ", ".join(map(printable, splits))
            raise DataError(f"{printable(dataset)}: has no split {names}; its splits: {available}")
        if len(taken) < len(splits):
            warn(f"{printable(dataset)}: {used_splits(taken, splits)}")
        paths -= {path for path in below if not path.startswith(tuple(f"{dataset}/{split}/" for split in taken))}
    return paths


def format_by_suffix(path: str, file_format: str = "auto") -> str:
    """Return the format that the suffix suggests; "" if it suggests none, or another one than `file_format`."""
    suffix, is_compressed = data_suffix(path), path.lower().endswith(tuple(CODECS))
    for candidate, suffixes in FORMAT_SUFFIXES.items():
        if file_format in ("auto", candidate) and suffix in suffixes and not (is_compressed and candidate in TABLES):
            return candidate
    return ""


def _without_dataset_files(paths: Iterable[str]) -> set[str]:
    """Leave out what `datasets.save_to_disk` writes beside the data: descriptions, and Arrow files of cached results."""
    paths = set(paths)
    folders = {os.path.dirname(path) for path in paths if path.lower().endswith(".arrow")}

    def is_data(path: str) -> bool:
        folder, name = os.path.split(path)
        if name == DATASET_DICT:
            return not any(other.startswith(f"{folder}/") for other in folders)
        is_beside = folder in folders and (
            name in DATASET_FILES or (name.startswith("cache-") and name.endswith(".arrow"))
        )
        return not is_beside

    return set(filter(is_data, paths))


def _without_plain_text(files: list[SourceFile], file_format: str, warn: Warn) -> list[SourceFile]:
    """Leave out plain text that a glob matches beside files in other formats, with a warning."""

    def is_text(file: SourceFile) -> bool:
        return (file.format or format_by_suffix(file.path)) == "text"

    if file_format != "auto" or all(map(is_text, files)):
        return files
    for message in _shortened(
        [
            f"{printable(file.path)}: plain text beside data files; skipped (name it, or set format: text, to use it)"
            for file in files
            if is_text(file)
        ]
    ):
        warn(message)
    return [file for file in files if not is_text(file)]


def _warn_of_several_formats(pattern: str, files: Sequence[SourceFile], file_format: str, warn: Warn) -> None:
    """Warn of files in several formats, which may have the same documents, unless the user has chosen a format."""
    formats = Counter(file.format or format_by_suffix(file.path) or "jsonl" for file in files)
    formats["jsonl"] += formats.pop("json", 0)
    counts = [f"{number:,} {name}" for name, number in sorted(formats.items()) if number]
    if file_format == "auto" and len(counts) > 1:
        warn(
            f"{printable(pattern)}: has files in several formats ({', '.join(counts)}); all are used (set format to choose)"
        )


def _nothing_found(pattern: str, is_folder: bool, file_format: str, only_folders: bool = False) -> str:
    shown = printable(pattern)
    if is_folder:
        suffixes = DATA_SUFFIXES if file_format == "auto" else FORMAT_SUFFIXES[file_format]
        return f"{shown}: the folder contains no {', '.join(suffixes)} …"
    if only_folders:
        return (
            f"{shown}: no such match: it matches only folders; for the files in them use {shown.rstrip('/')}/**/*.jsonl"
        )
    hint = ""
    # The paths of settings have been made absolute.
    name = pattern.removeprefix(f"{os.getcwd()}/") if os.path.isdir(".") else pattern
    if "{" in pattern and "," in pattern:
        hint = "; {a,b} is not supported in a pattern; use a list of two patterns"
    elif "\\" in pattern:
        hint = "; folders are separated by /, not by \\"
    elif re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) and not format_by_suffix(name):
        hint = f"; a data set of the Hugging Face Hub is {HUB_SCHEME}{name}"
    return f"{shown}: no such {'match' if _is_glob(pattern) else 'file or folder'}{hint}"


def _remote_files(pattern: str, file_format: str, splits: Sequence[str], warn: Warn) -> list[SourceFile]:
    uri, query = split_query(canonical_uri(pattern, error=DataError))
    if uri.startswith(("http://", "https://")):
        raise DataError(
            f"{printable(pattern)}: web addresses are not read; download the file, or name a data set of the Hugging Face "
            "Hub as hf://datasets/OWNER/NAME"
        )
    uri = decoded_uri(uri)
    uri = uri if uri.endswith("://") else uri.rstrip("/")
    filesystem, path = file_system(with_short_retries(encoded_uri(uri) + query), DataError)
    with errors_as_data_error(pattern, "listed"):
        info = filesystem.get_file_info(path)
        if info.type == pafs.FileType.File:
            return [SourceFile(uri, info.size, info.mtime_ns or 0, query, format_setting=file_format)]
        is_folder = info.type == pafs.FileType.Directory
        if is_folder:
            infos = _remote_infos(filesystem, path, deep=True)
            read = partial(_read_remote_text, filesystem)
            paths = _of_folder(path, (info.path for info in infos), file_format, splits, read, warn)
            infos = [info for info in infos if info.path in paths]
        elif _is_glob(path):
            wildcards = re.search(r"[^/]*[*?\[].*", path)
            rest = wildcards[0] if wildcards else ""
            uri = uri.removesuffix(rest).rstrip("/")
            path = path.removesuffix(rest).rstrip("/")
            infos = _remote_matches(filesystem, path, rest)
            if not infos and "[" in rest:  # as in `_local_matches`
                infos = _remote_matches(filesystem, path, rest.replace("[", "[[]"))
            paths = _without_dataset_files(info.path for info in infos)
            _warn_of_several_splits(pattern, paths, splits, warn)
            infos = [info for info in infos if info.path in paths]
        else:
            infos = []
    if not infos:
        raise DataError(_nothing_found(pattern, is_folder, file_format))
    files = [
        SourceFile(uri + info.path[len(path) :], info.size, info.mtime_ns or 0, query, format_setting=file_format)
        for info in infos
    ]
    files = files if is_folder else _without_plain_text(files, file_format, warn)
    _warn_of_several_formats(pattern, files, file_format, warn)
    return files


def _remote_matches(filesystem: pafs.FileSystem, folder: str, pattern: str) -> list[pafs.FileInfo]:
    pattern = re.sub(r"(?:(?<=/)|^)\*\*(?=[^/])", "**/*", pattern)
    parts = pattern.split("/")
    # Consecutive `**` are equivalent to one.
    pattern_parts = [part for i, part in enumerate(parts) if part != "**" or parts[i - 1 : i] != ["**"]]
    infos = _remote_infos(filesystem, folder, deep=len(pattern_parts) > 1 or pattern_parts == ["**"])
    return [info for info in infos if _matches(info.path[len(folder) :].strip("/").split("/"), pattern_parts)]


def _remote_infos(filesystem: pafs.FileSystem, folder: str, deep: bool) -> list[pafs.FileInfo]:
    infos = filesystem.get_file_info(pafs.FileSelector(folder, recursive=deep, allow_not_found=True))
    return [info for info in infos if info.type == pafs.FileType.File and "/." not in info.path[len(folder) :]]


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        if pattern[1:]:
            return any(_matches(parts[i:], pattern[1:]) for i in range(len(parts)))
        return True
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])
