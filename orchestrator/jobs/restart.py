"""Ends a command whose Ray has died, or starts it again if that Ray was its own.

Everything that the command needs is in its folder, so a new process continues as after a kill. In
this process, threads of the dead Ray would remain.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn

from orchestrator.cluster import connection
from orchestrator.errors import RayDiedError
from orchestrator.runs import signals
from orchestrator.runs.ending import Ending

PATIENCE = 3  # starts without a new step; another one would fail too
# "steps starts": the steps that were stored at the last start, and the starts since a new step.
VARIABLE = "ESPALIER_RESTARTS"


def starts_without_a_step(steps: int) -> int:
    """Return how often the command has started again since the number of stored steps grew."""
    before, _, starts = os.environ.get(VARIABLE, "").partition(" ")
    return int(starts) if before == str(steps) and starts.isdecimal() else 0


@contextlib.contextmanager
def watching() -> Iterator[None]:
    """Raise RayDiedError if Ray dies in this block. Enter it in the main thread."""
    closed = threading.Event()
    interrupted = threading.Event()

    def interrupt() -> None:
        interrupted.set()
        signals.interrupt_work()

    signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        connection.watch(closed, interrupt)  # on a busy machine, it may interrupt its own start
        yield
    except KeyboardInterrupt:
        died = connection.failure() if interrupted.is_set() else None
        if died is None:
            raise
        raise RayDiedError(died) from None
    except Exception as error:
        died = connection.failure(error)
        if died is None:
            raise
        raise RayDiedError(died) from None
    finally:
        closed.set()
        signal.signal(signal.SIGALRM, signal.SIG_IGN)


def ending_after(died: str, steps: int) -> Ending | None:
    """Return how a command ends whose Ray has died; None if it starts again.

    Args:
        died: What has died.
        steps: Steps that are stored.
    """
    if connection.is_shared():
        return Ending("again", f"{died}; run the same command again")
    if starts_without_a_step(steps) == PATIENCE:
        return Ending("failed", f"{died}, also after {PATIENCE} new starts of Ray")
    return None


def end_or_start_again(error: RayDiedError) -> NoReturn:
    """Print one line. End this process, or replace it by the same command."""
    ending = ending_after(str(error), error.steps)
    if ending is not None:
        print(f"error: {ending.reason}", file=sys.stderr)
        leave(ending.exit_status)
    print(f"{error}; starting Ray again", file=sys.stderr, flush=True)
    _start_again(error.steps)


def leave(status: int) -> NoReturn:
    """End this process without Ray's functions at exit, which wait for the dead Ray."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _start_again(steps: int) -> NoReturn:
    """End the processes of Ray and replace this process by the same command."""
    os.environ[VARIABLE] = f"{steps} {starts_without_a_step(steps) + 1}"
    connection.kill()
    for number in signals.ignored:
        signal.signal(number, signal.SIG_IGN)  # the handlers end with this process
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
