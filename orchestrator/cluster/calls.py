"""Long calls of Ray that a signal can interrupt."""

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from orchestrator.cluster import connection

POLL_S = 0.5
END_S = 20  # for a call to end after KeyboardInterrupt; Ray gives workers 5 s
T = TypeVar("T")


def interruptibly(call: Callable[[], T]) -> T:
    """Make a call in a thread, and return its result. KeyboardInterrupt always ends the wait.

    If the head of a cluster dies, Ray's compiled code waits for it, which no signal interrupts.
    After a minute it ends the process. If Ray works, the call gets the KeyboardInterrupt, too.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=run, name="ray", daemon=True)
    try:
        thread.start()
        # A wait without a limit can miss a signal that comes just before it, and then never ends.
        while not outcome.done():
            wait([outcome], POLL_S)
        return outcome.result()
    except KeyboardInterrupt:
        if not outcome.done() and connection.failure() is None:
            ident = ctypes.c_ulong(thread.ident or 0)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(KeyboardInterrupt))
            wait([outcome], END_S)
        raise
