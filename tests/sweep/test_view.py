"""The text of a sweep's tree shows all stages and fits its width; the numbers of advice hold."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.schedule import Schedule, learning_rate
from orchestrator.sweep.branch import Branch
from orchestrator.sweep.report import view
from orchestrator.sweep.report.advice import advice
from orchestrator.sweep.tree import build_tree

LINE = re.compile(
    r"([│├└┬┼─ ]+)\[([\d,]+), ([\d,]+)\)\s+([\d,]+)  \S+ → \S+\s+([\d,]+)  "
    r"(to run|stored|done|result only|diverged|lost|not needed)(?:\s+(.*))?$"
)


def trial(name, schedule, steps=None, root="r"):
    steps = steps or schedule.decay_steps
    return Branch(name, root, np.array([learning_rate(schedule, step) for step in range(steps)]))


def build(schedules, roots=("r",), **stored):
    trials = [
        trial(f"{name}_seed-{i}" if len(roots) > 1 else name, s, root=root)
        for i, root in enumerate(roots)
        for name, s in schedules.items()
    ]
    return build_tree(trials, **stored)


def wsd(*lengths, shapes=("linear",), peak=1e-3, **more):
    return {
        f"decay_shape-{shape}_max_steps-{n}": Schedule(
            "wsd", peak, warmup_steps=5, decay_steps=n, decay_shape=shape, **more
        )
        for n in lengths
        for shape in shapes
    }


def cosine(*lengths, kind="cosine", peak=1e-3, warmup=5):
    return {
        f"{kind}-{n}-{peak}": Schedule(kind, peak, warmup_steps=warmup, decay_steps=n)
        for n in lengths
    }


def number(text):
    return int(text.replace(",", ""))


def parsed(text):
    """Return (start, stop, steps, trials, mark, ends) of every line that shows a stage."""
    return [
        (*map(number, m.group(2, 3, 4, 5)), m[6], m[7])
        for line in text.splitlines()
        if (m := LINE.match(line))
    ]


def parents(text):
    """Return (range of steps, that of its parent) of every line, read as view.py explains."""
    last, found = {}, []
    for line in text.splitlines():
        if m := LINE.match(line):
            straight = "┼" in m[1]
            depth = len(m[1]) - 2
            above = last.get(depth) if straight else last.get(depth - 1)
            found.append(((number(m[2]), number(m[3])), above))
            last[depth] = (number(m[2]), number(m[3]))
    return found


def test_text_shows_every_stage_of_the_plan():
    schedules = wsd(100, 200, shapes=("linear", "1-sqrt"))
    named = {name.replace("decay_shape-", ""): schedule for name, schedule in schedules.items()}
    assert view.text(build(named)).splitlines() == [
        "steps          number  learning rate        trials          trials that end here",
        "┬ [0, 81)          81  1.67e-04 → 1.00e-03       4  to run",
        "├─ [81, 100)       19  9.55e-04 → 1.45e-04       1  to run  linear_max_steps-100",
        "├─ [81, 100)       19  7.99e-04 → 1.23e-04       1  to run  1-sqrt_max_steps-100",
        "┼ [81, 161)        80  1.00e-03 → 1.00e-03       2  to run",
        "├─ [161, 200)      39  9.77e-04 → 1.23e-04       1  to run  linear_max_steps-200",
        "└─ [161, 200)      39  8.58e-04 → 1.11e-04       1  to run  1-sqrt_max_steps-200",
    ]


def test_names_that_fit_are_not_shortened():
    assert all(name in view.text(build(wsd(100, 200)), width=120) for name in wsd(100, 200))


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["wsd", "constant", "cosine"]),
            st.sampled_from([1e-3, 2e-3]),
            st.integers(12, 60),
        ),
        min_size=1,
        max_size=14,
        unique=True,
    )
)
def test_each_line_stands_below_its_parent(choices):
    p = build(
        {f"{k}-{lr}-{n}": Schedule(k, lr, warmup_steps=2, decay_steps=n) for k, lr, n in choices}
    )
    expected = []
    for stage in p.stages:
        above = p.by_id.get(stage.parent)
        above = above and (above.start, above.stop)
        expected.append(((stage.start, stage.stop), above))
    assert sorted(parents(view.text(p, lines=10_000)), key=str) == sorted(expected, key=str)


def test_marks_follow_the_plan():
    schedules = wsd(100, 200, 300)
    fresh = build(schedules)
    trunk, leaf, *_ = fresh.stages
    assert {line[4] for line in parsed(view.text(fresh))} == {"to run"}
    states = {trunk.id: trunk.stop, leaf.id: leaf.stop}
    done = build(schedules, states=states, stored=states, finished=[leaf.id])
    assert [line[4] for line in parsed(view.text(done))[:3]] == ["stored", "done", "to run"]
    half = build(schedules, states=states, stored=states)
    assert [line[4] for line in parsed(view.text(half))[:2]] == ["stored", "result only"]
    dead = build(schedules, states={trunk.id: trunk.stop}, diverged=[trunk.id])
    assert [line[4] for line in parsed(view.text(dead))] == ["diverged"] + ["lost"] * (
        len(dead.stages) - 1
    )
    gone = build(schedules, finished=[s.id for s in fresh.stages if s.ends])
    assert parsed(view.text(gone))[0][4] == "not needed"


@pytest.mark.parametrize("width", [60, 100])
def test_middle_of_a_large_tree_is_left_out_and_counted(width):
    p = build(wsd(*range(100, 1100, 5)))
    lines = view.text(p, width=width).splitlines()
    assert len(lines) == 1 + 60 + 1 and max(map(len, lines)) <= width
    (gap,) = [line for line in lines if line.startswith("┊")]
    assert gap == f"┊ … {len(p.stages) - 60} more stages"


def test_trunk_deeper_than_the_stack_is_drawn():
    rates = np.ones(1200)
    p = build_tree([Branch(f"t{n}", "r", np.append(rates[:n], 0.5)) for n in range(1, 1200)])
    assert len(view.text(p).splitlines()) == 62


def test_numbers_of_the_summary_add_up():
    schedules = {**wsd(100, 200), "same": wsd(100)["decay_shape-linear_max_steps-100"]}
    p = build(schedules)
    trunk = p.stages[0]
    stored = build(schedules, states={trunk.id: trunk.stop}, stored=[trunk.id])
    lines = view.summary(stored)
    assert lines[0] == "3 trials in 3 stages; trained one by one, they take 400 steps"
    to_run, (saved, shared, kept) = (
        re.findall(r"[\d,]+", lines[1])[0],
        [
            re.search(pattern, lines[2])[1]
            for pattern in (r"saved: (\d+)", r"(\d+) shared", r"(\d+) stored")
        ],
    )
    assert int(kept) == trunk.steps and int(shared) == stored.steps_asked - stored.steps_in_tree
    assert int(saved) == int(shared) + int(kept) and int(to_run) + int(saved) == 400
    assert "run once: decay_shape-linear_max_steps-100 = same" in lines[-1]


def test_diverged_steps_are_not_called_saved():
    p = build(wsd(100, 200))
    trunk = p.stages[0]
    lines = view.summary(build(wsd(100, 200), states={trunk.id: trunk.stop}, diverged=[trunk.id]))
    assert lines[1].startswith("to run: 0 steps") and "0 stored" in lines[2]
    assert lines[3].startswith(f"not run: {p.steps_in_tree} steps")


def advised(schedules, **more):
    p = build(schedules, **more)
    by_trial = {t.name: schedules[t.name.rpartition("_seed")[0] or t.name] for t in p.branches}
    return p, " | ".join(advice(p, by_trial))


def test_advice_for_cosines_of_several_lengths():
    _, text = advised(cosine(100, 200, 300))
    assert "share little more than the warmup. With schedule.kind=wsd" in text


def test_advice_for_a_space_that_shares_nothing():
    p, text = advised({**cosine(100), **cosine(100, peak=2e-3)})
    assert p.steps_in_tree == p.steps_asked
    assert (
        "no two trials share a step" in text
        and "schedule.max_lr changes the learning rate from the first step on" in text
    )
    assert "trials share steps if they differ late" in text


def test_no_advice_for_a_space_that_shares():
    assert advised(wsd(100, 200, 300))[1] == ""
    # A cosine and a linear schedule share their warmup.
    assert advised({**cosine(100), **cosine(100, kind="linear")})[1] == ""
    assert "no two trials" not in advised({**cosine(100), **cosine(200)})[1]
    assert advised(wsd(100))[1] == ""


def test_advice_names_the_seeds_and_warmups_that_separate_trials():
    assert "2 groups of trials differ in seed" in advised(wsd(100, 200), roots=("a", "b"))[1]
    _, text = advised(
        {
            "a": Schedule("constant", 1e-3, warmup_steps=3, decay_steps=50),
            "b": Schedule("constant", 1e-3, warmup_steps=4, decay_steps=50),
        }
    )
    assert "schedule.warmup_steps changes" in text and "max_lr" not in text
    # Twice the peak with twice the warmup has the same first step: 2e-3 / 4 = 1e-3 / 2.
    _, text = advised(
        {
            "a": Schedule("constant", 1e-3, warmup_steps=1, decay_steps=50),
            "b": Schedule("constant", 2e-3, warmup_steps=3, decay_steps=50),
        }
    )
    assert "first step on" not in text
