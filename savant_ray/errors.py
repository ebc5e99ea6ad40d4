"""Every failure a user can act on, and the handling of unexpected errors.

    SavantError                 exit code 1
    ├── SettingsError           2   a setting is unknown, of the wrong type, out of range or contradictory
    ├── DataError               3   training text is missing, unreadable or yields nothing
    ├── CheckpointError         4   a checkpoint is missing, damaged or does not fit
    ├── MemoryCapError          5   one sequence does not fit under `training.vram_limit_gb`
    ├── TrainingError           1   training failed (too many skipped steps, a worker died)
    └── UnexpectedError         1   anything else, with what was being done; the full traceback is kept in a file

The message is written for the person at the terminal: where, what was found, what to do.
`STOPPED_EARLY` (75, EX_TEMPFAIL of sysexits.h) is no error: stopped and saved, run the same command again.
"""

from __future__ import annotations

import errno
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
LONGEST_REASON = 500  # characters of a foreign exception's text in our one line


class SavantError(Exception):
    """An error with a message for the user; `exit_code` is the exit code of the process."""

    exit_code = 1


class SettingsError(SavantError):
    """A setting is unknown, of the wrong type, out of range or contradictory."""

    exit_code = 2


class DataError(SavantError):
    """Training text is missing, unreadable or yields nothing."""

    exit_code = 3


class CheckpointError(SavantError):
    """A checkpoint is missing, damaged or does not fit the model."""

    exit_code = 4


class MemoryCapError(SavantError):
    """One sequence does not fit under `training.vram_limit_gb`."""

    exit_code = 5


class TrainingError(SavantError):
    """Training failed: too many skipped steps, or a worker that died too often."""


class UnexpectedError(SavantError):
    """An unexpected error; `details` is its full traceback, which --verbose prints."""

    def __init__(self, message: str, details: str = "", is_kept: bool = False) -> None:
        super().__init__(message, details, is_kept)
        self.message, self.details, self.is_kept = message, details, is_kept

    def __str__(self) -> str:
        """The message alone."""
        return self.message


@contextmanager
def doing(activity: str) -> Iterator[None]:
    """Name what a block does ("saving step_5"), for the message about an unexpected error; the innermost name counts."""
    try:
        yield
    except BaseException as error:  # a panic of a Rust library is no Exception
        error.__dict__.setdefault("activity", activity)
        raise


@contextmanager
def unexpected_errors_explained(folder: Path | None = None, activity: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Turn what is neither ours nor an interruption into an `UnexpectedError` whose traceback is kept in `folder`.

    `activity` says what was being done if no `doing` block does. Without a folder, or when it cannot be written, the
    traceback goes to the system's folder for temporary files.
    """
    try:
        yield
    except Exception as error:
        explained = explain(error, folder, activity())
        if explained is error:
            raise
        raise explained from error


def explain(error: BaseException, folder: Path | None = None, activity: str = "") -> SavantError:
    """Return the error for the user; an unexpected one has its traceback written to a file, which the message names."""
    if isinstance(error, SavantError) and not (isinstance(error, UnexpectedError) and not error.is_kept):
        return error
    if isinstance(error, OSError) and (error.filename is not None or is_disk_full(error)):
        return SavantError(describe(error, activity))  # a file or folder that the user can look at
    details = error.details if isinstance(error, UnexpectedError) else ""
    details = details or "".join(traceback.format_exception(error))
    message = str(error) if isinstance(error, UnexpectedError) else describe(error, activity)
    path = _keep(details, folder)
    where = f"the full traceback is in {path}" if path else "--verbose prints the full traceback"
    told = f"{message}\n{where[0].upper()}{where[1:]}." if "\n" in message else f"{message} ({where})"
    return UnexpectedError(told, details, is_kept=True)


def describe(error: BaseException, activity: str = "") -> str:
    """Return one line such as `while tokenising train.jsonl: ZeroDivisionError: division by zero`."""
    activity = getattr(error, "activity", activity)
    cause = getattr(error, "cause", None)  # Ray wraps what a task raised, and prints its traceback as the message
    if isinstance(cause, BaseException):
        error, activity = cause, getattr(cause, "activity", activity)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = "" if not lines else lines[-1] if any("Traceback (most" in line for line in lines) else lines[0]
    if len(reason) > LONGEST_REASON:
        reason = f"{reason[:LONGEST_REASON]}…"
    if isinstance(error, OSError) and error.strerror:
        named = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
        reason = named if isinstance(error.filename, str | bytes | None) else reason
    else:
        reason = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
    return f"while {activity}: {reason}" if activity else reason


def is_disk_full(error: BaseException) -> bool:
    """Whether there is no room left, by the disk or by a quota."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def print_error(error: BaseException, verbose: bool = False) -> int:
    """Print what ended a command in a line on stderr, with `verbose` its traceback as well; return the exit code."""
    explained = explain(error)
    if verbose and isinstance(explained, UnexpectedError):
        print(explained.details, file=sys.stderr)
    elif verbose and not isinstance(error, SavantError):
        traceback.print_exception(error)
    print(textwrap.indent(str(explained), "       ").replace("       ", "error: ", 1), file=sys.stderr)
    return explained.exit_code


def warn_of_thread(failure: threading.ExceptHookArgs) -> None:
    """Print in a line what ended a thread that nobody waits for; to be `threading.excepthook`."""
    error, thread = failure.exc_value, failure.thread
    if error is None or isinstance(error, SystemExit) or type(thread).__module__.startswith("tensorboard."):
        return  # TensorBoard's writer hands its error to the next one who writes
    name = "a thread" if thread is None else f"the thread {thread.name}"
    print(f"WARNING: {name} ended: {explain(error)}", file=sys.stderr)


def _keep(details: str, folder: Path | None) -> Path | None:
    """Write the traceback to the first place that takes it; return where it is."""
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
