"""The figure of a sweep's tree holds the data of its plan."""

import io
from itertools import pairwise

import numpy as np

from model.schedule import Schedule, learning_rate
from orchestrator.sweep.branch import Branch
from orchestrator.sweep.report.figures import POINTS, stage_tree
from orchestrator.sweep.tree import build_tree


def plan_of(*schedules):
    trials = []
    for i, schedule in enumerate(schedules):
        rates = [learning_rate(schedule, step) for step in range(schedule.decay_steps)]
        trials.append(Branch(f"t{i}", "r", np.array(rates)))
    return build_tree(trials)


def wsd(*lengths, peak=1e-3):
    return [Schedule("wsd", peak, warmup_steps=5, decay_steps=n) for n in lengths]


def lines(axes):
    """Return the points of every line that was drawn from data, without legend and rulers."""
    drawn = [line for line in axes.get_lines() if line.get_transform() == axes.transData]
    points = [np.column_stack(line.get_data()) for line in drawn]
    return [line for line in points if len(line)]


def rendered(figure):
    """Render the figure as a PNG, and return it."""
    out = io.BytesIO()
    figure.savefig(out)
    assert out.getvalue().startswith(b"\x89PNG")
    return figure


def title(axes):
    return axes.get_title(loc="left")


def test_shared_steps_are_drawn_once():
    p = plan_of(*wsd(50, 100, 150))
    *stages, branches = lines(rendered(stage_tree(p)).axes[0])
    assert len(stages) == len(p.stages) == 5

    drawn = sorted((int(a[0]), int(b[0])) for line in stages for a, b in pairwise(line))
    expected = sorted((n - 1, n) for s in p.stages for n in range(max(2, s.start + 1), s.stop + 1))
    assert drawn == expected

    for stage, line in zip(p.stages, stages, strict=True):
        rates = next(t.rates for t in p.branches if t.name in stage.trials)
        steps = range(max(1, stage.start), stage.stop + 1)
        assert line.tolist() == [[n, rates[n - 1]] for n in steps]
    ends = [s.stop for s in p.stages if len(p.children.get(s.id, ())) > 1]
    assert branches.tolist() == [[end, 1e-3] for end in ends]


def test_lines_of_many_trials_are_wider_and_darker():
    p = plan_of(*wsd(50, 100, 150))
    drawn = stage_tree(p).axes[0].get_lines()[: len(p.stages)]
    pairs = zip([len(s.trials) for s in p.stages], drawn, strict=True)
    by_trials = [line for _, line in sorted(pairs, key=lambda pair: pair[0])]
    widths = [line.get_linewidth() for line in by_trials]
    brightness = [sum(line.get_color()[:3]) for line in by_trials]
    assert widths == sorted(widths) and widths[-1] > 3 * widths[0]
    assert brightness == sorted(brightness, reverse=True) and brightness[0] > 2 * brightness[-1]


def test_title_counts_saved_and_stored_steps():
    p = plan_of(*wsd(50, 100))
    expected = "2 trials: 150 steps asked, 109 run, 41 saved (27.3%)"
    assert title(stage_tree(p).axes[0]) == expected
    trunk = p.stages[0]
    stored = build_tree(p.branches, {trunk.id: trunk.stop}, stored=[trunk.id])
    assert "109 run (41 of them stored already), 41 saved" in title(stage_tree(stored).axes[0])


def test_title_counts_lines_that_lie_under_equal_ones():
    p = plan_of(*wsd(50, 100))
    others = [Branch(f"{t.name}-again", "other", t.rates) for t in p.branches]
    axes = stage_tree(build_tree([*p.branches, *others])).axes[0]
    assert title(axes).endswith("; lines of 3 stages lie under equal ones")


def test_peaks_of_several_decades_have_a_logarithmic_axis():
    assert stage_tree(plan_of(*wsd(50), *wsd(50, peak=2e-3))).axes[0].get_yscale() == "linear"
    axes = rendered(stage_tree(plan_of(*wsd(50), *wsd(50, peak=5e-2)))).axes[0]
    low, high = axes.get_ylim()
    assert axes.get_yscale() == "log" and low < 1e-3 < 5e-2 < high


def test_long_stage_is_thinned_and_keeps_its_ends():
    rates = np.linspace(1, 0, 300_000)
    (line,) = lines(stage_tree(build_tree([Branch("t", "r", rates)])).axes[0])
    assert len(line) == POINTS
    assert line[0].tolist() == [1, 1] and line[-1].tolist() == [300_000, 0]
