"""Standard input, output and error that may be closed, full, or abandoned by their reader."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from typing import Any, TextIO


class Output(io.RawIOBase):
    """Writes to a file descriptor; remembers the first error in `error`, and writes nothing more after it.

    A tolerant one never raises: a training must not end because its output goes nowhere.
    """

    def __init__(self, descriptor: int, error: OSError | None = None, tolerant: bool = False) -> None:
        super().__init__()
        self.error, self.tolerant = error, tolerant
        self._descriptor = descriptor

    def write(self, data: Any, /) -> int:
        """Write some of the bytes, also to a descriptor that somebody made non-blocking; return how many."""
        while self.error is None:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:
                select.select([], [self._descriptor], [])
            except OSError as error:
                self.error = error
                if not self.tolerant:
                    raise
        return memoryview(data).nbytes

    def fileno(self) -> int:
        """The descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Whether a terminal shows it."""
        return self.error is None and os.isatty(self._descriptor)

    def writable(self) -> bool:
        """Always."""
        return True


def open_standard_streams() -> Output:
    """Make stdin, stdout and stderr usable whatever the shell did to them; return stdout's.

    Closed descriptors are opened on the null device, so that no file of ours gets the number of one and receives what a
    library prints. Streams that were replaced (by a notebook, by a test) stay, and the returned object never has an error.
    """
    for descriptor in range(3):
        if not _is_open(descriptor):
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            os.set_inheritable(descriptor, True)  # or Ray's processes would find it closed
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - stays open as Python's own does
    sys.stderr, _ = _usable(sys.stderr, sys.__stderr__, 2, tolerant=True)
    sys.stdout, output = _usable(sys.stdout, sys.__stdout__, 1, tolerant=False)
    return output


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _usable(stream: TextIO | None, original: TextIO | None, descriptor: int, tolerant: bool) -> tuple[TextIO, Output]:
    """The stream over an `Output`; characters that its encoding lacks are spelt out instead of ending the program."""
    if isinstance(stream, io.TextIOWrapper) and isinstance(raw := getattr(stream.buffer, "raw", None), Output):
        return stream, raw  # from an earlier call
    if stream is not None and (stream is not original or not isinstance(stream, io.TextIOWrapper)):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        return stream, Output(descriptor)
    closed = OSError(errno.EBADF, "it is closed") if stream is None else None
    output = Output(descriptor, closed, tolerant)
    by_line = stream is not None and (stream.line_buffering or stream.write_through)
    encoding = "utf-8" if stream is None else stream.encoding
    text = io.TextIOWrapper(io.BufferedWriter(output), encoding, "backslashreplace", line_buffering=by_line)
    return text, output
