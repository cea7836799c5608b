"""SIGTERM and Ctrl-C in a driver.

Ctrl-C (SIGINT) ends a run at once. SIGTERM comes before a machine or a job is removed: the run
saves a checkpoint if that takes only a few seconds, ends, and can be continued later.

Order of use: `sigterm_interrupts` around the whole command, `while_ray_starts` around `ray.init`,
`asking_to_stop` around the training, then `let_end` until the process exits.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator

from orchestrator.runs.ending import Ending

EXIT_WAIT_S = 60.0  # longest time to wait for a tracking server
# Time between SIGTERM and SIGKILL on Kubernetes and spot instances.
NOTICE_S = 30.0
RAY_JOB_NOTICE_S = 3.0  # default of `ray job stop`
ENDING_S = 5.0  # time reserved after training for the summary and the tracking server

_sigterm_times: list[float] = []  # time.monotonic() of each SIGTERM


class Terminated(BaseException):
    """SIGTERM ended the command."""


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Raise `Terminated` if SIGTERM comes inside the block."""
    _sigterm_times.clear()
    before = signal.signal(signal.SIGTERM, _interrupt)
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
    """Handle signals while `ray.init` runs, which installs its own handler.

    Ray's handler raises SystemExit. If that happens while the process forks, Python drops the
    exception. The pipe below receives every signal, also if another handler is installed.

    Raises:
        Terminated: SIGTERM came.
        KeyboardInterrupt: Ctrl-C came.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    os.set_blocking(write_end, False)
    pipe_before = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    hook_before = sys.unraisablehook
    sys.unraisablehook = _without_exits(hook_before)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, _interrupt)
        sys.unraisablehook = hook_before
        signal.set_wakeup_fd(pipe_before)
        os.close(write_end)
        with open(read_end, "rb") as pipe:
            received = pipe.read()
        if signal.SIGTERM in received:
            raise Terminated from None
        if signal.SIGINT in received:
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
def asking_to_stop(request_stop: Callable[[], None]) -> Iterator[None]:
    """Call `request_stop` if SIGTERM comes inside the block.

    If the block has not ended some seconds later, it is interrupted with KeyboardInterrupt.
    """

    def on_sigterm(*_: object) -> None:
        # A second SIGTERM must not interrupt the stop that the first one began.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _sigterm_times.append(time.monotonic())
        signal.signal(signal.SIGALRM, _interrupt)
        signal.setitimer(signal.ITIMER_REAL, stop_wait_s())
        # If the request cannot be written, the alarm ends the block.
        with contextlib.suppress(OSError):
            request_stop()

    before = signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN if was_terminated() else before)
        signal.setitimer(signal.ITIMER_REAL, 0)


def let_end() -> None:
    """Ignore SIGTERM and Ctrl-C from now on. The rest of the command takes a limited time."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _do_nothing)
    signal.setitimer(signal.ITIMER_REAL, 0)


@contextlib.contextmanager
def ending_on_ctrl_c() -> Iterator[None]:
    """If Ctrl-C comes, end only this block. For use after `let_end`."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGINT, before)


def was_terminated() -> bool:
    """Return whether SIGTERM came since the command began."""
    return bool(_sigterm_times)


def notice_s() -> float:
    """Return the time between SIGTERM and SIGKILL."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", RAY_JOB_NOTICE_S))
    return NOTICE_S


def stop_wait_s() -> float:
    """Return how long the last step and its checkpoint may take after SIGTERM."""
    return max(1.5, notice_s() - ENDING_S)


def tracking_wait_s(ending: Ending) -> float:
    """Return how long a driver may wait for the tracking server after its run has ended."""
    if ending.kind != "again":
        return EXIT_WAIT_S
    spent = time.monotonic() - _sigterm_times[0] if _sigterm_times else 0.0
    return min(EXIT_WAIT_S, max(1.0, notice_s() - spent - 1))


def _interrupt(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _sigterm_times.append(time.monotonic())
    # While Ray waits, it suppresses all other exceptions of a handler.
    raise KeyboardInterrupt


def _do_nothing(*_: object) -> None:
    pass
