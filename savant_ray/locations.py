"""Paths and URIs in settings and options: parse, validate, join.

All settings and options that name a file or folder are parsed here, so a text that cannot be a path is reported with the
name of the setting. A `file:` URI is a local path; URIs of other schemes are opened by `pyarrow.fs` (`data/sources.py`).
"""

from __future__ import annotations

import itertools
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote, unquote

from savant_ray.errors import CheckpointError, SavantError, SettingsError

MAX_SHOWN = 400  # characters of a path or text in a message
RUNS_BELOW_HOME = "savant_runs"
TEMPORARY_HOME = "savant-home-"  # prefix of the temporary folder that replaces a missing home; no run is stored there

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_FILE_URI = re.compile(r"file:", re.IGNORECASE)
_LOCAL_HOSTS = ("", "localhost")
_STANDARD_STREAM = re.compile(r"/dev/(stdin|stdout|stderr|fd)\b|/proc/")


def is_uri(text: str) -> bool:
    """Return whether `text` is a URI of a remote file system; `file:` URIs are local paths."""
    return _SCHEME.match(text) is not None and _FILE_URI.match(text) is None


def local_path(text: str, setting: str = "", error: type[SavantError] = SettingsError) -> Path:
    """Return `text` as a local path, with `~` expanded and a `file:` URI decoded; relative paths stay relative.

    Raises:
        error: `text` cannot be a path; the message begins with `setting`.
    """
    named = _named(setting, text)
    if "\0" in text:
        raise error(f"{named} contains a NUL character, which is not allowed in a path")
    if _FILE_URI.match(text):
        text = _path_of_file_uri(text, named, error)
    if not text.startswith("~"):
        return _require_utf8(Path(text), named, error)
    expanded = os.path.expanduser(text)  # noqa: PTH111 - Path.expanduser raises RuntimeError for an unknown user
    if expanded.startswith("~"):
        user = text[1:].partition("/")[0]
        reason = f"there is no user {printable(user)}" if user else "this user has no home folder; set HOME"
        raise error(f"{named}: {reason} (write ./~… for a folder whose name begins with ~)")
    return _require_utf8(Path(expanded), named, error)


def absolute_path(
    text: str, folder: Path | None = None, setting: str = "", error: type[SavantError] = SettingsError
) -> str:
    """Return `text` as an absolute local path; a URI is returned with its scheme in lower case.

    A relative path is relative to `folder`, by default the working directory.

    Raises:
        error: as `local_path`.
        SettingsError: the working directory is needed and was deleted.
    """
    if is_uri(text):
        return canonical_uri(text, setting, error)
    path = local_path(text, setting, error)
    if not path.is_absolute():
        path = (folder or working_directory()) / path
    return str(_require_utf8(path, _named(setting, str(path)), error))


def checkpoint_path(text: str) -> Path:
    """Return the local path of a checkpoint or run.

    Raises:
        CheckpointError: it cannot be a path, or a parent folder is not accessible.
    """
    path = local_path(text, "checkpoint", CheckpointError)
    try:
        path.exists()
    except OSError as error:
        raise CheckpointError(f"checkpoint: {printable(text)}: cannot be read ({error_text(error)})") from error
    return path


def working_directory() -> Path:
    """Return the working directory.

    Raises:
        SettingsError: it was deleted.
    """
    try:
        return Path.cwd()
    except OSError as error:
        raise SettingsError(
            "the working directory does not exist any more (deleted, moved or unmounted); cd to one that does"
        ) from error


def home_folder() -> Path:
    """Return the user's home folder.

    Raises:
        SettingsError: there is none, as for a container's user without an entry in /etc/passwd.
    """
    try:
        home = Path.home()
    except RuntimeError:
        home = None
    if home is None or home.name.startswith(TEMPORARY_HOME):
        raise SettingsError(f"user {os.getuid()} has no home folder, which is needed: set HOME to a writable folder")
    return home


def runs_below_home() -> Path:
    """Return the folder that contains the runs of Ray jobs, and the local mirrors of runs in object storage.

    Raises:
        SettingsError: the user has no home folder.
    """
    return home_folder() / RUNS_BELOW_HOME


def replace_missing_home() -> None:
    """Set HOME to an empty temporary folder if the user has no home folder: importing Ray Train needs one."""
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = tempfile.mkdtemp(prefix=TEMPORARY_HOME)


