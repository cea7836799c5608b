"""The figures of a sweep hold the data of its plan, its rows and its journals."""

import io
import math
from itertools import combinations, pairwise

import numpy as np
import pytest

from model.schedule import Schedule, learning_rate
from orchestrator.sweep.report.figures import (
    GRAY,
    LISTED,
    NAMED,
    POINTS,
    curves,
    final_losses,
    stage_tree,
)
from orchestrator.sweep.report.ranking import Row
from orchestrator.sweep.tree import Branch, build_tree


def plan_of(*schedules):
    trials = []
    for i, schedule in enumerate(schedules):
        rates = [learning_rate(schedule, step) for step in range(schedule.decay_steps)]
        trials.append(Branch(f"t{i}", "r", np.array(rates)))
    return build_tree(trials)


def wsd(*lengths, peak=1e-3):
    return [Schedule("wsd", peak, warmup_steps=5, decay_steps=n) for n in lengths]


def row(setting, final, seed=0, state="done", **fields):
    return Row(
        trial=f"{setting}_seed-{seed}",
        setting=setting,
        seed=seed,
        fields=fields,
        steps=100,
        state=state,
        metric="val/loss",
        final=final,
    )


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


# ---- the tree ----


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


# ---- final losses ----


def test_final_losses_are_sorted_with_a_dot_per_seed_and_a_bar_at_the_mean():
    losses = {"cosine": 2.0, "wsd": 1.0, "linear": 1.02}
    rows = [
        row(f"kind-{kind}", loss + seed / 10, seed)
        for kind, loss in losses.items()
        for seed in range(3)
    ]
    rows.append(row("kind-x", None, state="diverged"))
    axes = rendered(final_losses(rows)).axes[0]
    drawn = lines(axes)
    dots = [(loss + s / 10, y) for y, loss in enumerate((1.0, 1.02, 2.0)) for s in range(3)]
    assert np.concatenate(drawn[::2]) == pytest.approx(np.array(dots))
    assert np.concatenate(drawn[1::2]) == pytest.approx(np.array([(1.1, 0), (1.12, 1), (2.1, 2)]))
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels == ["kind-wsd", "kind-linear", "kind-cosine"]
    bottom, top = axes.get_ylim()
    assert bottom > top, "the best is on top"
    assert title(axes) == "1 without a result"


def test_ties_and_missing_seeds_are_marked():
    rows = [row("a", value, seed) for seed, value in enumerate([1.0, 1.2, 1.4])]
    rows += [row("b", value, seed) for seed, value in enumerate([1.1, 1.1, 1.45])]
    rows += [row("c", 1.0, 0), row("c", None, 1, "failed")]
    labels = [text.get_text() for text in final_losses(rows).axes[0].get_yticklabels()]
    assert labels == ["a", "b ~", "c (failed)"]


def test_outlier_does_not_flatten_the_other_losses():
    rows = [row(f"s{i}", 3 + i / 100) for i in range(20)]
    axes = rendered(final_losses([*rows, row("off", 50.0)])).axes[0]
    assert axes.get_xlim()[1] < 3.3
    assert [text.get_text() for text in axes.texts] == ["1 above 3.19, up to 50 →"]
    axes = final_losses([*rows, row("near", 3.2)]).axes[0]
    assert axes.get_xlim()[1] > 3.2 and not axes.texts


def test_settings_that_do_not_fit_are_counted():
    axes = final_losses([row(f"s{i}", 1 + i / 1000) for i in range(LISTED + 5)]).axes[0]
    assert len(axes.get_yticks()) == LISTED
    assert title(axes) == f"the best {LISTED} of {LISTED + 5} settings"


@pytest.mark.parametrize("count", [6, 100])
def test_labels_do_not_overlap(count):
    kinds = ("cosine", "wsd")
    names = [f"kind-{kinds[i % 2]}_max_lr-{i / 1000}_max_steps-{100 + i}" for i in range(count)]
    figure = final_losses([row(name, 2 + i / 50) for i, name in enumerate(names)])
    figure.draw_without_rendering()
    texts = [text for text in figure.axes[0].get_yticklabels() if text.get_text()]
    boxes = [text.get_window_extent().shrunk(0.98, 0.9) for text in texts]
    assert len(boxes) == count
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


# ---- curves ----


def history(final, peak=1e-3, steps=100):
    lines = []
    for n in range(0, steps + 1, 10):
        line = {"step": n, "timestamp": n, "optim/lr": peak * n / steps, "train/loss": 1.0}
        if n % 20 == 0:
            line["val/loss"] = final + 5 * math.exp(-n / 8)
        lines.append(line)
    return lines


@pytest.mark.parametrize("count", [1, NAMED, NAMED + 1, 100])
def test_curves_hold_the_points_of_the_journals(count):
    rows = [row(f"max_lr-{i}", 2 + i / 50) for i in range(count)]
    histories = {r.trial: history(r.final, peak=(i + 1) * 1e-4) for i, r in enumerate(rows)}
    top, bottom = rendered(curves(rows, histories)).axes
    for axes, key in ((top, "optim/lr"), (bottom, "val/loss")):
        expected = [
            [[line["step"], line[key]] for line in histories[r.trial] if key in line]
            for r in reversed(rows)  # the best one last, so on top
        ]
        assert [line.tolist() for line in lines(axes)] == expected
    assert bottom.get_ylim()[1] < 5 < bottom.get_lines()[0].get_ydata()[0], "first losses are cut"

    named = min(count, NAMED)
    colors = [line.get_color() for line in bottom.get_lines()]
    assert len(set(colors) - {GRAY}) == named == len(top.get_legend().get_texts())
    assert colors.count(GRAY) == count - named
    expected_title = f"the best {NAMED} of {count} trials have a color" if count > NAMED else ""
    assert title(bottom) == expected_title


def test_curves_include_unfinished_trials():
    rows = [row(f"s{i}", 2.0 + i / 9) for i in range(9)]
    rows += [row("new", None, state="running"), row("waits", None, state="waiting")]
    histories = {r.trial: history(2.0) for r in rows[:-1]}
    histories["new_seed-0"] = [{"step": 10, "optim/lr": 1e-3, "train/loss": math.nan}]
    top, bottom = rendered(curves(rows, histories)).axes
    assert len(lines(top)) == 10 and len(lines(bottom)) == 9


def test_figures_without_results_are_empty():
    assert [lines(axes) for axes in rendered(curves([], {})).axes] == [[], []]
    assert lines(rendered(final_losses([row("a", None, state="running")])).axes[0]) == []
    assert lines(rendered(final_losses([])).axes[0]) == []
