"""How a driver is told to stop: Ctrl-C and SIGTERM, told apart, beside a Ray that handles signals itself."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator

from orchestrator.errors import EXIT_AGAIN

EXIT_WAIT_S = 60  # for a tracking server, at most
NOTICE_S = 30.0  # that a machine gives between SIGTERM and SIGKILL, where nobody says: Kubernetes' and the spot markets'


class Terminated(BaseException):
    """SIGTERM: a job was stopped or a machine is wanted back."""


_since: list[float] = []  # when the first SIGTERM came


@contextlib.contextmanager
def signals() -> Iterator[None]:
    """SIGTERM inside arrives as KeyboardInterrupt, and leaves as `Terminated`."""
    before = signal.getsignal(signal.SIGTERM)
    _since.clear()
    install_sigterm()
    try:
        yield
    except KeyboardInterrupt:
        if was_terminated():
            raise Terminated from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def while_ray_starts() -> Iterator[None]:
    """`ray.init` puts a handler of its own in place, which exits; where that falls into a fork, Python drops the exit."""

    def unraisable(dropped) -> None:
        if not isinstance(dropped.exc_value, SystemExit | KeyboardInterrupt):
            hook(dropped)

    read, write = os.pipe()
    sys.unraisablehook, hook = (
        unraisable,
        sys.unraisablehook,
    )  # what was dropped is heard below: no traceback of it
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(
        write, warn_on_full_buffer=False
    )  # hears every signal, whoever handles it
    try:
        yield
    finally:
        install_sigterm()
        sys.unraisablehook = hook
        signal.set_wakeup_fd(before)
        os.close(write)
        with open(read, "rb") as pipe:
            heard = pipe.read()
        if signal.SIGTERM in heard:
            raise Terminated from None
        if signal.SIGINT in heard:
            raise KeyboardInterrupt from None


def install_sigterm() -> None:
    """SIGTERM interrupts; once more where somebody replaced what was there."""
    signal.signal(signal.SIGTERM, lambda *_: _interrupt())


@contextlib.contextmanager
def asking(ask: Callable[[], None]) -> Iterator[None]:
    """SIGTERM inside calls `ask`, and interrupts only what has not ended by itself some seconds later."""

    def terminate(*_):
        signal.signal(
            signal.SIGTERM, signal.SIG_IGN
        )  # a second one must not cut the orderly end short
        _since.append(time.monotonic())
        signal.signal(signal.SIGALRM, lambda *_: _interrupt())
        signal.setitimer(signal.ITIMER_REAL, stop_wait_s())
        with contextlib.suppress(OSError):  # the file system is away, and the alarm ends the wait
            ask()

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN if was_terminated() else before)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _interrupt() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _since.append(time.monotonic())
    # While Ray waits it asks for signals itself and lets no other exception of a handler through.
    raise KeyboardInterrupt


def was_terminated() -> bool:
    return bool(_since)


def notice_s() -> float:
    """Seconds from SIGTERM to SIGKILL: `ray job stop` gives 3, or what the head was started with."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", 3))
    return NOTICE_S


def stop_wait_s() -> float:
    """How much of the notice a step and its checkpoint may take; the rest is for the last words."""
    return max(1.5, notice_s() - 5)


def ending_s(code: int) -> float:
    """Seconds that the end of a driver with this exit status may take."""
    if code != EXIT_AGAIN:
        return EXIT_WAIT_S
    spent = time.monotonic() - _since[0] if _since else 0.0
    return min(EXIT_WAIT_S, max(1.0, notice_s() - spent - 1))


def let_end() -> None:
    """From here on SIGTERM and Ctrl-C change nothing: what is left takes a bounded time and tells how the run ended."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0)


@contextlib.contextmanager
def may_be_cut() -> Iterator[None]:
    """After `let_end`: Ctrl-C ends what is inside, and nothing else."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGINT, before)