def create_writable_folder(path: Path, setting: str) -> None:
    """Create a folder and its parents if necessary, and check that the user may write into it.

    Raises:
        SettingsError: it cannot be created, is a file, or is not writable.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(
            f"{setting}: {printable(str(path))} cannot be used as a folder: {error_text(error)}"
        ) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise SettingsError(f"{setting}: {printable(str(path))} is not writable by this user")


@contextmanager
def replacing(path: Path, temporary: Path | None = None) -> Iterator[Path]:
    """Rename a temporary file, which the `with` block writes, to `path` at its end; after an error, delete it instead.

    The value of the block is the path of the temporary file; by default its name has the number of the process.
    """
    temporary = temporary or path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def free_name(name: str, is_taken: Callable[[str], bool]) -> str:
    """Return the first of `name`, `name-2`, `name-3`, … that is not taken."""
    candidates = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))
    return next(candidate for candidate in candidates if not is_taken(candidate))


def split_query(path: str) -> tuple[str, str]:
    """Split a URI before the `?` of its options; the options of a local path are ""."""
    base, mark, options = path.partition("?") if is_uri(path) else (path, "", "")
    return base, mark + options


def join_uri(uri: str, name: str) -> str:
    """Return the URI of `name` below `uri`; options after a `?` stay at the end."""
    base, options = split_query(uri)
    return f"{base.rstrip('/')}/{name}{options}"


def parent_and_name(uri: str) -> tuple[str, str]:
    """Split a URI into that of its parent, with the options, and the last part of its path; undoes `join_uri`."""
    base, options = split_query(uri)
    parent, _, name = base.rstrip("/").rpartition("/")
    return parent + options, name


def canonical_uri(text: str, setting: str = "", error: type[SavantError] = SettingsError) -> str:
    """Return a URI with its scheme in lower case.

    Raises:
        error: it contains control characters or is not UTF-8.
    """
    if any(ord(character) < 32 or 0xD800 <= ord(character) < 0xE000 for character in text):
        raise error(f"{_named(setting, text)}: a URI must not contain control characters and must be UTF-8")
    scheme = _SCHEME.match(text)
    return text if scheme is None else scheme[0].lower() + text[scheme.end() :]


def decoded_uri(uri: str) -> str:
    """Return a URI with its path percent-decoded; its authority, which may contain a password, is unchanged."""
    authority, slash, path = _split_authority(uri)
    return authority + slash + unquote(path, errors="replace")


def encoded_uri(decoded: str) -> str:
    """Return a URI with its path percent-encoded; undoes `decoded_uri`."""
    authority, slash, path = _split_authority(decoded)
    return authority + slash + quote(path, safe="/!$&'()+,;=:@~")


def is_standard_stream(path: str) -> bool:
    """Return whether a local path refers to a different file in each process, such as `/dev/stdin`."""
    return _STANDARD_STREAM.match(path) is not None


def error_text(error: Exception) -> str:
    """Return the first line of the message of an operating system's or library's error, at most 300 characters."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return printable(text.strip().splitlines()[0][:300].removesuffix("."))


def printable(text: str) -> str:
    r"""Return `text` on one line, with control characters and invalid UTF-8 bytes escaped, as in `r\xe9sum`.

    The middle of a text that is longer than `MAX_SHOWN` characters is omitted. It is for paths and settings in messages;
    `reporting.wording.escape_controls` keeps the lines and the length of longer text.
    """
    if text.isprintable() and len(text) <= MAX_SHOWN:
        return text
    raw = text.encode("utf-8", "surrogateescape") if _is_escaped(text) else text.encode("utf-8", "backslashreplace")
    shown = raw.decode("utf-8", "backslashreplace")
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
    return shown if len(shown) <= MAX_SHOWN else f"{shown[: MAX_SHOWN // 2]}…{shown[-MAX_SHOWN // 2 :]}"


def _named(setting: str, text: str) -> str:
    return f"{setting}: {printable(text)}" if setting else printable(text)


def _is_escaped(text: str) -> bool:
    """Return whether all lone surrogates in `text` are bytes that Python could not decode (surrogateescape)."""
    return all(0xDC80 <= ord(character) <= 0xDCFF for character in text if 0xD800 <= ord(character) < 0xE000)


def _path_of_file_uri(text: str, named: str, error: type[SavantError]) -> str:
    host, slash, path = re.sub("^//", "", text[len("file:") :], count=1).partition("/")
    if not slash or host.lower() not in _LOCAL_HOSTS:
        raise error(
            f"{named}: a file URI is written file:///absolute/path"
            + (
                f", without the name of a machine ({printable(host)})"
                if slash
                else " (write ./file:… for a file of this name)"
            )
        )
    decoded = slash + unquote(path, errors="surrogateescape")
    if "\0" in decoded:
        raise error(f"{named} contains a NUL character, which is not allowed in a path")
    return decoded


def _require_utf8(path: Path, named: str, error: type[SavantError]) -> Path:
    """Return `path` if its name is UTF-8: Arrow, Ray and JSON support no other file names."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise error(f"{named}: this name is not UTF-8; rename it") from None
    return path


def _split_authority(uri: str) -> tuple[str, str, str]:
    """Split a URI into scheme and authority (`s3://bucket`), the `/` after them, and the path."""
    scheme, mark, rest = uri.partition("://")
    authority, slash, path = rest.partition("/")
    return scheme + mark + authority, slash, path
