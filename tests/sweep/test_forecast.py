"""The tree on a clock of paper: against schedules worked out by hand, and bounds that no schedule can beat."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.sweep.forecast import forecast
from orchestrator.sweep.tree import Plan, Trial, plan


def tree(*lengths: int, trunk: int = 4) -> Plan:
    """A trunk of 4 steps and one branch of each length."""
    return plan(
        [
            Trial(f"t{i}", "r", np.array([1.0] * trunk + [float(i + 2)] * n))
            for i, n in enumerate(lengths)
        ]
    )


def one(stage) -> float:
    return stage.steps


@pytest.mark.parametrize(("slots", "seconds"), [(1, 4 + 6), (2, 4 + 3), (3, 4 + 3)])
def test_by_hand(slots, seconds):
    """Trunk 4, branches 3, 2 and 1: with two at a time the longest goes first and the other two share a place."""
    assert forecast(tree(1, 3, 2), slots, one, lambda s: 1, True).seconds == seconds


def test_what_is_there_costs_no_time():
    p = tree(1, 3)
    ids = {s.id: s.stop for s in p.stages}
    done = plan(p.trials, ids, ids, {s.id for s in p.stages if s.ends})
    assert forecast(done, 1, one, lambda s: 1, True).seconds == 0


def test_checkpoints_by_hand():
    """Trunk and two branches, one at a time: the trunk's end lies until both have begun."""
    assert forecast(tree(1, 1), 1, one, lambda s: 2, True).checkpoints == 1 + 2 + 2
    assert forecast(tree(1, 1), 1, one, lambda s: 2, False).checkpoints == 2 + 2 + 1


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 4), st.integers(0, 99))
def test_no_faster_than_the_longest_path_and_no_slower_than_one_by_one(lengths, slots, seed):
    p, draw = tree(*lengths), random.Random(seed)
    cost = {s.id: draw.random() + 0.1 for s in p.stages}
    seen = forecast(p, slots, lambda s: cost[s.id], lambda s: 1, True)
    paths = [sum(cost[s.id] for s in p.path(t.name)) for t in p.trials]
    whole = sum(cost.values())
    assert max([*paths, whole / slots]) <= seen.seconds + 1e-9
    assert seen.seconds <= whole + 1e-9
    assert (
        seen.checkpoints >= forecast(p, slots, lambda s: cost[s.id], lambda s: 1, False).checkpoints
    )
