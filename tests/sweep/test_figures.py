"""A sweep's figures show what the plan, the rows and the journals say: the lines drawn hold their data."""

import io
import math
from itertools import combinations, pairwise

import numpy as np
import pytest

from model.schedule import Schedule, learning_rate
from orchestrator.sweep.figures import (
    LISTED,
    NAMED,
    POINTS,
    curves,
    final_losses,
    parallel_coordinates,
    tree,
)
from orchestrator.sweep.tree import Trial, plan


def sweep(*schedules):
    return plan(
        [
            Trial(f"t{i}", "r", np.array([learning_rate(s, n) for n in range(s.decay_steps)]))
            for i, s in enumerate(schedules)
        ]
    )


def wsd(*lengths, peak=1e-3):
    return [Schedule("wsd", peak, warmup_steps=5, decay_steps=n) for n in lengths]


def row(name, final, seed=0, state="done", **fields):
    return {
        "trial": f"{name}_seed-{seed}",
        "setting": name,
        "seed": seed,
        "fields": fields,
        "steps": 100,
        "state": state,
        "metric": "val/loss",
        "final": final,
        "best": final,
        "val_bits_per_byte": None,
        "train_loss": None,
        "weights_sha256": None,
        "reason": None,
    }


def lines(axes):
    """What was drawn from data: legend handles and rulers (axvline) are not."""
    found = [
        np.column_stack(line.get_data())
        for line in axes.get_lines()
        if line.get_transform() == axes.transData
    ]
    return [line for line in found if len(line)]


def png(figure):
    out = io.BytesIO()
    figure.savefig(out)
    assert out.getvalue().startswith(b"\x89PNG")
    return figure


def apart(figure, texts):
    """The drawn texts, no two of which may overlap."""
    figure.draw_without_rendering()
    texts = [text for text in texts if text.get_text() and text.get_visible()]
    boxes = [text.get_window_extent().shrunk(0.98, 0.9) for text in texts]
    assert not [
        (a, b) for a, b in combinations(range(len(boxes)), 2) if boxes[a].overlaps(boxes[b])
    ]
    return [text.get_text() for text in texts]


def test_a_shared_stretch_is_drawn_once():
    p = sweep(*wsd(50, 100, 150))
    *stages, forks = lines(png(tree(p)).axes[0])
    assert len(stages) == len(p.stages) == 5
    drawn = sorted(
        (int(a[0]), int(b[0])) for line in stages for a, b in zip(line, line[1:], strict=False)
    )
    once = {(n - 1, n, s.id) for s in p.stages for n in range(max(2, s.start + 1), s.stop + 1)}
    assert drawn == sorted((a, b) for a, b, _ in once)  # every step of the tree, none twice
    for stage, line in zip(p.stages, stages, strict=True):
        rates = next(t.rates for t in p.trials if t.name in stage.trials)
        assert line.tolist() == [
            [n, rates[n - 1]] for n in range(max(1, stage.start), stage.stop + 1)
        ]
    assert forks.tolist() == [[s.stop, 1e-3] for s in p.stages if len(p.children.get(s.id, ())) > 1]


def test_what_many_share_is_wider_and_darker():
    p = sweep(*wsd(50, 100, 150))
    drawn = tree(p).axes[0].get_lines()[: len(p.stages)]
    by_trials = sorted(
        zip([len(s.trials) for s in p.stages], drawn, strict=True), key=lambda pair: pair[0]
    )
    widths = [line.get_linewidth() for _, line in by_trials]
    brightness = [sum(line.get_color()[:3]) for _, line in by_trials]
    assert widths == sorted(widths) and widths[-1] > 3 * widths[0]
    assert brightness == sorted(brightness, reverse=True) and brightness[0] > 2 * brightness[-1]


def test_the_title_says_what_is_saved():
    p = sweep(*wsd(50, 100))
    assert (
        tree(p).axes[0].get_title(loc="left")
        == "2 trials: 150 steps asked, 109 run, 41 saved (27.3%)"
    )
    trunk = p.stages[0]
    stored = plan(p.trials, {trunk.id: trunk.stop}, standing=[trunk.id])
    assert "109 run (41 of them stored already), 41 saved" in tree(stored).axes[0].get_title(
        loc="left"
    )


def test_other_seeds_of_a_schedule_are_not_passed_over_in_silence():
    p = sweep(*wsd(50, 100))
    twice = plan([*p.trials, *(Trial(f"{t.name}-again", "other", t.rates) for t in p.trials)])
    assert (
        tree(twice)
        .axes[0]
        .get_title(loc="left")
        .endswith("; lines of 3 stages lie under equal ones")
    )


def test_peaks_of_several_decades_are_drawn_by_their_logarithm():
    assert tree(sweep(*wsd(50), *wsd(50, peak=2e-3))).axes[0].get_yscale() == "linear"
    axes = png(tree(sweep(*wsd(50), *wsd(50, peak=5e-2)))).axes[0]
    assert axes.get_yscale() == "log" and axes.get_ylim()[0] < 1e-3 < 5e-2 < axes.get_ylim()[1]


