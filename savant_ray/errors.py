"""Every failure a user can act on.

    SavantError                 exit code 1
    ├── SettingsError           2   a setting is unknown, of the wrong type, out of range or contradictory
    ├── DataError               3   training text is missing, unreadable or yields nothing
    ├── CheckpointError         4   a checkpoint is missing, damaged or does not fit
    ├── MemoryCapError          5   one sequence does not fit under `training.vram_limit_gb`
    └── TrainingError           1   training itself went wrong (too many skipped steps, a worker died)

The message is written for the person at the terminal: where, what was found, what to do.
`STOPPED_EARLY` (75, EX_TEMPFAIL of sysexits.h) is no error: stopped and saved, run the same command again.
"""

from __future__ import annotations

import sys
import textwrap
import traceback

STOPPED_EARLY = 75


class SavantError(Exception):
    """A failure with a message for the user; `exit_code` is the process's exit code."""

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
    """Training itself went wrong: too many skipped steps, a worker that died for good."""


def tell(error: Exception) -> int:
    """Says on the terminal what ended a command; returns its exit code. What is a mistake of ours has a traceback."""
    if isinstance(error, SavantError):
        print(textwrap.indent(str(error), "       ").replace("       ", "error: ", 1), file=sys.stderr)
        return error.exit_code
    if isinstance(error, OSError):  # a file or folder that cannot be read or written, wherever it was
        print(f"error: {error}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    return 1
