"""The number of workers of each start, on tables of nodes."""

from types import SimpleNamespace

import pytest

from orchestrator.cluster import room as module
from orchestrator.cluster.layout import Layout, Node
from orchestrator.cluster.room import Room, WaitedTooLongError


@pytest.fixture
def cluster(monkeypatch):
    """A cluster whose nodes, free nodes, newest checkpoint and clock are values."""

    class Cluster:
        def __init__(self) -> None:
            self.nodes = [Node(0), Node(1), Node(1)]
            self.hosts = {"node0", "node1", "node2"}  # that are alive
            self.answering = {"node0", "node1"}
            self.free: list[Node] = []
            self.step = 0
            self.now = 0.0
            self.asked: str | None = None
            self.noted: list[tuple[str, str]] = []

        def room(self, *numbers: int, together: bool = False) -> Room:
            note = lambda kind, message: self.noted.append((kind, message))  # noqa: E731
            newest = lambda: self.step  # noqa: E731
            asked = lambda: self.asked  # noqa: E731
            return Room(Layout(2, 1, False), numbers, 100.0, newest, asked, note, together)

        def sleep(self, seconds: float) -> None:
            self.now += seconds

    found = Cluster()
    monkeypatch.setattr(module, "alive_nodes", lambda: found.nodes)
    monkeypatch.setattr(module, "present", lambda: (found.nodes, found.answering))
    monkeypatch.setattr(module, "alive_hosts", lambda: found.hosts)
    monkeypatch.setattr(module, "cluster_grows", lambda: False)
    monkeypatch.setattr(module, "free_nodes", lambda: found.free)
    clock = SimpleNamespace(monotonic=lambda: found.now, sleep=found.sleep)
    monkeypatch.setattr(module, "time", clock)
    return found


@pytest.mark.parametrize(
    ("numbers", "cpus", "started"),
    [
        ([2], [0, 1, 1], [2, 2, 2]),  # others may use the CPUs: it is tried again
        ([1, 2], [0, 1, 1], [2, 1, 2]),
        ([1, 2, 4], [0, 1, 1], [2, 1, 2]),
        ([1, 2], [0, 1], [1, 1, 1]),
        ([2], [0, 1], [None, None, None]),
    ],
)
def test_largest_number_with_room_is_tried_first(cluster, numbers, cpus, started):
    cluster.nodes = [Node(number) for number in cpus]
    room = cluster.room(*numbers)
    assert [room.choose() for _ in started] == started


def test_workers_that_die_at_once_do_not_wait_for_room(cluster):
    room = cluster.room(1, 2)
    for _ in range(3):
        assert room.choose() == 2
        room.started()
    assert cluster.noted == []


def test_wait_says_what_is_missing_and_ends(cluster):
    cluster.nodes = [Node(0), Node(1)]
    room = cluster.room(2)
    while cluster.now < 100:
        assert room.choose() is None
    with pytest.raises(WaitedTooLongError, match="no room for 2 .* for 1m40s .compute.wait_for"):
        room.choose()
    assert [kind for kind, _ in cluster.noted] == ["waiting"] * 2
    assert cluster.noted[0][1] == (
        "no room for 2 worker(s) with 1 CPU(s) each: the cluster has 1 CPU(s) on 2 node(s), some "
        "of them perhaps in use, without node2; waiting for 1m40s at most"
    )


def test_wait_ends_when_the_run_is_asked_to_stop(cluster):
    cluster.nodes, cluster.asked = [], "SIGTERM"
    with pytest.raises(WaitedTooLongError, match="^SIGTERM: stopped while it waited"):
        cluster.room(2).choose()


def test_more_workers_start_after_the_next_checkpoint(cluster):
    room = cluster.room(1, 2)

    def later() -> int | None:
        cluster.now += module.LOOK_S
        return room.larger(1)

    assert later() is None, "no CPU is free"
    cluster.free = [Node(0), Node(1)]
    assert (later(), later()) == (None, None), "no new checkpoint"
    cluster.step = 5
    assert later() == 2
    assert room.larger(2) is None
    assert [kind for kind, _ in cluster.noted] == ["resize"]


def test_groups_of_workers_follow_the_nodes(cluster):
    room = cluster.room(2)
    assert room.groups() == 1
    cluster.nodes = [Node(0), Node(1), Node(4)]
    assert room.groups() == 2
    cluster.nodes = [Node(0), Node(1)]
    assert room.groups() == 0
    assert [kind for kind, _ in cluster.noted] == ["waiting"]


def test_groups_that_do_not_start_are_waited_for_as_without_room(cluster):
    room = cluster.room(2)
    assert room.groups(none_starts=True) == 1
    [(kind, message)] = cluster.noted
    assert kind == "waiting" and "some of them perhaps in use" in message
    assert room.groups() == 1
    cluster.asked = "SIGTERM"
    with pytest.raises(WaitedTooLongError, match="^SIGTERM: stopped while it waited"):
        room.groups(none_starts=True)


def test_group_that_must_be_on_one_node_has_no_room_on_two(cluster):
    room = cluster.room(2, together=True)
    cluster.nodes = [Node(1), Node(3), Node(4)]
    assert room.groups() == 3
    cluster.nodes = [Node(1), Node(1)]
    assert room.groups() == 0
    [(_, message)] = cluster.noted
    assert message.startswith("no room for 2 worker(s) on one node with 1 CPU(s) each")


def test_only_hosts_that_the_run_saw_alive_are_missing(cluster):
    room = cluster.room(1, 2)
    assert room.choose() == 2
    room.started()
    cluster.hosts = cluster.answering = {"node0"}
    cluster.nodes = [Node(0), Node(1)]
    assert room.choose() == 1
    later = cluster.room(1, 2)
    assert later.choose() == 1
    [(_, message)] = cluster.noted
    assert message.startswith("going on with 1 worker(s) without node1, node2: ")
