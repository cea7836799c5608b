"""The ranking of settings: means over all seeds, ties by a paired t-test, comparison.csv, table."""

import csv
import io
import math
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.sweep.ranking import ERROR, Row, p_value, rank
from orchestrator.sweep.report.comparison import WIDTH, csv_text, table, trials_in


def row(setting, seed, final, state="done", reason=None, **fields):
    return Row(
        trial=f"{setting}_seed-{seed}",
        setting=setting,
        seed=seed,
        fields=fields,
        steps=100,
        state=state,
        metric="val/loss",
        final=final,
        best=final,
        val_bits_per_byte=2.0,
        train_loss=1.5,
        weights_sha256="ab" if state == "done" else None,
        reason=reason,
    )


def tied(values, best) -> bool:
    """Whether the seeds cannot tell two settings apart, if there are only these two."""
    return p_value(values, best) > ERROR


def rows(**finals):
    return [
        row(setting, seed, final)
        for setting, values in finals.items()
        for seed, final in enumerate(values)
    ]


def test_settings_are_ranked_by_their_means():
    best, other = rank(rows(b=[1.3, 1.1, 1.5], a=[1.0, 1.2, 1.1]))
    assert (best.name, best.rank, other.name, other.rank) == ("a", 1, "b", 2)
    assert best.mean == pytest.approx(1.1) and best.spread == pytest.approx(0.1)
    assert other.values == {0: 1.3, 1: 1.1, 2: 1.5} and not best.ties


def test_small_difference_of_all_seeds_is_no_tie():
    # The seeds move both settings by 0.2 and the setting by 0.01: an unpaired test finds nothing.
    best, other = rank(rows(a=[1.0, 1.2, 1.4], b=[1.01, 1.212, 1.409]))
    assert (best.name, other.ties) == ("a", False)
    assert best.spread > 10 * (other.mean - best.mean)


def test_difference_on_which_seeds_disagree_is_a_tie():
    best, other = rank(rows(a=[1.0, 1.2, 1.4], b=[1.1, 1.1, 1.45]))
    assert (best.name, other.name, other.ties) == ("a", "b", True)


@pytest.mark.parametrize(
    ("seeds", "quantile"),  # Abramowitz and Stegun, table 26.10: 0.975 with seeds - 1 degrees
    [(2, 12.706), (3, 4.303), (4, 3.182), (5, 2.776), (11, 2.228), (30, 2.045)],
)
def test_limit_of_a_tie_is_the_quantile_of_students_t(seeds, quantile):
    errors = [seed - (seeds - 1) / 2 for seed in range(seeds)]  # their mean is 0
    spread = math.sqrt(sum(e * e for e in errors) / (seeds - 1))
    for factor, expected in ((0.9995, True), (1.0005, False)):
        mean = factor * quantile * spread / math.sqrt(seeds)
        values = {seed: mean + error for seed, error in enumerate(errors)}
        assert tied(values, dict.fromkeys(values, 0.0)) is expected


def test_with_one_seed_only_equal_values_tie():
    found = rank(rows(a=[1.0], b=[1.0], c=[1.0000001]))
    assert [(s.name, s.rank, s.spread, s.ties) for s in found] == [
        ("a", 1, None, False),
        ("b", 1, None, True),
        ("c", 3, None, False),
    ]
    assert "one seed: the spread is unknown" in table(rows(a=[1.0], b=[2.0]))


def test_only_common_seeds_are_compared():
    assert tied({1: 1.5, 2: 1.6}, {2: 1.5, 3: 0.1})  # one common seed has no spread
    assert tied({1: 1.0, 2: 3.0, 9: 50.0}, {1: 2.0, 2: 1.0})


def test_five_percent_of_equal_settings_are_called_different():
    draw = random.Random(7).gauss
    wrong = 0
    for _ in range(4000):
        a = {seed: draw(0, 1) for seed in range(4)}
        b = {seed: draw(0, 1) for seed in range(4)}
        wrong += not tied(a, b)
    assert 0.035 < wrong / 4000 < 0.065


def test_of_many_equal_settings_one_is_called_worse_in_at_most_five_percent_of_rankings():
    draw = random.Random(7)
    wrong = 0
    for _ in range(400):
        seeds = [draw.gauss(3, 0.1) for _ in range(4)]
        finals = {f"s{i}": [loss + draw.gauss(0, 0.02) for loss in seeds] for i in range(20)}
        wrong += any(not s.ties for s in rank(rows(**finals))[1:])
    assert wrong / 400 <= ERROR


