"""Standard input, output and error that keep working if they are closed, full, or a pipe without a reader."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from typing import Any, TextIO

BLOCKED_SECONDS = 5.0  # that a tolerant output waits for a reader
DROPPED = b"\n[lines are missing here, because nothing read the output]\n"


class Output(io.RawIOBase):
    """Unbuffered output to a file descriptor; stores the first error in `error` and writes nothing after it.

    A tolerant output never raises, so that training continues if its output cannot be written. If a full pipe or a paused
    terminal accepts nothing for `BLOCKED_SECONDS`, it drops what is written until it can write again.
    """

    def __init__(self, descriptor: int, error: OSError | None = None, tolerant: bool = False) -> None:
        super().__init__()
        self.error, self.tolerant = error, tolerant
        self._descriptor = descriptor
        self._drops = False  # the last attempt to write found the output blocked

    def write(self, data: Any, /) -> int:
        """Write some of the bytes, also to a non-blocking descriptor; return their number."""
        while self.error is None:
            try:
                if not self.tolerant:
                    return os.write(self._descriptor, data)
                if not self._accepts_data():
                    break
                # Up to so many bytes are written without blocking if the descriptor is ready (POSIX, for pipes).
                return os.write(self._descriptor, memoryview(data)[: select.PIPE_BUF])
            except BlockingIOError:
                select.select([], [self._descriptor], [])
            except OSError as error:
                self.error = error
                if not self.tolerant:
                    raise
        return memoryview(data).nbytes

    def _accepts_data(self) -> bool:
        """Wait until the output can be written; return False if it still cannot. Only the first call waits."""
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        if not poll.poll(0 if self._drops else BLOCKED_SECONDS * 1000):
            self._drops = True
            return False
        if self._drops:
            self._drops = False
            os.write(self._descriptor, DROPPED)
            return self._accepts_data()  # the line takes room, too
        return True

    def fileno(self) -> int:
        """Return the file descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Return whether the descriptor is a terminal."""
        return self.error is None and os.isatty(self._descriptor)

    def writable(self) -> bool:
        """Return True."""
        return True


def open_standard_streams() -> Output:
    """Make stdin, stdout and stderr usable even if they were closed; return the output of stdout.

    Closed descriptors are opened on the null device; otherwise another file could get their numbers, and the output of
    libraries would be written into it. If a notebook or a test has replaced a stream, its replacement stays in use; the
    returned output then never has an error.
    """
    for descriptor in range(3):
        if not _is_open(descriptor):
            os.open(os.devnull, os.O_RDWR)  # uses the lowest free number, which is this one
            os.set_inheritable(descriptor, True)  # otherwise it would be closed in Ray's processes
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - stays open, like Python's own
    sys.stderr, _ = _with_output(sys.stderr, sys.__stderr__, 2, tolerant=True)
    sys.stdout, output = _with_output(sys.stdout, sys.__stdout__, 1, tolerant=False)
    return output


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _with_output(
    stream: TextIO | None, original: TextIO | None, descriptor: int, tolerant: bool
) -> tuple[TextIO, Output]:
    """Return a stream that writes to an `Output`, and this `Output`.

    `stream` is the current `sys.stdout` or `sys.stderr`, `original` the one that Python opened; both are None if the
    descriptor was closed. If `stream` is a replacement of `original`, it is returned itself. Characters outside the
    stream's encoding are written as escape sequences.
    """
    if isinstance(stream, io.TextIOWrapper) and isinstance(raw := getattr(stream.buffer, "raw", None), Output):
        return stream, raw  # from an earlier call
    if stream is not None and (stream is not original or not isinstance(stream, io.TextIOWrapper)):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        return stream, Output(descriptor)  # a notebook or a test has replaced it; nothing writes to this `Output`
    error = OSError(errno.EBADF, "it is closed") if stream is None else None
    output = Output(descriptor, error, tolerant)
    line_buffering = stream is not None and (stream.line_buffering or stream.write_through)
    encoding = "utf-8" if stream is None else stream.encoding
    text = io.TextIOWrapper(io.BufferedWriter(output), encoding, "backslashreplace", line_buffering=line_buffering)
    return text, output
