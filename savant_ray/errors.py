"""Exceptions with a message for the user, and the handling of unexpected errors.

    SavantError                 exit code 1
    ├── SettingsError           2   a setting is unknown, of the wrong type, out of range or contradictory
    ├── DataError               3   text or a tokenizer is missing or unreadable, or the text contains no document
    ├── CheckpointError         4   a checkpoint is missing, damaged or does not fit
    ├── MemoryCapError          5   one sequence, or the model's state, does not fit under `training.vram_limit_gb`
    ├── VerificationError       6   a repeated step or checkpoint is not that of the run (`savant verify`)
    ├── TrainingError           1   training failed: too many skipped steps, too many failures of workers, or Ray failed
    └── UnexpectedError         1   any other error, with the current activity; the full traceback is stored in a file

Messages name the place, what was found, and what to do. `STOPPED_EARLY` (75, EX_TEMPFAIL of sysexits.h) is not an error: the
run was stopped, normally after its current step was saved, and the same command resumes it.
"""

from __future__ import annotations

import errno
import re
import sys
import tempfile
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

STOPPED_EARLY = 75
TRACEBACK = "error_traceback.txt"  # in the run folder
MAX_REASON = 500  # characters that a message quotes from another library's exception


class SavantError(Exception):
    """An error with a message for the user; `exit_code` is the exit code of the process."""

    exit_code = 1


class SettingsError(SavantError):
    """A setting is unknown, of the wrong type, out of range or contradictory."""

    exit_code = 2


class DataError(SavantError):
    """Text or a tokenizer is missing or unreadable, or the text contains no document."""

    exit_code = 3


class CheckpointError(SavantError):
    """A checkpoint is missing, damaged or does not fit the model."""

    exit_code = 4


class MemoryCapError(SavantError):
    """One sequence, or the model with gradients and optimizer state, does not fit under `training.vram_limit_gb`."""

    exit_code = 5


class VerificationError(SavantError):
    """A repeated step, or the state after it, is not bit for bit that of the run (`savant verify`)."""

    exit_code = 6


class TrainingError(SavantError):
    """Training failed: too many steps were skipped, workers failed more than `scaling.max_failures` times, or Ray failed."""


class UnexpectedError(SavantError):
    """Any other error; the message says where its full traceback is.

    `details` is the traceback; `is_explained` is whether the message names it already.
    """

    def __init__(self, message: str, details: str = "", is_explained: bool = False) -> None:
        super().__init__(message, details, is_explained)
        self.message, self.details, self.is_explained = message, details, is_explained

    def __str__(self) -> str:
        """Return the message without the details."""
        return self.message


def error_class(name: str, default: type[SavantError]) -> type[SavantError]:
    """Return the subclass of `SavantError` with this name, or `default`."""
    return next((subclass for subclass in SavantError.__subclasses__() if subclass.__name__ == name), default)


@contextmanager
def error_context(activity: str) -> Iterator[None]:
    """Add the activity of a `with` block, such as "saving step_5", to the message of an error; the innermost one is used."""
    try:
        yield
    except BaseException as error:  # a Rust panic is not an Exception
        error.__dict__.setdefault("activity", activity)
        raise


@contextmanager
def unexpected_errors_explained(folder: Path | None = None, activity: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Convert exceptions other than `SavantError` into an `UnexpectedError`, and write the traceback to `folder`.

    `activity` returns the current activity for errors outside of an `error_context` block. Without a folder, or if writing
    to it fails, the traceback is written to the system's folder for temporary files.
    """
    try:
        yield
    except Exception as error:
        explained = explain(error, folder, activity())
        if explained is error:
            raise
        raise explained from error


def explain(error: BaseException, folder: Path | None = None, activity: str = "") -> SavantError:
    """Return the error for the user; write the traceback of an unexpected one to a file, which the message names."""
    if isinstance(error, SavantError) and not (isinstance(error, UnexpectedError) and not error.is_explained):
        return error
    if isinstance(error, OSError) and (error.filename is not None or is_disk_full(error)):
        return SavantError(describe(error, activity))  # the user can act on the file or folder that it names
    details = error.details if isinstance(error, UnexpectedError) else ""
    details = details or "".join(traceback.format_exception(error))
    message = str(error) if isinstance(error, UnexpectedError) else describe(error, activity)
    path = _write_traceback(details, folder)
    hint = f"the full traceback is in {path}" if path else "--verbose prints the full traceback"
    text = f"{message}\n{hint[0].upper()}{hint[1:]}." if "\n" in message else f"{message} ({hint})"
    return UnexpectedError(text, details, is_explained=True)


def describe(error: BaseException, activity: str = "") -> str:
    """Return one line such as `while tokenizing train.jsonl: ZeroDivisionError: division by zero`."""
    activity = getattr(error, "activity", activity)
    cause = getattr(error, "cause", None)  # Ray wraps the exception of a task, and its own message is the traceback
    if isinstance(cause, BaseException):
        error, activity = cause, getattr(cause, "activity", activity)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = "" if not lines else lines[-1] if any("Traceback (most" in line for line in lines) else lines[0]
    if len(reason) > MAX_REASON:
        reason = f"{reason[:MAX_REASON]}…"
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
        reason = text if isinstance(error.filename, str | bytes | None) else reason  # an int is a file descriptor
    else:
        reason = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
    return f"while {activity}: {reason}" if activity else reason


def error_in_traceback(text: str) -> str:
    """Return the message of the error with which a traceback ends, as Ray prints an error of another process.

    The message of a `SavantError` may have several lines; for other errors the last line is returned.
    """
    *_, last = re.split(rf"^{__name__}\.\w+: ", text, flags=re.MULTILINE)
    if last != text:
        return last.strip()
    return next((line.strip() for line in reversed(text.split("\n")) if line.strip()), "no reason is known")


def is_disk_full(error: BaseException) -> bool:
    """Whether the disk is full or a quota is exceeded."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def print_error(error: BaseException, verbose: bool = False) -> int:
    """Print the error that ended a command to stderr and return the exit code.

    With `verbose` its traceback is printed too, except that of a `SavantError` other than `UnexpectedError`.
    """
    explained = explain(error)
    if verbose and isinstance(explained, UnexpectedError):
        print(explained.details, file=sys.stderr)
    elif verbose and not isinstance(error, SavantError):
        traceback.print_exception(error)
    print(textwrap.indent(str(explained), "       ").replace("       ", "error: ", 1), file=sys.stderr)
    return explained.exit_code


def report_thread_error(failure: threading.ExceptHookArgs) -> None:
    """Print the error that ended a thread; used as `threading.excepthook`."""
    error, thread = failure.exc_value, failure.thread
    if error is None or isinstance(error, SystemExit) or type(thread).__module__.startswith("tensorboard."):
        return  # TensorBoard's writer raises the same error in the next call, where it is handled
    name = "a thread" if thread is None else f"the thread {thread.name}"
    print(f"WARNING: {name} ended: {explain(error)}", file=sys.stderr)


def _write_traceback(details: str, folder: Path | None) -> Path | None:
    """Write the traceback to `folder`, else to the folder for temporary files; return its path, None if both fail."""
    if folder is not None:
        with suppress(OSError):
            path = folder / TRACEBACK
            path.write_text(details, encoding="utf-8", errors="backslashreplace")
            return path
    with suppress(OSError):
        with tempfile.NamedTemporaryFile(
            "w", prefix="savant-error-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(details)
        return Path(file.name)
    return None