def test_a_long_stage_is_thinned_but_keeps_its_ends():
    rates = np.linspace(1, 0, 300_000)
    (line,) = lines(tree(plan([Trial("t", "r", rates)])).axes[0])
    assert len(line) == POINTS and line[0].tolist() == [1, 1] and line[-1].tolist() == [300_000, 0]


def test_final_losses_are_sorted_with_a_dot_per_seed_and_the_mean():
    rows = [
        row(f"kind-{k}", loss + seed / 10, seed, **{"schedule.kind": k})
        for k, loss in (("cosine", 2.0), ("wsd", 1.0), ("linear", 1.02))
        for seed in range(3)
    ]
    figure = png(
        final_losses([*rows, row("kind-x", None, state="diverged", **{"schedule.kind": "x"})])
    )
    axes = figure.axes[0]
    drawn = lines(axes)
    assert np.concatenate(drawn[::2]) == pytest.approx(
        np.array(
            [(loss + seed / 10, y) for y, loss in enumerate((1.0, 1.02, 2.0)) for seed in range(3)]
        )
    )
    assert np.concatenate(drawn[1::2]) == pytest.approx(np.array([(1.1, 0), (1.12, 1), (2.1, 2)]))
    assert [t.get_text() for t in axes.get_yticklabels()] == [
        "kind-wsd",
        "kind-linear",
        "kind-cosine",
    ]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the best on top
    assert axes.get_title(loc="left") == "1 without a result"
    colours = {
        line.get_color()
        for line in axes.get_lines()
        if line.get_marker() == "o" and len(line.get_xdata())
    }
    assert len(colours) == 3 == len(axes.get_legend().get_texts())


def test_ties_and_missing_seeds_are_marked():
    rows = [row("a", v, s) for s, v in enumerate([1.0, 1.2, 1.4])] + [
        row("b", v, s) for s, v in enumerate([1.1, 1.1, 1.45])
    ]
    rows += [row("c", 1.0, 0), row("c", None, 1, "failed")]
    labels = [t.get_text() for t in final_losses(rows).axes[0].get_yticklabels()]
    assert labels == ["a", "b ~", "c (failed)"]


def test_one_loss_far_off_does_not_flatten_the_rest():
    rows = [row(f"s{i}", 3 + i / 100) for i in range(20)] + [row("off", 50.0)]
    axes = png(final_losses(rows)).axes[0]
    assert axes.get_xlim()[1] < 3.3 and [t.get_text() for t in axes.texts] == [
        "1 above 3.19, up to 50 →"
    ]
    heights = [line[-1, 1] for line in lines(png(parallel_coordinates(rows)).axes[0])]
    assert (
        len({round(h, 6) for h in heights}) == 20
    )  # the one far off stands with the worst of the rest
    rows[-1] = row("near", 3.2)
    assert final_losses(rows).axes[0].get_xlim()[1] > 3.2 and not final_losses(rows).axes[0].texts


def test_more_settings_than_fit_are_counted():
    axes = final_losses([row(f"s{i}", 1 + i / 1000) for i in range(LISTED + 5)]).axes[0]
    assert (
        len(axes.get_yticks()) == LISTED
        and axes.get_title(loc="left") == f"the best {LISTED} of {LISTED + 5} settings"
    )


def history(final, peak=1e-3, steps=100):
    return [
        {
            "step": n,
            "timestamp": n,
            "optim/lr": peak * n / steps,
            "train/loss": 1.0,
            **({"val/loss": final + 5 * math.exp(-n / 8)} if n % 20 == 0 else {}),
        }
        for n in range(0, steps + 1, 10)
    ]


@pytest.mark.parametrize("count", [1, 6, NAMED + 1, 100])
def test_curves_hold_the_journals_points(count):
    rows = [row(f"max_lr-{i}", 2 + i / 50, **{"schedule.max_lr": i}) for i in range(count)]
    histories = {r["trial"]: history(r["final"], peak=(i + 1) * 1e-4) for i, r in enumerate(rows)}
    top, bottom, *rest = png(curves(rows, histories)).axes
    for axes, key in ((top, "optim/lr"), (bottom, "val/loss")):
        expected = [
            [[r["step"], r[key]] for r in histories[x["trial"]] if key in r] for x in reversed(rows)
        ]  # best on top
        assert [line.tolist() for line in lines(axes)] == expected
    assert (
        bottom.get_ylim()[1] < 5 < bottom.get_lines()[0].get_ydata()[0]
    )  # not where the losses begin
    if count <= NAMED:
        assert not rest and len({line.get_color() for line in top.get_lines()}) == count == len(
            top.get_legend().get_texts()
        )
    else:
        assert (
            len(rest) == 1 and top.get_legend() is None
        )  # a colour bar instead of a hundred names
        assert sum(line.get_linewidth() > 2 for line in bottom.get_lines()) == 1
        assert bottom.get_title(loc="left") == "thick: the best, lr-0"


