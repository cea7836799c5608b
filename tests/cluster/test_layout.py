"""The workers that a run gets on a cluster: tables of requests and nodes."""

import re

import pytest

from orchestrator.cluster import layout
from orchestrator.cluster.layout import (
    Layout,
    Node,
    find_layout,
    resolve_layout,
    worker_environment,
)
from orchestrator.config.experiment import load_experiment
from orchestrator.errors import UserError

EIGHT = ["train.micro_batch_size=1", "train.global_batch_size=8"]  # eight slots
TWO = ["train.micro_batch_size=3", "train.global_batch_size=18"]  # six micro-batches in two slots
SIXTEEN = ["train.micro_batch_size=1", "train.global_batch_size=16"]

TABLE = [
    # words, (CPUs, GPUs) of each node, workers, CPUs of each, GPU
    ([], [(2, 0)], 1, 2, False),
    (EIGHT, [(2, 0)], 1, 2, False),
    (EIGHT, [(2, 0), (8, 0)], 1, 8, False),  # a worker uses one node
    ([*EIGHT, "compute.num_workers=2"], [(2, 0)], 2, 1, False),
    ([*EIGHT, "compute.num_workers=4"], [(2, 0), (2, 0)], 4, 1, False),
    ([*EIGHT, "compute.num_workers=2", "compute.cpus_per_worker=4"], [(8, 0)], 2, 4, False),
    (["compute.cpus_per_worker=1"], [(8, 0)], 1, 1, False),
    (EIGHT, [(16, 8)], 8, 1, True),
    (EIGHT, [(16, 4), (16, 4)], 8, 1, True),
    (EIGHT, [(16, 1)], 1, 1, True),
    (EIGHT, [(64, 16)], 8, 1, True),
    (EIGHT, [(16, 3)], 3, 1, True),
    (EIGHT, [(16, 6)], 4, 1, True),  # with six, a worker has two slots as well
    ([*SIXTEEN, "train.reduction_slots=16"], [(16, 6)], 6, 1, True),
    ([*EIGHT, "compute.num_workers=6"], [(16, 8)], 6, 1, True),
    (TWO, [(16, 8)], 2, 1, True),
    ([*EIGHT, "compute.use_gpu=false"], [(16, 8)], 1, 16, False),
    ([*EIGHT, "compute.use_gpu=true", "compute.num_workers=2"], [(16, 8)], 2, 1, True),
    ([*EIGHT, "compute.num_workers=[1, 2]"], [(8, 0)], 2, 1, False),
    ([*EIGHT, "compute.num_workers=[1, 2]"], [(1, 0)], 1, 1, False),  # with the same threads
    ([*EIGHT, "compute.num_workers=[8, 2]"], [(16, 4)], 2, 1, True),
]


def overrides(message: str) -> list[str]:
    """Return the overrides that a message advises."""
    return re.findall(r"(\w+\.\w+=\w+)", message.partition("; ")[2])


def resolved(words: list[str], nodes, **more) -> Layout:
    return resolve_layout(load_experiment(None, words), [Node(*node) for node in nodes], **more)


@pytest.mark.parametrize(("words", "nodes", "workers", "cpus", "gpu"), TABLE)
def test_layout_is_the_largest_that_slots_and_devices_allow(words, nodes, workers, cpus, gpu):
    assert resolved(words, nodes) == Layout(workers, cpus, gpu)


@pytest.mark.parametrize(
    ("words", "nodes", "idle", "used"),
    [
        (EIGHT, [(64, 16)], "8 of 16", None),  # eight sequences
        ([*EIGHT, "train.global_batch_size=64"], [(64, 32)], "24 of 32", 32),
        ([*EIGHT, "train.reduction_slots=2"], [(16, 6)], "4 of 6", 4),
        (EIGHT, [(16, 6)], "2 of 6", None),  # eight sequences
        (SIXTEEN, [(16, 6)], "2 of 6", 6),
        (SIXTEEN, [(16, 5)], "1 of 5", None),
        (TWO, [(16, 8)], "6 of 8", None),
        (["train.micro_batch_size=6", "train.global_batch_size=24"], [(16, 8)], "4 of 8", 8),
        ([*TWO, "train.global_batch_size=12"], [(16, 8)], "4 of 8", None),
        (EIGHT, [(16, 8)], None, None),
        (EIGHT, [(16, 0)], None, None),
        ([*EIGHT, "compute.use_gpu=false"], [(16, 8)], None, None),
    ],
)
def test_idle_gpus_are_reported_with_the_change_that_uses_more(capsys, words, nodes, idle, used):
    resolved(words, nodes)
    output = capsys.readouterr().out
    assert (f"{idle} GPUs stay idle" in output) if idle else output == ""
    assert (f" would use {used}\n" in output) == (used is not None)
    if used is not None:
        assert resolved([*words, *overrides(output)], nodes).num_workers == used


