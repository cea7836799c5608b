"""Finds nodes that do not answer, long before Ray gives them up."""

import contextlib
import errno
import selectors
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from orchestrator.cluster import private
from orchestrator.cluster.layout import Node, node_of
from orchestrator.text import duration

Table = dict[str, dict[str, Any]]  # what Ray knows of each node, by its id
ANSWER_S = 1.0  # for an answer; on a network it takes milliseconds
ANSWERS = (0, errno.ECONNREFUSED)  # `errno` of a connection to a machine that is there
SILENT_S = 5.0  # without an answer, until a line says so
# A node whose link loses packets is silent again and again: the time doubles with each line.
MOST_SILENT_S = 60.0


class Reach:
    """Connects to the nodes again and again.

    A node whose processes are only busy or stopped answers all the same: its kernel does.

    Args:
        note: Gets the kind and the message of an event: `node_silent`, `node_back`, `node_lost`.

    Attributes:
        away: Host names of the nodes that did not answer at the last look, or are lost.
    """

    def __init__(self, note: Callable[[str, str], object]) -> None:
        self._note = note
        self._answered: dict[str, float] = {}  # time.monotonic() of the last answer, by node
        self._noted: set[str] = set()  # silent nodes of which a line says so
        self._patience: dict[str, float] = {}  # seconds until the next line, by node
        self._lost: set[str] = set()
        self.away: list[str] = []

    def look(self, nodes: set[str]) -> None:
        """Connect once to each node. Note which ones are silent, answer again or are lost.

        Args:
            nodes: Ray's ids of the nodes of the workers.
        """
        table = _table()
        if len(table) < 2:
            return
        alive = {id_: table[id_] for id_ in nodes & table.keys() if table[id_]["Alive"]}
        answering = _answering(alive)
        away = []
        for id_ in nodes & table.keys():
            host = table[id_]["NodeManagerHostname"]
            if id_ not in alive:
                self._note_loss(id_, host)
                away.append(host)
            elif self._is_silent(id_, host, id_ in answering):
                away.append(host)
        self.away = sorted(away)

    def _note_loss(self, node: str, host: str) -> None:
        if node not in self._lost:
            self._lost.add(node)
            self._note("node_lost", f"the node {host} is lost: Ray has given it up")

    def _is_silent(self, node: str, host: str, is_answering: bool) -> bool:
        now = time.monotonic()
        silent_s = now - self._answered.setdefault(node, now)
        if is_answering:
            self._answered[node] = now
            if node in self._noted:
                self._noted.remove(node)
                message = f"the node {host} answers again after {duration(silent_s)}"
                self._note("node_back", f"{message}: its network was cut or bad, or it restarted")
            return False
        if node not in self._noted and silent_s >= self._patience.get(node, SILENT_S):
            self._noted.add(node)
            self._patience[node] = min(2 * self._patience.get(node, SILENT_S), MOST_SILENT_S)
            message = f"the node {host} does not answer: it is down, or its network is cut or bad"
            self._note("node_silent", message)
        return silent_s >= SILENT_S


def free_nodes() -> list[Node]:
    """Return the machines that can be used, with the CPUs and GPUs that nothing uses now."""
    free = private.free_nodes()
    table = _usable()
    there = _answering(table) if len(table) > 1 else set(table)
    return [free[id_] for id_ in there & free.keys()]


def present() -> tuple[list[Node], set[str]]:
    """Return the machines that can be used, and their host names."""
    table = _usable()
    there = _answering(table) if len(table) > 1 else set(table)
    nodes = [node_of(table[id_]["Resources"]) for id_ in there]
    return nodes, {table[id_]["NodeManagerHostname"] for id_ in there}


def worker_nodes() -> set[str]:
    """Return Ray's ids of the machines with CPUs that it has not given up."""
    return {id_ for id_, node in _alive().items() if node["Resources"].get("CPU", 0) >= 1}


def answering(nodes: set[str]) -> set[str]:
    """Return those of some nodes, by Ray's ids, that Ray has not given up and that answer."""
    return _answering({id_: node for id_, node in _alive().items() if id_ in nodes})


def alive_hosts() -> set[str]:
    """Return the host names of the machines that Ray has not given up."""
    return {node["NodeManagerHostname"] for node in _alive().values()}


def _usable() -> Table:
    """Return the machines that are alive. Ray starts nothing on one that is being drained."""
    draining = private.draining_nodes()
    return {id_: node for id_, node in _alive().items() if id_ not in draining}


def _alive() -> Table:
    return {id_: node for id_, node in _table().items() if node["Alive"]}


def _answering(table: Table) -> set[str]:
    """Return the ids of the nodes that answer."""
    return answers(
        {id_: (n["NodeManagerAddress"], n["NodeManagerPort"]) for id_, n in table.items()}
    )


def _table() -> Table:
    """Return what Ray knows of each node, by its id; empty if Ray does not answer."""
    if "ray" not in sys.modules:
        return {}
    import ray

    try:
        return {node["NodeID"]: node for node in ray.nodes()}
    except Exception:  # the cluster does not answer at the moment
        return {}


def answers(places: Mapping[str, tuple[str, int]]) -> set[str]:
    """Return the keys of the addresses that accept or refuse a connection within a second."""
    found = set()
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        for key, place in places.items():
            one = stack.enter_context(socket.socket())
            one.setblocking(False)
            error = one.connect_ex(place)
            if error == errno.EINPROGRESS:
                selector.register(one, selectors.EVENT_WRITE, (key, one))
            elif error in ANSWERS:
                found.add(key)
        deadline = time.monotonic() + ANSWER_S
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for ready, _ in selector.select(left):
                selector.unregister(ready.fileobj)
                key, one = ready.data
                error = one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if error in ANSWERS:
                    found.add(key)
    return found