def test_curves_draw_unfinished_trials_and_none():
    rows = [row(f"s{i}", 2.0 + i / 9) for i in range(9)] + [
        row("new", None, state="running"),
        row("waits", None, state="waiting"),
    ]
    histories = {r["trial"]: history(2.0) for r in rows[:-1]}
    histories["new_seed-0"] = [{"step": 10, "optim/lr": 1e-3, "train/loss": math.nan}]
    top, bottom, _ = png(curves(rows, histories)).axes
    assert len(lines(top)) == 10 and len(lines(bottom)) == 9
    assert [lines(axes) for axes in png(curves([], {})).axes] == [[], []]
    running = [{**r, "state": "running", "final": None} for r in rows]
    figure = png(curves(running, histories))  # none is the best yet
    assert len(figure.axes) == 2 and {
        line.get_linewidth() for axes in figure.axes for line in axes.get_lines()
    } == {0.8}


def mixed(count):
    kinds, rows = ("cosine", "linear", "wsd"), []
    for i in range(count):
        fields = {
            "schedule.max_lr": 10 ** (-4 + 2 * i / count),
            "schedule.kind": kinds[i % 3],
            "model.bias": bool(i % 2),
            "train.max_steps": 100 * (1 + i % 4),
            "data.seed": 7,
        }
        rows.append(row(f"t{i}", 3 - i / count, **fields))
    return [
        *rows,
        row("mine", 3.5, **{"schedule.kind": "constant"}),
        row("lost", None, state="failed", **rows[0]["fields"]),
    ]


@pytest.mark.parametrize("count", [6, 24, 100])
def test_parallel_coordinates_place_every_value(count):
    rows = mixed(count)
    figure = png(parallel_coordinates(rows))
    axes = figure.axes[0]
    drawn, results = lines(axes), [r for r in rows if r["final"] is not None]
    assert len(drawn) == len(results) == count + 1
    # Fields of one value are no axis: data.seed is 7 or, in `mine`, unchanged, so it stays.
    names = [t.get_text() for t in axes.get_xticklabels()]
    assert names == [
        "schedule.max_lr",
        "schedule.kind",
        "model.bias",
        "train.max_steps",
        "data.seed",
        "final val/loss",
    ]
    by_loss = dict(zip(sorted((r["final"] for r in results), reverse=True), drawn, strict=True))
    trials = [(r, by_loss[r["final"]][:, 1]) for r in results]
    for column, field in enumerate(names[:-1]):
        heights = {}
        for r, y in trials:
            heights.setdefault(r["fields"].get(field, "unchanged"), []).append(y[column])
        spans = sorted((min(ys), max(ys)) for ys in heights.values())
        assert all(
            below[1] < above[0] for below, above in pairwise(spans)
        )  # no value's ribbon reaches another's
    final = [(r["final"], y[-1]) for r, y in trials]
    assert [y for _, y in sorted(final)] == sorted(y for _, y in final)
    apart(figure, [*axes.texts, *axes.get_xticklabels()])


def test_a_rate_over_decades_is_placed_by_its_logarithm():
    rows = [row(f"t{i}", 3 - i, **{"a.x": x}) for i, x in enumerate((1e-4, 1e-3, 1e-2))]
    low, middle, high = (line[0, 1] for line in lines(parallel_coordinates(rows).axes[0]))
    assert middle - low == pytest.approx(high - middle)
    rows = [row(f"t{i}", 3 - i, **{"a.x": x}) for i, x in enumerate((1, 2, 9))]
    low, middle, high = (line[0, 1] for line in lines(parallel_coordinates(rows).axes[0]))
    assert high - middle > 5 * (middle - low)


def test_values_side_by_side_do_not_share_a_label():
    figure = parallel_coordinates(
        [row(f"t{i}", 3 - i, **{"train.max_steps": n}) for i, n in enumerate((100, 101, 102, 900))]
    )
    drawn = apart(figure, figure.axes[0].texts)
    assert "100" in drawn and "900" in drawn and "101" not in drawn


def test_the_best_trial_is_the_thick_line_on_top():
    rows = mixed(24)
    drawn = [
        line for line in parallel_coordinates(rows).axes[0].get_lines() if len(line.get_xdata()) > 2
    ]
    widths = [line.get_linewidth() for line in drawn]
    assert widths.index(max(widths)) == len(widths) - 1 and widths.count(max(widths)) == 1
    assert drawn[-1].get_ydata()[-1] == min(line.get_ydata()[-1] for line in drawn)


def test_nothing_finished_is_said():
    axes = png(parallel_coordinates([row("a", None, state="running")])).axes[0]
    assert axes.get_title(loc="left") == "no trial has a result yet" and not lines(axes)
    assert lines(png(final_losses([row("a", None, state="running")])).axes[0]) == []
    assert lines(png(final_losses([])).axes[0]) == []


@pytest.mark.parametrize("count", [6, 24, 100])
def test_labels_do_not_overlap(count):
    rows = [
        row(
            f"kind-{'wsd' if i % 2 else 'cosine'}_max_lr-{i / 1000}_max_steps-{100 + i}", 2 + i / 50
        )
        for i in range(count)
    ]
    figure = final_losses(rows)
    assert len(apart(figure, figure.axes[0].get_yticklabels())) == count
