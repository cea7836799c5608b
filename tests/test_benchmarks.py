"""The calculations of the benchmarks: their sweeps, stopping rules and tables. Nothing is timed."""

import itertools
import math
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from orchestrator.config.sweep import parse_sweep
from orchestrator.errors import UserError
from orchestrator.sweep.branch import Branch, settings_of_steps
from orchestrator.sweep.space.expand import expand
from orchestrator.sweep.tree import grow

REPO = Path(__file__).resolve().parent.parent
sys.path.append(str(REPO / "benchmarks"))  # scripts that import each other

import checkpoint as checkpoint_bench  # noqa: E402
import size  # noqa: E402
import stage_overhead  # noqa: E402
import stopping  # noqa: E402
import sweep as bench  # noqa: E402


@pytest.fixture
def arguments():
    return Namespace(
        corpus="builtin:stdlib",
        storage=None,
        layers=1,
        width=16,
        eval_tokens=64,
        steps=180,
        seeds=2,
        probe_step=None,
        probe_steps=None,
        workers=2,
        chains=2,
        stages=3,
    )


def trials_of(tree) -> dict[str, Branch]:
    """Return the trials of a sweep's configuration; needs no tokens."""
    base, settings = parse_sweep(tree, "test")
    trials = {}
    for spec in expand(base.model_dump(), settings).trials:
        train = spec.experiment.train
        rates, _ = settings_of_steps(spec.experiment.steps(), train.max_steps)
        trials[spec.name] = Branch(spec.name, f"seed {train.seed}", rates)
    return trials


@pytest.fixture
def grid(arguments):
    return trials_of(
        bench.experiment_tree(arguments, "x", bench.grid18(180), 180, eval_interval=10)
    )


# ---- studies ----
@pytest.mark.parametrize(("study", "count", "asked"), [("wsd", 24, 6 * 2.8), ("grid18", 18, 18)])
def test_tree_of_a_study_has_exactly_its_distinct_prefixes(arguments, study, count, asked):
    tree = bench.experiment_tree(arguments, "x", bench.STUDIES[study](180), 180, eval_interval=10)
    trials = trials_of(tree).values()
    assert len(trials) == count
    assert sum(t.steps for t in trials) == pytest.approx(asked * 180)
    assert len({t.key(t.steps) for t in trials}) == count, "two trials are equal"
    in_tree = sum(stage.steps for stage in grow(trials))
    assert in_tree == bench.distinct_prefixes(trials)
    assert in_tree < sum(t.steps for t in trials)


def test_distinct_prefixes_are_counted_by_root_and_rates():
    rates = np.linspace(1.0, 2.0, 5)
    trials = [
        Branch("a", "root", rates),
        Branch("b", "root", rates[:3]),
        Branch("c", "other", rates[:2]),
    ]
    assert bench.distinct_prefixes(trials) == 5 + 0 + 2


@pytest.mark.parametrize(
    "alone",
    [
        {"a": ("f0", 1.0), "b": ("aa", 2.5)},
        {"a": ("f0", 1.0), "b": ("ab", math.nextafter(2.5, 3))},
        {"a": ("f0", 1.0)},
    ],
)
def test_one_different_bit_ends_the_benchmark(alone):
    tree = {"a": ("f0", 1.0), "b": ("ab", 2.5)}
    bench.check_same(tree, dict(tree))
    with pytest.raises(RuntimeError, match="1 trials differ from those alone: b"):
        bench.check_same(tree, alone)


# ---- the cost of a stage ----
def test_chain_of_stages_has_the_states_of_one_stage(arguments):
    trials = tuple(trials_of(stage_overhead.chains_tree(arguments, 12)).values())
    one = stage_overhead.StageTree(trials, tuple(grow(trials)))
    many = stage_overhead.cut(Namespace(tree=one), 4).tree
    assert [s.steps for s in one.stages] == [12, 12], "two chains that share no step"
    assert [s.steps for s in many.stages] == [4] * 6
    assert {s.id for s in one.stages} == {s.id for s in many.stages if s.ends}
    assert many.steps_to_run == one.steps_to_run