def test_setting_that_is_worse_is_found_among_many():
    draw = random.Random(7)
    seeds = [draw.gauss(3, 0.1) for _ in range(5)]
    finals = {f"s{i}": [loss + draw.gauss(0, 0.001) for loss in seeds] for i in range(20)}
    finals["worse"] = [loss + 0.5 + draw.gauss(0, 0.001) for loss in seeds]
    assert [s.name for s in rank(rows(**finals))[1:] if not s.ties] == ["worse"]


@pytest.mark.parametrize(
    ("difference", "ties"), [(1e-15, True), (1e-8, True), (1e-5, False), (0.1, False)]
)
def test_equal_differences_are_worse_only_above_the_rounding(difference, ties):
    losses = [3.1, 3.2, 3.3]
    found = rank(rows(a=losses, b=[loss + difference for loss in losses]))
    assert found[1].ties is ties


def test_setting_without_all_of_its_seeds_comes_last_without_a_rank():
    found = rank(
        [
            row("lost", 0, None, "diverged", "train/loss is nan at step 7"),
            row("lost", 1, 0.1),
            row("alone", 0, None, "waiting"),
            *rows(a=[1.0, 1.1]),
            row("empty", 0, math.nan),
        ]
    )
    assert [(s.name, s.rank, s.state) for s in found] == [
        ("a", 1, "done"),
        ("lost", None, "diverged"),
        ("alone", None, "waiting"),
        ("empty", None, "done"),
    ]
    assert found[1].reason == "1 of 2 seeds: train/loss is nan at step 7"
    assert found[1].values == {1: 0.1}
    assert found[3].reason == "no finite val/loss"


def test_table_lists_unranked_settings_with_the_reason():
    text = table([row("lost", 0, None, "diverged", "train/loss\nis nan"), *rows(a=[1.0])])
    ranked, unranked = text.split("not ranked:")
    assert "a " in ranked and "lost  diverged  train/loss is nan" in unranked


def test_nothing_done_is_no_ranking():
    assert "nothing to rank yet:" in table([row("a", 0, None, "running")])
    assert table([]) == "" and rank([]) == []


@given(
    st.lists(st.lists(st.floats(0.5, 20), min_size=3, max_size=3), min_size=1, max_size=8),
    st.randoms(),
)
def test_ranks_follow_the_means_in_any_order_of_rows(finals, chance):
    all_rows = rows(**{f"s{i}": values for i, values in enumerate(finals)})
    found = rank(all_rows)
    assert found[0].rank == 1 and not found[0].ties
    for better, worse in pairwise(found):
        assert better.mean <= worse.mean
        assert (better.rank == worse.rank) == (better.mean == worse.mean)
    chance.shuffle(all_rows)
    again = {s.name: (s.rank, s.mean, s.spread) for s in rank(all_rows)}
    assert again == {s.name: (s.rank, s.mean, s.spread) for s in found}


def test_csv_has_a_line_per_trial_and_a_column_per_field():
    b_fields = {"schedule.max_lr": 1e-3, "model.bias": False}
    a_fields = {"schedule.max_lr": 0.1 + 0.2, "optimizer.x": None}
    trials = [row("b", seed, 2.0 + seed, **b_fields) for seed in (1, 2)]
    trials += [row("a", seed, 1 / 3, **a_fields) for seed in (1, 2)]
    trials.append(row("c", 1, None, "failed", 'out of "memory", twice'))
    text = csv_text(trials)
    read = list(csv.DictReader(io.StringIO(text)))
    order = ["a_seed-1", "a_seed-2", "b_seed-1", "b_seed-2", "c_seed-1"]
    assert [line["trial"] for line in read] == order
    assert trials_in(text) == set(order)
    assert [line["rank"] for line in read] == ["1", "1", "2", "2", ""]
    a, _, b, _, c = read
    assert float(a["final"]) == 1 / 3 and float(a["schedule.max_lr"]) == 0.1 + 0.2  # every digit
    assert (a["model.bias"], b["model.bias"]) == ("", "false")  # not varied; varied to false
    assert (a["optimizer.x"], b["optimizer.x"]) == ("null", "")
    assert (c["state"], c["reason"]) == ("failed", 'out of "memory", twice')
    assert (c["final"], c["setting_mean"], c["ties_with_best"]) == ("", "", "")


