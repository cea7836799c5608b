"""Standard input, output and error of a command. Their faults do not end it.

A write fails if the reader has ended (`| head`), the terminal was closed or the disk of a log file
is full. The output is then dropped, because a run also writes to its folder.
"""

import errno
import io
import os
import select
import sys
from typing import IO, Any


class _Output(io.FileIO):
    """A standard stream that drops what it cannot write."""

    has_failed = False

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
            while written is None:  # a pipe that another process made non-blocking is full
                select.select([], [self], [])
                written = super().write(data)
            return written
        except OSError as error:
            if self.fileno() == 1 and error.errno != errno.EPIPE and not self.has_failed:
                self.has_failed = True
                print(f"output is dropped: {error}", file=sys.stderr, flush=True)
            return memoryview(data).nbytes


def secure() -> None:
    """Replace `sys.stdout` and `sys.stderr`, and open the standard streams that are closed.

    Without that, the next file that the process opens would be its standard output. Characters that
    the encoding lacks are printed as escapes.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
            os.set_inheritable(number, True)
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    sys.stderr = _output(2, sys.stderr)
    sys.stdout = _output(1, sys.stdout)


def _output(number: int, before: IO[str] | None) -> io.TextIOWrapper:
    if before is not None:
        before.flush()
    raw = _Output(number, "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=getattr(before, "encoding", "utf-8"),
        errors="backslashreplace",
        line_buffering=number == 2 or raw.isatty(),
    )
