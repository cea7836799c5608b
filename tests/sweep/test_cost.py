"""The simulated schedule of a sweep, compared with schedules by hand and with bounds."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.sweep.cost import forecast
from orchestrator.sweep.tree import Branch, StageTree, build_tree


def tree(*lengths: int) -> StageTree:
    """Return a trunk of 4 steps with one branch of each length."""
    trials = []
    for i, length in enumerate(lengths):
        rates = [1.0] * 4 + [float(i + 2)] * length
        trials.append(Branch(f"t{i}", "r", np.array(rates)))
    return build_tree(trials)


def one_second_a_step(stage):
    return stage.steps


def simulate(plan, slots=1, seconds=one_second_a_step, checkpoints=1, keep_branches=True):
    return forecast(plan, slots, seconds, lambda stage: checkpoints, keep_branches)


@pytest.mark.parametrize(("slots", "seconds"), [(1, 4 + 6), (2, 4 + 3), (3, 4 + 3)])
def test_time_of_a_schedule_by_hand(slots, seconds):
    # With two slots, the longest branch runs beside the two shorter ones.
    assert simulate(tree(1, 3, 2), slots).seconds == seconds


def test_stored_stages_take_no_time():
    p = tree(1, 3)
    ids = {s.id: s.stop for s in p.stages}
    done = build_tree(p.branches, ids, ids, {s.id for s in p.stages if s.ends})
    assert simulate(done).seconds == 0


def test_checkpoints_of_a_schedule_by_hand():
    # The trunk's checkpoint is needed until both branches have started.
    assert simulate(tree(1, 1), checkpoints=2).checkpoints == 1 + 2 + 2
    assert simulate(tree(1, 1), checkpoints=2, keep_branches=False).checkpoints == 2 + 2 + 1


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 4), st.integers(0, 99))
def test_time_lies_between_the_longest_path_and_the_sum(lengths, slots, seed):
    p = tree(*lengths)
    draw = random.Random(seed)
    cost = {s.id: draw.random() + 0.1 for s in p.stages}
    found = simulate(p, slots, lambda s: cost[s.id])
    paths = [sum(cost[s.id] for s in p.stages_of(t.name)) for t in p.branches]
    whole = sum(cost.values())
    assert max([*paths, whole / slots]) <= found.seconds + 1e-9
    assert found.seconds <= whole + 1e-9
    fewer = simulate(p, slots, lambda s: cost[s.id], keep_branches=False)
    assert found.checkpoints >= fewer.checkpoints
