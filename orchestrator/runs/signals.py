"""Signals that stop a driver, and Ctrl-C.

Ctrl-C (SIGINT) ends a run at once. SIGTERM comes before a machine or a job is removed, SIGHUP when
the terminal is closed: the run saves a checkpoint if that takes only a few seconds, ends, and can
be continued later. A signal that was ignored when the command began stays ignored, such as SIGHUP
under nohup and SIGINT in the background job of a script.

Order of use: `begin`, `while_ray_starts` around `ray.init`, `asking_to_stop` around the training,
then `let_end` until the process exits.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import TypeAlias

from orchestrator.machine import seconds_in
from orchestrator.runs.ending import Ending

Handler: TypeAlias = Callable[[int, FrameType | None], object] | signal.Handlers

EXIT_WAIT_S = 60.0  # longest time to wait for a tracking server
# Time between SIGTERM and SIGKILL on Kubernetes and spot instances.
NOTICE_S = 30.0
RAY_JOB_NOTICE_S = 3.0  # default of `ray job stop`
ENDING_S = 5.0  # time reserved after training for the summary and the tracking server

STOPS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

_stop_times: list[float] = []  # time.monotonic() of each signal of STOPS
ignored: set[int] = set()  # signals that were ignored when the command began


def begin() -> None:
    """Let Ctrl-C and a signal of STOPS raise KeyboardInterrupt.

    After one of STOPS, `was_stopped` returns True.
    """
    _stop_times.clear()
    ignored.clear()
    for number in (*STOPS, signal.SIGINT):
        if signal.getsignal(number) is signal.SIG_IGN:
            ignored.add(number)
    _handle([signal.SIGINT], signal.default_int_handler)
    _handle(STOPS, _interrupt)


def _handle(numbers: Iterable[int], handler: Handler) -> None:
    """Set the handler of signals, except of those that were ignored when the command began."""
    for number in numbers:
        if number not in ignored:
            signal.signal(number, handler)


def named(numbers: Iterable[int]) -> str | None:
    """Return the name of the first signal of STOPS among the numbers; None if there is none."""
    return next((signal.Signals(number).name for number in numbers if number in STOPS), None)


@contextlib.contextmanager
def while_ray_starts() -> Iterator[None]:
    """Handle signals while `ray.init` runs, which installs its own handlers.

    Ray's handler of SIGTERM raises SystemExit. If that happens while the process forks, Python
    drops the exception. The pipe below receives every signal, also if another handler is installed.

    Raises:
        KeyboardInterrupt: Ctrl-C or a signal of STOPS came.
    """
    if signal.SIGINT in ignored:
        # Ray calls the handler that it finds, and SIG_IGN cannot be called.
        signal.signal(signal.SIGINT, _do_nothing)
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    os.set_blocking(write_end, False)
    pipe_before = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    hook_before = sys.unraisablehook
    sys.unraisablehook = _without_exits(hook_before)
    try:
        yield
    finally:
        _handle(STOPS, _interrupt)
        for number in ignored.intersection(STOPS):
            signal.signal(number, signal.SIG_IGN)
        sys.unraisablehook = hook_before
        signal.set_wakeup_fd(pipe_before)
        os.close(write_end)
        with open(read_end, "rb") as pipe:
            # None if a process that was just forked still has the other end.
            received = set(pipe.read() or b"") - ignored
        if named(received):
            _stop_times.append(time.monotonic())
        if named(received) or signal.SIGINT in received:
            raise KeyboardInterrupt from None


def _without_exits(
    hook: Callable[["sys.UnraisableHookArgs"], object],
) -> Callable[["sys.UnraisableHookArgs"], object]:
    """Return a hook for dropped exceptions that ignores exceptions of signal handlers."""

    def report(dropped: "sys.UnraisableHookArgs") -> None:
        if not isinstance(dropped.exc_value, SystemExit | KeyboardInterrupt):
            hook(dropped)

    return report


@contextlib.contextmanager
def asking_to_stop(request_stop: Callable[[str], None]) -> Iterator[None]:
    """Call `request_stop` with the name of the signal if one of STOPS comes inside the block.

    If the block has not ended some seconds later, it is interrupted with KeyboardInterrupt.
    """

    def on_stop(number: int, *_: object) -> None:
        # A second signal must not interrupt the stop that the first one began.
        _handle(STOPS, signal.SIG_IGN)
        _stop_times.append(time.monotonic())
        signal.setitimer(signal.ITIMER_REAL, stop_wait_s())
        # If the request cannot be written, the alarm ends the block.
        with contextlib.suppress(OSError):
            request_stop(signal.Signals(number).name)

    signal.signal(signal.SIGALRM, signal.default_int_handler)
    _handle(STOPS, on_stop)
    try:
        yield
    finally:
        _handle(STOPS, signal.SIG_IGN if was_stopped() else _interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0)


def interrupt_work() -> None:
    """Raise KeyboardInterrupt in the block of `asking_to_stop`. Any thread may call this.

    The signal is not SIGINT, which may be ignored.
    """
    os.kill(os.getpid(), signal.SIGALRM)


def let_end() -> None:
    """Ignore all these signals from now on. The rest of the command takes a limited time."""
    _handle((*STOPS, signal.SIGINT, signal.SIGALRM), _do_nothing)
    signal.setitimer(signal.ITIMER_REAL, 0)


@contextlib.contextmanager
def ending_on_signal() -> Iterator[None]:
    """End only this block at Ctrl-C or the first of STOPS. For use after `let_end`."""
    _handle([signal.SIGINT], signal.default_int_handler)
    if not was_stopped():
        _handle(STOPS, _interrupt)
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        _handle((*STOPS, signal.SIGINT), _do_nothing)


def was_stopped() -> bool:
    """Return whether a signal of STOPS came since the command began."""
    return bool(_stop_times)


def notice_s() -> float:
    """Return the time between SIGTERM and SIGKILL.

    Raises:
        UserError: $RAY_JOB_STOP_WAIT_TIME_S is not a whole number.
    """
    default = RAY_JOB_NOTICE_S if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else NOTICE_S
    return seconds_in("RAY_JOB_STOP_WAIT_TIME_S", default)


def stop_wait_s() -> float:
    """Return how long the last step and its checkpoint may take after SIGTERM."""
    return max(1.5, notice_s() - ENDING_S)


def tracking_wait_s(ending: Ending) -> float:
    """Return how long a driver may wait for the tracking server after its run has ended."""
    if ending.kind != "again":
        return EXIT_WAIT_S
    spent = time.monotonic() - _stop_times[0] if _stop_times else 0.0
    return min(EXIT_WAIT_S, max(1.0, notice_s() - spent - 1))


def _interrupt(*_: object) -> None:
    _handle(STOPS, signal.SIG_IGN)
    _stop_times.append(time.monotonic())
    # While Ray waits, it suppresses all other exceptions of a handler.
    raise KeyboardInterrupt


def _do_nothing(*_: object) -> None:
    pass
