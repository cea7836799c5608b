"""The ranking: means over whole sets of seeds, ties by the paired test that the module states, everything in the CSV."""

import csv
import io
import math
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.sweep import ranking as comparison
from orchestrator.sweep.ranking import csv_text, rank, t_975, table, tied
from orchestrator.text import short_names


def row(setting, seed, final, state="done", reason=None, **fields):
    return {
        "trial": f"{setting}_seed-{seed}",
        "setting": setting,
        "seed": seed,
        "fields": fields,
        "steps": 100,
        "state": state,
        "metric": "val/loss",
        "final": final,
        "best": final,
        "val_bits_per_byte": 2.0,
        "train_loss": 1.5,
        "weights_sha256": "ab" if state == "done" else None,
        "reason": reason,
    }


def rows(**finals):
    return [
        row(setting, seed, final)
        for setting, values in finals.items()
        for seed, final in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("degrees", "value"),
    [  # Abramowitz and Stegun, table 26.10
        (1, 12.706),
        (2, 4.303),
        (3, 3.182),
        (4, 2.776),
        (5, 2.571),
        (10, 2.228),
        (29, 2.045),
        (120, 1.980),
    ],
)
def test_quantiles_are_those_of_the_tables(degrees, value):
    assert t_975(degrees) == pytest.approx(value, abs=5e-4)


def test_means_and_spreads():
    best, other = rank(rows(b=[1.3, 1.1, 1.5], a=[1.0, 1.2, 1.1]))
    assert (best.setting, best.rank, best.n, other.setting, other.rank) == ("a", 1, 3, "b", 2)
    assert best.mean == pytest.approx(1.1) and best.spread == pytest.approx(0.1)
    assert other.values == {0: 1.3, 1: 1.1, 2: 1.5} and not best.ties


def test_what_all_seeds_agree_on_is_no_tie_even_below_the_spread():
    # The seeds move both by 0.2, the setting by 0.01: unpaired this would be noise.
    best, other = rank(rows(a=[1.0, 1.2, 1.4], b=[1.01, 1.212, 1.409]))
    assert (best.setting, other.ties) == ("a", False)
    assert best.spread > 10 * (other.mean - best.mean)


def test_what_the_seeds_disagree_on_is_a_tie():
    best, other = rank(rows(a=[1.0, 1.2, 1.4], b=[1.1, 1.1, 1.45]))
    assert (best.setting, other.setting, other.ties) == ("a", "b", True)


def test_the_edge_of_a_tie_is_the_interval():
    # Differences 0 and 2d: mean d, standard error d; a tie at two seeds as long as 1 <= 12.7. With three, 4.3 errors decide.
    assert tied({1: 2.0, 2: 5.0}, {1: 1.0, 2: 1.0})
    error = math.sqrt(1 / 3)  # of differences m - 1, m, m + 1
    for mean, expected in ((4.30 * error, True), (4.31 * error, False)):
        assert tied({1: mean - 1, 2: mean, 3: mean + 1}, {1: 0.0, 2: 0.0, 3: 0.0}) is expected


def test_one_seed_knows_no_spread_and_ties_only_equal_values():
    found = rank(rows(a=[1.0], b=[1.0], c=[1.0000001]))
    assert [(s.setting, s.rank, s.spread, s.ties) for s in found] == [
        ("a", 1, None, False),
        ("b", 1, None, True),
        ("c", 3, None, False),
    ]
    assert "one seed: no spread known" in table(rows(a=[1.0], b=[2.0]))


def test_only_common_seeds_are_compared():
    assert not tied({1: 1.5, 2: 1.6}, {2: 1.5, 3: 0.1})  # one pair: no spread known
    assert tied({1: 1.0, 2: 3.0, 9: 50.0}, {1: 2.0, 2: 1.0})


def test_a_tie_is_called_in_all_but_5_percent_where_nothing_differs():
    draw = random.Random(7).gauss
    wrong = sum(
        not tied({s: draw(0, 1) for s in range(4)}, {s: draw(0, 1) for s in range(4)})
        for _ in range(4000)
    )
    assert 0.035 < wrong / 4000 < 0.065


def test_what_has_not_all_its_seeds_comes_last_without_a_rank():
    found = rank(
        [
            row("lost", 0, None, "diverged", "train/loss is nan at step 7"),
            row("lost", 1, 0.1),
            row("alone", 0, None, "waiting"),
            *rows(a=[1.0, 1.1]),
            row("empty", 0, math.nan),
        ]
    )
    assert [(s.setting, s.rank, s.state) for s in found] == [
        ("a", 1, "done"),
        ("lost", None, "diverged"),
        ("alone", None, "waiting"),
        ("empty", None, "done"),
    ]
    assert found[1].reason == "1 of 2 seeds: train/loss is nan at step 7" and found[1].values == {
        1: 0.1
    }
    assert found[3].reason == "no finite val/loss"
    text = table([row("lost", 0, None, "diverged", "train/loss\nis nan"), *rows(a=[1.0])])
    assert (
        text.index("a ")
        < text.index("not ranked:")
        < text.index("lost  diverged  train/loss is nan")
    )


