"""Ctrl-C while a command imports its modules, which takes 0.3 s, or 3 s with torch."""

import os
import signal

from orchestrator.errors import EXIT_INTERRUPTED


def end_on_ctrl_c(name: str) -> None:
    """Let Ctrl-C end the process at once: nothing was written yet. `run_command` undoes this.

    An exception would print a traceback, or a library could catch it and go on.

    Args:
        name: `__name__` of the command; if it is imported, nothing is done.
    """
    # A shell ignores SIGINT in a command that runs in the background.
    if name == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, _end)


def _end(*_: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(EXIT_INTERRUPTED)