@pytest.mark.parametrize(
    ("words", "nodes", "asked", "found"),
    [
        (
            [*EIGHT, "compute.num_workers=4"],
            [(2, 0)],
            "4 worker(s) with 1 CPU(s) each",
            "2 CPU(s) and 0 GPU(s) on 1 node(s)",
        ),
        (
            ["compute.cpus_per_worker=8"],
            [(4, 0), (4, 0)],
            "1 worker(s) with 8 CPU(s) each",
            "8 CPU(s) and 0 GPU(s) on 2 node(s)",
        ),
        (
            ["compute.use_gpu=true"],
            [(4, 0)],
            "1 worker(s) with 1 CPU(s) and 1 GPU each",
            "0 GPU(s)",
        ),
        (
            [*EIGHT, "compute.num_workers=8"],
            [(16, 4)],
            "8 worker(s) with 1 CPU(s) and 1 GPU each",
            "4 GPU(s)",
        ),
        (
            [*EIGHT, "compute.cpus_per_worker=4"],
            [(4, 8)],
            "8 worker(s) with 4 CPU(s) and 1 GPU each",
            "4 CPU(s) and 8 GPU(s)",
        ),
        ([], [], "1 worker(s)", "0 CPU(s) and 0 GPU(s) on 0 node(s)"),
        ([*EIGHT, "compute.num_workers=[8, 4]"], [(2, 0)], "4 worker(s)", "2 CPU(s)"),
    ],
)
def test_too_large_request_is_refused_unless_the_cluster_grows(words, nodes, asked, found):
    with pytest.raises(UserError) as caught:
        resolved(words, nodes)
    assert asked in str(caught.value)
    assert found in str(caught.value)
    assert "\n" not in str(caught.value)
    change = overrides(str(caught.value))
    assert (change == ["compute.use_gpu=false"]) == (words == ["compute.use_gpu=true"])
    if nodes:
        assert isinstance(resolved([*words, *change], nodes), Layout), "the advice is refused"
    explicit = [
        f"compute.use_gpu={str('GPU each' in asked).lower()}",
        f"compute.num_workers={asked.split()[0]}",
    ]
    assert isinstance(resolved([*words, *explicit], nodes, grows=True), Layout)


def test_run_that_has_begun_waits_on_a_shared_cluster_for_its_nodes(monkeypatch):
    monkeypatch.setattr(layout, "alive_nodes", lambda: [Node(0, 0), Node(1, 0)])
    experiment = load_experiment(None, [*EIGHT, "compute.num_workers=2"])
    before = Layout(2, 1, False)
    monkeypatch.delenv("ESPALIER_AUTOSCALING", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert find_layout(experiment, before) == before
    with pytest.raises(UserError, match=r"asked for 2 worker"):
        find_layout(experiment)
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(UserError, match=r"asked for 2 worker"):
        find_layout(experiment, before)


def test_workers_get_variables_of_the_driver(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "/somewhere")
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert worker_environment()["TIKTOKEN_CACHE_DIR"] == "/somewhere"
    assert worker_environment()["GOMP_SPINCOUNT"] == "1000"


def test_growing_cluster_without_a_gpu_needs_explicit_settings():
    with pytest.raises(UserError, match="compute.use_gpu"):
        resolved([], [(4, 0)], grows=True)
    with pytest.raises(UserError, match="compute.num_workers"):
        resolved(["compute.use_gpu=true"], [(4, 0)], grows=True)
    assert resolved([], [(4, 1)], grows=True).use_gpu


@pytest.mark.parametrize(
    ("words", "nodes", "recorded", "cpus"),
    [
        ([], [(8, 0)], Layout(1, 2, False), 2),  # kept on a larger machine
        ([*EIGHT, "compute.num_workers=2"], [(8, 0)], Layout(1, 4, False), 4),
        ([*EIGHT, "compute.num_workers=4"], [(4, 0)], Layout(1, 4, False), 1),  # would not fit
        ([], [(2, 0)], Layout(1, 8, False), 2),
        (["compute.cpus_per_worker=3"], [(8, 0)], Layout(1, 2, False), 3),  # explicit
    ],
)
def test_recorded_cpus_per_worker_are_kept_if_they_fit(words, nodes, recorded, cpus):
    assert resolved(words, nodes, recorded=recorded).cpus_per_worker == cpus


def test_stage_with_workers_on_two_nodes_that_share_nothing_is_refused(monkeypatch):
    nodes = [Node(1), Node(3)]
    monkeypatch.setattr(layout, "alive_nodes", lambda: nodes)
    mirror = "s3://bucket/m"
    assert layout.capacity(Layout(2, 1, False)) == 2
    assert layout.capacity(Layout(2, 1, False), mirror) == 1
    assert layout.capacity(Layout(5, 1, False), mirror) == 0, "nodes may come back"
    with pytest.raises(UserError, match="no node has room for 4 workers .* mirror=s3://bucket/m$"):
        layout.capacity(Layout(4, 1, False), mirror)
