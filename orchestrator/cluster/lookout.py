"""Says what a preparation waits for on a cluster, and ends the wait."""

import contextlib
import os
import signal
import threading
import time

from orchestrator.cluster import connection, private
from orchestrator.cluster.layout import Layout
from orchestrator.cluster.reach import Reach, worker_nodes
from orchestrator.cluster.room import LINE_S, LOOK_S, Room, WaitedTooLongError
from orchestrator.errors import UnreadableError
from orchestrator.text import duration

QUIET_S = 30.0  # until a line says that no task has ended
WAIT_S = 1800.0  # the default of `compute.wait_for_nodes_s`


class Lookout:
    """Looks at the nodes of a cluster in a thread, inside a `with` block.

    If nodes are lost or others use their CPUs, Ray waits for ever and prints nothing. To end the
    wait, the thread sends SIGALRM, if it has a handler; see `jobs.restart.watching`.

    Args:
        wait_s: Longest time in which no node has a CPU.

    Attributes:
        error: Why the wait was ended; None: it may go on.
    """

    error: UnreadableError | None = None

    def __init__(self, wait_s: float) -> None:
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lookout", daemon=True)
        self._reach = Reach(_print)
        self._room = Room(Layout(1, 1, False), [1], wait_s, lambda: 0, lambda: None, _print)
        self._nodes: set[str] = set()
        self._ended_at = self._line_at = time.monotonic()

    def __enter__(self) -> "Lookout":
        if connection.is_shared():
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    def task_ended(self) -> None:
        """Note that a task has ended."""
        self._ended_at = self._line_at = time.monotonic()

    def _watch(self) -> None:
        while self.error is None and not self._closed.wait(LOOK_S):
            with contextlib.suppress(Exception):  # the cluster does not answer at the moment
                self._look()

    def _look(self) -> None:
        self._nodes |= worker_nodes()
        self._reach.look(self._nodes)
        try:
            has_room = self._room.groups() > 0
        except WaitedTooLongError as error:
            self.error = UnreadableError(str(error))
            if callable(signal.getsignal(signal.SIGALRM)):
                os.kill(os.getpid(), signal.SIGALRM)
            return
        now = time.monotonic()
        is_quiet = now - self._ended_at > QUIET_S and now > self._line_at
        if has_room and is_quiet:
            self._line_at = now + LINE_S
            why = "all CPUs are in use, perhaps by others"
            if any(node.cpus for node in private.free_nodes().values()):
                why = "a node or its network may be slow"
            _print("", f"no task has ended for {duration(now - self._ended_at)}: {why}")


def _print(kind: str, message: str) -> None:
    print(message, flush=True)
