"""Calls in a thread, and Ctrl-C."""

import os
import signal
import threading
import time

import pytest

from orchestrator.cluster import calls, connection


@pytest.fixture(autouse=True)
def interrupts():
    """Ctrl-C raises KeyboardInterrupt, also if the tests were started with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_when(event, late=False):
    """Send SIGINT to this process; a late one does not end a wait that the main thread has begun.

    That is a signal that another thread gets, or the main thread just before the wait.
    """

    def interrupt():
        event.wait()
        if late:
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        else:
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()


def test_call_returns_or_raises_what_it_would_without_a_thread():
    assert calls.interruptibly(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        calls.interruptibly(lambda: 1 // 0)


@pytest.mark.parametrize("late", [False, True])
def test_ctrl_c_reaches_the_call(monkeypatch, late):
    monkeypatch.setattr(connection, "failure", lambda: None)
    started, ended = threading.Event(), threading.Event()

    def call():
        try:
            started.set()
            while True:
                time.sleep(0.01)
        finally:
            ended.set()

    interrupt_when(started, late)
    with pytest.raises(KeyboardInterrupt):
        calls.interruptibly(call)
    assert ended.is_set()


def test_call_to_a_dead_ray_does_not_hold_up_the_driver(monkeypatch):
    monkeypatch.setattr(connection, "failure", lambda: "the head does not answer")
    started, may_end = threading.Event(), threading.Event()

    def call():
        started.set()
        may_end.wait()

    interrupt_when(started)
    with pytest.raises(KeyboardInterrupt):
        calls.interruptibly(call)
    may_end.set()
