"""Waits for something that another thread or process does."""

import subprocess
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(
    condition: Callable[[], T],
    process: subprocess.Popen | None = None,
    limit_s: float = 120.0,
    pause_s: float = 0.01,
) -> T:
    """Call `condition` until it returns a true value, and return it. Fail after `limit_s`.

    Args:
        condition: What to wait for.
        process: Fail if this process ends before.
        limit_s: Seconds; long, because the machines are shared.
        pause_s: Seconds between two calls.
    """
    deadline = time.monotonic() + limit_s
    while not (found := condition()):
        assert process is None or process.poll() is None, (process.returncode, *_output(process))
        assert time.monotonic() < deadline, f"the condition did not become true in {limit_s} s"
        time.sleep(pause_s)
    return found


def _output(process: subprocess.Popen) -> tuple:
    return process.communicate() if process.stdout else ()
