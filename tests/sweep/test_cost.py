"""The estimate of a sweep: its longest path of stages, and what its start waits for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.cost.tokens import TokenCounts
from orchestrator.sweep import cost
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


@pytest.mark.parametrize(("quick_flops", "start_s"), [(2e12, 10.0), (1.0, 60.0)])
def test_start_of_a_sweep_waits_shortly_for_a_small_model_and_says_why_it_gave_up(
    sweeps, monkeypatch, capsys, quick_flops, start_s
):
    limits = []

    def too_slow(experiment, n_vocab, layout, limit_s):
        limits.append(limit_s)
        return "too slow"

    monkeypatch.setattr(cost, "measure", too_slow)
    monkeypatch.setattr(cost, "QUICK_FLOPS", quick_flops)
    study = sweeps.open("sweep.trials.a.train.seed=1", "sweep.trials.b.train.seed=2")
    counts = {key: TokenCounts.of(dataset) for key, dataset in study.datasets.items()}
    assert cost.announce(study, 1, counts) is None
    assert capsys.readouterr().out == (
        "expected: unknown until the first minute of training is over: too slow\n"
    )
    assert cost.estimate_of(study, 1, counts) == "too slow"  # as a dry run asks
    assert limits == [start_s, 60.0]