def test_cost_of_a_stage_is_the_constant_part_of_its_time():
    start, step, fixed = 1.5, 0.01, 0.25
    one, many = (start + 600 * step + n * fixed for n in (1, 6))
    assert stage_overhead.per_stage(many, one, 6) == pytest.approx(fixed)


# ---- stopping rules ----
def test_rungs_equal_those_of_tunes_asha():
    asha = pytest.importorskip("ray.tune.schedulers.async_hyperband")
    for first, longest in ((60, 540), (20, 180), (7, 100), (180, 180)):
        theirs = asha._Bracket(first, longest, 3, 0)._rungs
        assert stopping.rungs(first, longest, 3) == sorted(r for r, _ in theirs if r < longest)


def test_halving_keeps_the_best_third_at_each_rung():
    # The trials that are best at the first rung are worst at the second one.
    curves = {str(n): {10: float(n), 30: float(-n)} for n in range(18)}
    stopped = stopping.halving(curves, [10, 30], 3)
    assert {name for name, rung in stopped.items() if rung == 10} == {str(n) for n in range(6, 18)}
    assert set(curves) - set(stopped) == {"4", "5"}
    assert stopping.halving(curves, [], 3) == {}


def test_halving_stops_a_diverged_trial_first():
    curves = {"a": {10: 3.0}, "b": {}, "c": {10: 2.0}}
    assert stopping.halving(curves, [10], 3) == {"a": 10, "b": 10}


def grid_with(finals: dict[str, float], probes: dict[str, float]) -> stopping.Grid:
    return stopping.Grid({}, {}, {}, finals, probes, {})


@pytest.mark.parametrize(
    ("probes", "margin"),
    [
        ({"a": 2.0, "b": 2.0, "c": 3.0}, 0.0),
        ({"a": 2.034, "b": 2.0, "c": 3.0}, 0.04),
        ({"a": 2.07, "b": 2.0, "c": 3.0}, 0.07),
        ({"a": 2.5, "b": 2.0, "c": 2.4}, 0.5),
    ],
)
def test_margin_is_the_smallest_without_regret(probes, margin):
    finals = {"a": 1.0, "b": 1.2, "c": 1.1}
    found = stopping.least_margin(grid_with(finals, probes))
    assert found == pytest.approx(margin)
    assert stopping.regret(finals, stopping.outside(probes, found))[0] == 0.0
    if margin:
        assert stopping.regret(finals, stopping.outside(probes, found - 0.01))[0] > 0.0


def test_diverged_probe_is_outside_every_margin():
    assert stopping.outside({"a": 2.0, "b": math.inf}, 1e9) == ["b"]


def test_regret_compares_with_the_best_of_all():
    finals = {"a": 1.0, "b": 1.25, "c": 1.5}
    assert stopping.regret(finals, ()) == (0.0, 1)
    assert stopping.regret(finals, {"a": 60}) == (0.25, 2)
    assert stopping.regret(finals, ["a", "b"]) == (0.5, 3)


def test_steps_of_stopped_trials_are_the_remaining_distinct_prefixes(grid):
    names = list(grid)
    assert stopping.steps_shared(grid, {}) == bench.distinct_prefixes(grid.values())
    for stopped in (
        {names[0]: 60},
        dict.fromkeys(names, 20),
        dict(zip(names, itertools.cycle((20, 60)), strict=False)),
    ):
        left = [Branch(n, t.root, t.rates[: stopped.get(n, t.steps)]) for n, t in grid.items()]
        assert stopping.steps_shared(grid, stopped) == bench.distinct_prefixes(left)
    probe = Branch("probe", grid[names[0]].root, np.append(grid[names[0]].rates[:60], np.zeros(5)))
    assert stopping.steps_shared(grid, {}, [probe]) == stopping.steps_shared(grid, {}) + 5