def test_nothing_done_is_no_ranking():
    assert "nothing to rank yet:" in table([row("a", 0, None, "running")])
    assert table([]) == "" and rank([]) == []


@given(
    st.lists(st.lists(st.floats(0.5, 20), min_size=3, max_size=3), min_size=1, max_size=8),
    st.randoms(),
)
def test_ranks_follow_the_means_in_whatever_order_the_rows_come(finals, chance):
    all_rows = rows(**{f"s{i}": values for i, values in enumerate(finals)})
    found = rank(all_rows)
    assert found[0].rank == 1 and not found[0].ties
    for better, worse in pairwise(found):
        assert better.mean <= worse.mean
        assert (better.rank == worse.rank) == (better.mean == worse.mean)
    chance.shuffle(all_rows)
    again = {s.setting: (s.rank, s.mean, s.spread) for s in rank(all_rows)}
    assert again == {s.setting: (s.rank, s.mean, s.spread) for s in found}


def test_the_csv_has_a_line_per_trial_and_a_column_per_field():
    trials = [
        row("b", s, 2.0 + s, **{"schedule.max_lr": 1e-3, "model.bias": False}) for s in (1, 2)
    ]
    trials += [
        row("a", s, 1 / 3, **{"schedule.max_lr": 0.1 + 0.2, "optimizer.x": None}) for s in (1, 2)
    ]
    trials.append(row("c", 1, None, "failed", 'out of "memory", twice'))
    read = list(csv.DictReader(io.StringIO(csv_text(trials))))
    assert [line["trial"] for line in read] == [
        "a_seed-1",
        "a_seed-2",
        "b_seed-1",
        "b_seed-2",
        "c_seed-1",
    ]
    assert [line["rank"] for line in read] == ["1", "1", "2", "2", ""]
    assert (
        float(read[0]["final"]) == 1 / 3 and float(read[0]["schedule.max_lr"]) == 0.1 + 0.2
    )  # every digit
    assert (read[0]["model.bias"], read[2]["model.bias"]) == (
        "",
        "false",
    )  # not varied; varied to false
    assert (read[0]["optimizer.x"], read[2]["optimizer.x"]) == ("null", "")
    assert (read[4]["state"], read[4]["reason"], read[4]["final"]) == (
        "failed",
        'out of "memory", twice',
        "",
    )


def test_a_table_has_the_best_first_and_a_column_per_field():
    trials = [
        row(f"kind-{k}", s, loss + s, **{"schedule.kind": k, "train.max_steps": 80})
        for s in (0.0, 0.1, 0.2)
        for k, loss in (("cosine", 2.0), ("wsd", 1.5))
    ]
    head, first, second = table(trials).splitlines()[:3]
    assert head.split() == [
        "rank",
        "kind",
        "max_steps",
        "val/loss",
        "spread",
        "seeds",
        "above",
        "best",
    ]
    assert first.split() == ["1", "wsd", "80", "1.6000", "0.1000", "3"]
    assert second.split() == ["2", "cosine", "80", "2.1000", "0.1000", "3", "+0.5000"]


@pytest.mark.parametrize("fields", [1, 12])
def test_a_table_fits_the_terminal(fields):
    trials = [
        row(
            "_".join(f"field_{j}-{i + j}" for j in range(fields)),
            1,
            1.0 + i,
            **{f"section.field_{j}": "value" * 2 for j in range(fields)},
        )
        for i in range(200)
    ]
    trials += [row("x" * 100, 1, None, "failed", "because " * 40)]
    lines = table(trials).splitlines()
    assert max(map(len, lines)) <= comparison.WIDTH and len(lines) == 1 + 200 + 1 + 2
    assert [line.split()[0] for line in lines[1:201]] == [str(i) for i in range(1, 201)]


def test_short_names_stay_apart():
    assert set(short_names(["a-1_b-2", "a-1_b-3", "mine"]).values()) == {"b-2", "b-3", "mine"}
    clash = ["x_b-2", "x_b-3", "b-2"]  # shortened, two would be the same
    assert short_names(clash) == {name: name for name in clash}


@given(st.lists(st.text("ab_", min_size=1, max_size=6), unique=True, max_size=8))
def test_short_names_are_as_many(names):
    assert len(set(short_names(names).values())) == len(names)