def test_columns_of_the_csv_are_those_that_scripts_read():
    header = csv_text([row("a", 1, 1.0, **{"schedule.max_lr": 1e-3})]).splitlines()[0]
    assert header == (
        "rank,trial,setting,seed,schedule.max_lr,steps,state,metric,final,best,val_bits_per_byte,"
        "train_loss,weights_sha256,reason,setting_mean,setting_spread,setting_seeds,ties_with_best"
    )


def test_table_has_the_best_first():
    trials = [
        row(f"kind-{k}", s, loss + s, **{"schedule.kind": k})
        for s in (0.0, 0.1, 0.2)
        for k, loss in (("cosine", 2.0), ("wsd", 1.5))
    ]
    head, first, second = table(trials).splitlines()[:3]
    assert " ".join(head.split()) == "rank setting steps val/loss spread seeds above best"
    assert first.split() == ["1", "kind-wsd", "100", "1.6000", "0.1000", "3"]
    assert second.split() == ["2", "kind-cosine", "100", "2.1000", "0.1000", "3", "+0.5000"]


@pytest.mark.parametrize("fields", [1, 12])
def test_table_fits_the_terminal(fields):
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
    assert max(map(len, lines)) <= WIDTH and len(lines) == 1 + 200 + 1 + 2
    assert [line.split()[0] for line in lines[1:201]] == [str(i) for i in range(1, 201)]


# Losses at the steps 0, 1 and 2 of trials with two seeds. By hand:
#   wide    finals 2.6 and 2.4, mean 2.5; lowest 2.0 and 2.2
#   steady  finals 2.3 and 2.1, mean 2.2: the best setting, and its better seed has 2.1
#   lucky   finals 2.05 and 3.15, mean 2.6: its first seed is the lowest of all trials
# Differences from steady: wide 0.3 and 0.3, lucky -0.25 and 1.05 (a tie for two seeds).
CURVES = {
    "wide_seed-1": [3.0, 2.0, 2.6],
    "wide_seed-2": [3.1, 2.2, 2.4],
    "steady_seed-1": [3.2, 2.5, 2.3],
    "steady_seed-2": [3.1, 2.6, 2.1],
    "lucky_seed-1": [3.0, 2.5, 2.05],
    "lucky_seed-2": [3.0, 3.3, 3.15],
}


def test_finals_ranks_and_winner_of_written_curves_are_those_by_hand(sweeps, monkeypatch):
    words = ["train.max_steps=2", "train.eval_tokens=40", "schedule.warmup_steps=1"]
    words += ["train.seed=1", "sweep.seeds=2"]
    decays = {"wide": 0.1, "steady": 0.2, "lucky": 0.3}
    words += [f"sweep.trials.{name}.optim.weight_decay={decays[name]}" for name in decays]
    study = sweeps.open(*words)
    assert set(study.trials) == set(CURVES)

    def curve(_last, trial):
        losses = enumerate(CURVES[trial.name])
        return [{"step": step, "timestamp": step, "val/loss": loss} for step, loss in losses]

    monkeypatch.setattr("orchestrator.sweep.trials.curve", curve)
    sweeps.run(study)
    lines = list(csv.DictReader(io.StringIO(study.folder.comparison_file.read_text())))
    assert {line["trial"]: float(line["final"]) for line in lines} == {
        name: losses[-1] for name, losses in CURVES.items()
    }
    assert {line["trial"]: float(line["best"]) for line in lines} == {
        name: min(losses) for name, losses in CURVES.items()
    }
    found = {line["setting"]: line for line in lines}
    assert {name: line["rank"] for name, line in found.items()} == {
        "steady": "1",
        "wide": "2",
        "lucky": "3",
    }
    means = {name: float(line["setting_mean"]) for name, line in found.items()}
    assert means == pytest.approx({"steady": 2.2, "wide": 2.5, "lucky": 2.6})
    ties = {name: line["ties_with_best"] for name, line in found.items()}
    assert ties == {"steady": "false", "wide": "false", "lucky": "true"}
    assert (study.summary["best_trial"], study.summary["best_value"]) == ("steady_seed-2", 2.1)
