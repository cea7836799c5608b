"""The exchange on simulated ranks, which run its code as threads: bits, and bytes of each link."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.scaling import busiest, ring, simulate
from orchestrator.train.ranks.slots import deal, deal_in_rounds, subtrees

SLOTS = 64
POWERS = (1, 2, 4, 8, 16, 32, 64)


def leaves(numbers: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    scale = 10.0 ** torch.randint(-3, 4, (SLOTS, numbers), generator=generator)
    return torch.rand(SLOTS, numbers, generator=generator) * scale


def tree_sum(rows: torch.Tensor) -> torch.Tensor:
    while len(rows) > 1:
        rows = rows[::2] + rows[1::2]
    return rows[0]


def nodes_of(world: int, size: int) -> list[str]:
    return [f"node {rank // size}" for rank in range(world)]


@pytest.mark.parametrize(
    ("world", "size"), [(w, s) for w in POWERS[1:] for s in (1, 2, 4, 8) if s <= w]
)
def test_links_carry_no_more_bytes_than_those_of_a_ring(world, size):
    numbers = 128
    results, wire = simulate(leaves(numbers), nodes_of(world, size))
    expected = tree_sum(leaves(numbers))
    assert len(results) == world
    assert all(torch.equal(result, expected) for result in results)
    inside, between = busiest(wire, nodes_of(world, size))
    nodes = world // size
    assert inside == (ring(size, numbers) if size > 1 else 0)
    assert between == (ring(nodes, numbers) if nodes > 1 else 0)
    assert max(inside, between) <= ring(world, numbers)


@pytest.mark.parametrize(("world", "times"), [(16, 2.63), (32, 3.60), (64, 4.06)])
def test_one_level_would_send_more_between_nodes(world, times):
    _, wire = simulate(leaves(128), ["one"] * world)
    _, between = busiest(wire, nodes_of(world, 8))
    assert between / ring(world, 128) == pytest.approx(times, abs=0.005)


@pytest.mark.parametrize(
    "nodes",
    [
        *("A" * world for world in (3, 5, 7, 63)),
        "AABBCC",
        "AAABBB",
        "AAAABB",  # not the same number on each node: one level
        "ABCABC",  # not numbered node by node
        "ABBACC",
        "ABC" * 4,
        *(pytest.param("ABCDEFGH" * n, marks=pytest.mark.slow) for n in (3, 6, 7)),
    ],
)
def test_any_number_of_ranks_on_any_nodes_has_the_bits_of_one(nodes):
    numbers = 2 * len(nodes)
    results, _ = simulate(leaves(numbers), list(nodes))
    assert len(results) == len(nodes)
    assert all(torch.equal(result, tree_sum(leaves(numbers))) for result in results)


@pytest.mark.parametrize(
    ("nodes", "slots"), [("A" * 8, 8), ("AAAABBBB", 8), ("ABBA", 16), ("A" * 32, 2)]
)
def test_two_rounds_have_the_bits_of_one_and_send_no_more_between_nodes(nodes, slots):
    numbers = 2 * len(nodes)
    results, wire = simulate(leaves(numbers), list(nodes), rounds=2)
    assert all(torch.equal(result, tree_sum(leaves(numbers))) for result in results)
    inside, between = busiest(wire, list(nodes))
    once, between_once = busiest(simulate(leaves(numbers), list(nodes))[1], list(nodes))
    assert inside == 1.5 * once and between == between_once
    dealt = deal_in_rounds(SLOTS, [nodes.count(node) for node in sorted(set(nodes))], 2)
    assert [len(mine) for mine in dealt] == [2] * len(nodes)
    assert sorted(slot for mine in dealt for part in mine for slot in part) == list(range(SLOTS))
    assert {sum(map(len, mine)) for mine in dealt} == {slots}


@pytest.mark.parametrize("nodes", ["ABCDEFGH", "AAABBB", "AAAABB"])
def test_ranks_that_would_send_more_between_nodes_have_one_round(nodes):
    results, _ = simulate(leaves(len(nodes)), list(nodes), rounds=2)
    assert all(torch.equal(result, tree_sum(leaves(len(nodes)))) for result in results)
    sizes = [nodes.count(node) for node in sorted(set(nodes))]
    assert {len(mine) for mine in deal_in_rounds(SLOTS, sizes, 2)} == {1}


@given(st.integers(0, 7).flatmap(lambda k: st.tuples(st.just(1 << k), st.integers(1, 1 << k))))
def test_slots_are_dealt_out_once_and_evenly(case):
    slots, workers = case
    dealt = deal(slots, workers)
    assert [slot for mine in dealt for slot in mine] == list(range(slots))
    assert len(dealt) == workers
    assert all(1 <= len(mine) <= math.ceil(slots / workers) for mine in dealt)
    for mine in dealt:
        pieces = subtrees(mine)
        assert [slot for first, size in pieces for slot in range(first, first + size)] == list(mine)
        assert all(size & (size - 1) == 0 and first % size == 0 for first, size in pieces)
        assert slots % workers or len(pieces) == 1 or workers & (workers - 1)
