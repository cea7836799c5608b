"""How a driver is told to stop: Ctrl-C and SIGTERM, told apart, beside a Ray that handles signals itself."""

import contextlib
import os
import signal
from collections.abc import Iterator

from orchestrator.errors import EXIT_AGAIN

EXIT_WAIT_S = 60  # for a tracking server, at most


class Terminated(BaseException):
    """SIGTERM: a job was stopped or a machine is wanted back."""


@contextlib.contextmanager
def signals() -> Iterator[None]:
    """SIGTERM inside arrives as KeyboardInterrupt, and leaves as `Terminated`."""
    before = signal.getsignal(signal.SIGTERM)
    install_sigterm()
    try:
        yield
    except KeyboardInterrupt:
        if was_terminated():
            raise Terminated from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def install_sigterm() -> None:
    """Once more after `ray.init`, which replaces what was there."""
    def terminate(*_):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not cut the orderly end short
        # While Ray waits it asks for signals itself and lets no other exception of a handler through.
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminate)


def was_terminated() -> bool:
    return signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


def ending_s(code: int) -> float:
    """Seconds that the end of a driver with this exit status may take: a job that is stopped has 3 before SIGKILL."""
    if code != EXIT_AGAIN:
        return EXIT_WAIT_S
    return min(EXIT_WAIT_S, max(2.0, float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", 3)) - 1))


def let_end() -> None:
    """From here on SIGTERM changes nothing: what is left takes a bounded time and tells how the run ended."""
    signal.signal(signal.SIGTERM, lambda *_: None)  # not SIG_IGN: that says that a SIGTERM came
