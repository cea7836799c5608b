"""Starts a command again whose own Ray has died.

Everything that the command needs is in its folder, so a new process is the same as the same command
after a kill. In this process, threads of the dead Ray would remain.
"""

import os
import signal
import sys
from typing import NoReturn

from orchestrator.cluster import connection
from orchestrator.runs import signals

PATIENCE = 3  # starts without a new step; another one would fail too
# "steps starts": the steps that were stored at the last start, and the starts since a new step.
VARIABLE = "ESPALIER_RESTARTS"


def starts_without_a_step(steps: int) -> int:
    """Return how often the command has started again since the number of stored steps grew."""
    before, _, starts = os.environ.get(VARIABLE, "").partition(" ")
    return int(starts) if before == str(steps) else 0


def leave(status: int) -> NoReturn:
    """End this process without Ray's functions at exit, which wait for the dead Ray."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def start_again(steps: int) -> NoReturn:
    """End the processes of Ray and replace this process by the same command."""
    os.environ[VARIABLE] = f"{steps} {starts_without_a_step(steps) + 1}"
    connection.kill()
    for number in signals.ignored:
        signal.signal(number, signal.SIG_IGN)  # the handlers end with this process
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
