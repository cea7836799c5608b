"""The estimate of a sweep: its longest path of stages, and the checkpoints that it keeps."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.sweep.states import longest_paths
from orchestrator.sweep.tree import Branch, StageTree, build_tree


def tree(*lengths: int) -> StageTree:
    """Return a trunk of 4 steps with one branch of each length."""
    trials = []
    for i, length in enumerate(lengths):
        rates = [1.0] * 4 + [float(i + 2)] * length
        trials.append(Branch(f"t{i}", "r", np.array(rates)))
    return build_tree(trials)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_longest_path_is_that_of_the_longest_trial(lengths):
    p = tree(*lengths)
    paths = longest_paths(p, {stage.id: stage.steps for stage in p.stages})
    assert max(paths.values()) == 4 + max(lengths)
    assert longest_paths(p, {}) == dict.fromkeys(paths, 0.0)
