"""Long calls of Ray that a signal can interrupt, and short ones of functions on other nodes."""

import contextlib
import ctypes
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from orchestrator.cluster import connection, reach

POLL_S = 0.5
END_S = 20  # for a call to end after KeyboardInterrupt; Ray gives workers 5 s
T = TypeVar("T")


def on_nodes(
    nodes: Collection[str], limit_s: float, function: Callable[..., T], *arguments: Any
) -> dict[str, T]:
    """Call a function on some nodes. Return the results of those that are in time, by node.

    Args:
        nodes: Ray's ids of the nodes.
        limit_s: Seconds for all of them.
        function: What to call.
        arguments: Its arguments.
    """
    found: dict[str, T] = {}

    def call() -> None:
        with contextlib.suppress(Exception):  # the cluster does not answer at the moment
            _on_nodes(found, nodes, limit_s, function, arguments)

    if nodes:
        # The head may be dead, for which Ray waits for a minute or more.
        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(limit_s)
    return dict(found)


def _on_nodes(
    found: dict[str, T],
    nodes: Collection[str],
    limit_s: float,
    function: Callable[..., T],
    arguments: tuple[Any, ...],
) -> None:
    there = reach.answering(set(nodes))
    if not there:
        return
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    asked = {}
    for node in there:
        strategy = NodeAffinitySchedulingStrategy(node, soft=False)
        options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": strategy}
        asked[ray.remote(function).options(**options).remote(*arguments)] = node
    waiting = list(asked)
    while waiting:
        ready, waiting = ray.wait(waiting, timeout=limit_s)
        for reference in ready:
            with contextlib.suppress(ray.exceptions.RayError):  # the node is lost at this moment
                found[asked[reference]] = ray.get(reference)
        if not ready:
            break
    for reference in waiting:
        ray.cancel(reference, force=True)


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
