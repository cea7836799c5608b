"""Nodes that do not answer, lost ones, and the events about them."""

import contextlib
import socket

import pytest

from orchestrator.cluster import reach
from orchestrator.cluster.layout import Node


@pytest.fixture
def silent():
    """An address that does not answer: the queue of its listener is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield listener.getsockname()


def test_machine_answers_also_if_nothing_listens_there(silent, monkeypatch):
    monkeypatch.setattr(reach, "ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        places = {
            "listens": server.getsockname(),
            "refuses": closed.getsockname(),
            "silent": silent,
        }
        assert reach.answers(places) == {"listens", "refuses"}


def test_present_machines_are_those_that_answer_and_are_not_drained(monkeypatch):
    table = {
        id_: {
            "NodeManagerHostname": f"host-{id_}",
            "NodeManagerAddress": "",
            "NodeManagerPort": 1,
            "Alive": id_ != "c",
            "Resources": {"CPU": 4.0},
        }
        for id_ in "abcd"
    }
    monkeypatch.setattr(reach, "_table", lambda: table)
    monkeypatch.setattr(reach, "answers", lambda places: places.keys() & {"a", "c", "d"})
    monkeypatch.setattr(reach.private, "draining_nodes", lambda: {"d": "host-d"})
    assert reach.present() == ([Node(4)], {"host-a"})
    # Ray lists what is free on a silent node until it gives the node up.
    free = {id_: Node(number) for number, id_ in enumerate("abcd", 1)}
    monkeypatch.setattr(reach.private, "free_nodes", lambda: free)
    assert reach.free_nodes() == [Node(1)]
    assert reach.alive_hosts() == {"host-a", "host-b", "host-d"}


@pytest.fixture
def three(monkeypatch) -> tuple[dict, set[str]]:
    """Ray's table of three nodes, and those that answer."""
    table = {
        id_: {
            "NodeID": id_,
            "NodeManagerHostname": f"host-{id_}",
            "NodeManagerAddress": "",
            "NodeManagerPort": 1,
            "Alive": True,
        }
        for id_ in "abc"
    }
    answering = {"a", "b"}
    monkeypatch.setattr(reach, "_table", lambda: table)
    monkeypatch.setattr(reach, "answers", lambda places: answering)
    return table, answering


def test_silence_is_noted_once_and_its_end_and_a_loss(monkeypatch, three):
    noted = []
    table, answering = three
    monkeypatch.setattr(reach, "SILENT_S", 0.0)
    found = reach.Reach(lambda kind, message: noted.append((kind, message)))

    def look() -> list[str]:
        before = len(noted)
        found.look({"a", "b", "gone from the table", ""})
        return [kind for kind, _ in noted[before:]]

    assert (look(), found.away) == ([], [])
    answering.remove("b")
    assert (look(), found.away) == (["node_silent"], ["host-b"])
    assert (look(), found.away) == ([], ["host-b"])
    answering.add("b")
    assert (look(), found.away) == (["node_back"], [])
    table["b"]["Alive"] = False
    assert (look(), found.away) == (["node_lost"], ["host-b"])
    assert (look(), found.away) == ([], ["host-b"])
    assert all("host-b" in message for _, message in noted)


def test_node_that_is_silent_again_and_again_has_fewer_and_fewer_lines(monkeypatch, three):
    noted = []
    _, answering = three
    clock = 0.0
    monkeypatch.setattr(reach.time, "monotonic", lambda: clock)
    found = reach.Reach(lambda kind, message: noted.append((kind, clock)))
    for second in range(600):  # silent for 15 s, then it answers for 5 s
        clock = float(second)
        (answering.discard if second % 20 < 15 else answering.add)("b")
        found.look({"a", "b"})
        assert (found.away == ["host-b"]) == (
            second % 20 + (second >= 20) >= 5 and second % 20 < 15
        )
    assert noted == [("node_silent", 5), ("node_back", 15), ("node_silent", 29), ("node_back", 35)]
