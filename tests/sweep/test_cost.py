"""The estimate of a sweep: its longest path of stages, and what its start waits for."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.cost.estimate import expected_line
from orchestrator.cost.timing import Timing
from orchestrator.cost.tokens import TokenCounts
from orchestrator.sweep import cost
from orchestrator.sweep.branch import Branch
from orchestrator.sweep.states import longest_paths
from orchestrator.sweep.tree import StageTree, build_tree


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


def test_start_of_a_sweep_measures_nothing_and_prints_what_was_measured(
    sweeps, monkeypatch, capsys
):
    study = sweeps.open("sweep.trials.a.train.seed=1", "sweep.trials.b.train.seed=2")
    counts = {key: TokenCounts.of(dataset) for key, dataset in study.datasets.items()}
    monkeypatch.setattr(cost, "measure", None)
    monkeypatch.setattr(cost.cache, "read", lambda *_: None)
    assert cost.announce(study, 1, counts) is None
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(cost.cache, "read", lambda *_: Timing(*[1.0] * 7))
    made = cost.announce(study, 1, counts)
    assert capsys.readouterr().out == f"expected: {expected_line(made)}\n"
    assert cost.estimate_of(study, 1, counts, lambda *_: "too slow") == "too slow"