def test_every_rung_and_the_half_have_an_evaluation(arguments):
    for steps in range(18, 900, 18):
        interval = steps // stopping.EVALUATIONS
        rungs = stopping.rungs(max(interval, steps // 9), steps, 3)
        assert all(step % interval == 0 for step in (*rungs, steps // 2)), steps
    with pytest.raises(UserError, match="--steps 100: give a multiple of 18"):
        stopping.main(["--steps", "100"])


def test_rank_correlation_of_equal_values_is_not_a_number():
    assert stopping.rank_correlation([3, 1, 2], [30.0, 10.0, math.inf]) == pytest.approx(0.5)
    assert math.isnan(stopping.rank_correlation([1, 1, 1], [1, 2, 3]))


# ---- tables ----
def test_table_is_markdown(grid):
    finals = {name: float(n) for n, name in enumerate(grid)}
    curves = {name: {20: loss, 60: loss, 90: -loss} for name, loss in finals.items()}
    peaks = {name: float(name.rpartition("_")[2]) for name in grid}
    made = stopping.Grid(grid, peaks, curves, finals, dict(finals), {})
    rows = stopping.rows({1: made, 2: made}, [20, 60], 60, 0.0)
    assert [row[:2] for row in rows] == [
        ["none", "1"],
        ["none", "2"],
        ["asha", "1"],
        ["asha", "2"],
        ["anneal_probe, margin 0.00", "1 (margin chosen here)"],
        ["anneal_probe, margin 0.00", "2"],
        ["anneal_probe, margin 0.05 (default)", "1"],
        ["anneal_probe, margin 0.05 (default)", "2"],
    ]
    assert [row[4] for row in rows] == [18, 18, 2, 2, 1, 1, 1, 1]
    assert rows[0][5] == f"{bench.distinct_prefixes(grid.values()):,}"
    assert stopping.correlations({1: made}, 90) == [
        ["0.001", "-1.00"],
        ["0.003", "-1.00"],
        ["0.01", "-1.00"],
    ]
    lines = bench.markdown(["a", "b"], [[1, "x"], [2, "y"]]).splitlines()
    assert lines == ["| a | b |", "|---|---|", "| 1 | x |", "| 2 | y |"]


# ---- the cost of a checkpoint ----
def test_checkpoint_table_has_ratios_to_the_synchronous_write_of_the_round():
    seconds = {
        "torch.save": [3.0, 4.0],
        "synchronous": [2.0, 4.0],
        "pause": [0.1, 0.4],
        "both": [11.0, 14.0],
        "alone": [10.0, 10.0],
    }
    assert checkpoint_bench.rows(5, seconds) == [
        ["torch.save and fsync, without a hash", "3.500", "1.250 (1.000 – 1.500)"],
        ["synchronous: copied, written, hashed, committed", "3.000", "1.000 (1.000 – 1.000)"],
        ["background: pause of training", "0.250", "0.075 (0.050 – 0.100)"],
        [
            "background: cost to 5 steps of 2000 ms, pause included",
            "2.500",
            "0.750 (0.500 – 1.000)",
        ],
    ]


def test_checkpoint_benchmark_runs_and_leaves_no_files(tmp_path, capsys):
    checkpoint_bench.main(
        ["--config", "small", "--device", "cpu", "--rounds", "4", "--folder", str(tmp_path)]
    )
    lines = capsys.readouterr().out.splitlines()
    assert "119,104 parameters, a state of 0.00 GB" in lines[0]
    assert [line.split()[1] for line in lines[4:]] == [
        "torch.save",
        "synchronous:",
        "background:",
        "background:",
    ]
    assert list(tmp_path.iterdir()) == []


# ---- the size of the code ----
def test_functions_files_and_folders_of_the_product_are_small():
    files = [file for folder in size.FOLDERS for file in (REPO / folder).rglob("*.py")]
    sizes = {str(file): size.size_of(file) for file in files}
    assert {name: s.lines for name, s in sizes.items() if s.lines > 300} == {}
    assert {name: s.longest for name, s in sizes.items() if s.longest[0] > 60} == {}
    modules = Counter(str(file.parent) for file in files if file.name != "__init__.py")
    assert {folder: count for folder, count in modules.items() if count > 15} == {}
