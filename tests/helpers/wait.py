"""Waits for something that another thread or process does."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(condition: Callable[[], T], limit_s: float = 60.0) -> T:
    """Call `condition` until it returns a true value, and return it. Fail after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, f"not true within {limit_s} s"
        time.sleep(0.01)
