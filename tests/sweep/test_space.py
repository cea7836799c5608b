"""Trials of a sweep file: which ones, their names, and equal results in every process."""

import itertools
import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.config.experiment import (
    Experiment,
    field_docs,
    load_experiment,
    parse_experiment,
)
from orchestrator.config.sweep import SweepSection, sweep_docs
from orchestrator.config.yaml_text import read_yaml
from orchestrator.errors import UserError
from orchestrator.sweep.report.advice import left_out
from orchestrator.sweep.space.checks import origin
from orchestrator.sweep.space.expand import expand, load_sweep, sampled
from orchestrator.sweep.space.names import LONGEST_NAME, trial_name
from pipelines.common import help_text

REPO = Path(__file__).resolve().parent.parent.parent
PEAKS = "sweep.grid.schedule.max_lr=[1e-3, 2e-3]"
DRAWN = [
    "sweep.sampler=random",
    "sweep.num_samples=5",
    "sweep.space.schedule.max_lr={low: 1e-4, high: 1e-2, log: true}",
    "sweep.space.model.n_layer={low: 1, high: 12}",
    "sweep.space.schedule.decay_shape=[linear, 1-sqrt]",
]
PROBE = ["sweep.stop=anneal_probe", "sweep.probe_step=40", "sweep.probe_steps=10"]


def names(*words: str) -> list[str]:
    return [trial.name for trial in load_sweep(None, words).trials]


# ---- which trials ----
def test_grid_has_a_trial_for_each_combination_of_values():
    grid = {
        "schedule.kind": ["wsd", "cosine"],
        "schedule.max_lr": [1e-3, 2e-3, 5e-3],
        "train.max_steps": [40, 80],
    }
    sweep = load_sweep(
        None, ["model.n_layer=3", *(f"sweep.grid.{key}={json.dumps(v)}" for key, v in grid.items())]
    )
    asked = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    assert [trial.fields for trial in sweep.trials] == asked
    for trial, fields in zip(sweep.trials, asked, strict=True):
        alone = [f"{key}={json.dumps(value)}" for key, value in fields.items()]
        assert trial.experiment == load_experiment(
            None, ["model.n_layer=3", *alone, f"name={trial.name}"]
        )
        assert trial.name == trial.setting and trial.seed == trial.experiment.train.seed == 1337


def test_named_trials_are_added_and_list_every_varied_field():
    sweep = load_sweep(
        None, [PEAKS, "sweep.trials.long.train.max_steps=6e3", "sweep.trials.plain={}"]
    )
    rows = {trial.name: trial.fields for trial in sweep.trials}
    assert list(rows) == ["max_lr-0.001", "max_lr-0.002", "long", "plain"]
    assert rows["max_lr-0.002"] == {"schedule.max_lr": 2e-3, "train.max_steps": 2000}
    assert rows["long"] == {"schedule.max_lr": 6e-4, "train.max_steps": 6000}
    assert rows["plain"] == {"schedule.max_lr": 6e-4, "train.max_steps": 2000}
    assert type(rows["long"]["train.max_steps"]) is int


def test_each_trial_is_repeated_with_every_seed():
    words = [
        PEAKS,
        "sweep.trials.mine.schedule.kind=wsd",
        *DRAWN,
        "sweep.space={train.max_steps: {low: 10, high: 20}}",
    ]
    once, thrice = (
        load_sweep(None, ["train.seed=7", *words, f"sweep.seeds={n}"]).trials for n in (1, 3)
    )
    assert (
        [t.setting for t in once]
        == [t.name for t in once]
        == list(dict.fromkeys(t.setting for t in thrice))
    )
    assert len(thrice) == 3 * len(once) == 24
    for i, trial in enumerate(thrice):
        alone, seed = once[i // 3], 7 + i % 3
        assert (trial.seed, trial.name) == (seed, f"{alone.setting}_seed-{seed}")
        assert trial.fields == alone.fields
        assert trial.experiment == alone.experiment.replace(name=trial.name, train__seed=seed)


def test_grid_can_vary_the_seed():
    assert [
        (t.name, t.seed) for t in load_sweep(None, ["sweep.grid.train.seed=[1, 5]"]).trials
    ] == [("seed-1", 1), ("seed-5", 5)]


# ---- trials that are left out, seeds in a grid ----
def test_trials_that_cannot_be_run_are_left_out_and_counted():
    words = ["sweep.grid.train.max_steps=[40, 80]", "sweep.grid.schedule.warmup_steps=[10, 60]"]
    sweep = load_sweep(None, [*words, "sweep.skip_invalid=true"])
    assert [trial.name for trial in sweep.trials] == [
        "warmup_steps-10_max_steps-40",
        "warmup_steps-10_max_steps-80",
        "warmup_steps-60_max_steps-80",
    ]
    (line,) = sweep.left_out
    assert line.startswith("trial warmup_steps-60_max_steps-40: schedule.warmup_steps: 60 must be")
    assert left_out(sweep.left_out) == [
        "left out, because they cannot be run: 1",
        f"  {line}",
    ]
    with pytest.raises(UserError, match="1 of 1 trials cannot be run"):
        load_sweep(None, [words[0].replace(", 80", ""), words[1].replace("10, ", ""), *words[2:]])


def test_trial_that_ends_before_the_branch_is_left_out():
    words = ["sweep.grid.train.max_steps=[40, 80]", "sweep.from=base@40", "sweep.skip_invalid=true"]
    sweep = load_sweep(None, words)
    assert [trial.name for trial in sweep.trials] == ["max_steps-80"]
    assert len(sweep.left_out) == 1 and "trial max_steps-40" in sweep.left_out[0]


def test_sample_of_optuna_that_ends_before_the_branch_is_refused():
    words = [
        "sweep.sampler=optuna",
        "sweep.num_samples=3",
        "sweep.space.train.max_steps={low: 10, high: 80}",
        "sweep.from=base@40",
    ]
    sweep = load_sweep(None, words)
    for steps, is_refused in ((40, True), (41, False)):
        with (
            pytest.raises(UserError, match=r"base@40 is not before")
            if is_refused
            else nullcontext()
        ):
            sampled(sweep.settings, sweep.base.model_dump(), 0, {"train.max_steps": steps})


def test_seeds_of_a_grid_are_seeds_of_one_setting():
    words = [PEAKS, "sweep.grid.train.seed=[1, 5]", "name=peaks"]
    by_grid = load_sweep(None, words).trials
    assert {trial.setting for trial in by_grid} == {"max_lr-0.001", "max_lr-0.002"}
    assert {trial.setting for trial in load_sweep(None, words[1:]).trials} == {"peaks"}
    named = [
        "sweep.trials.a={schedule.max_lr: 1e-3, train.seed: 7}",
        "sweep.trials.again={schedule.max_lr: 1e-3, train.seed: 7}",
        "sweep.trials.other={schedule.kind: wsd, train.seed: 7}",
    ]
    added = load_sweep(None, [*words, *named]).trials[4:]
    assert [trial.setting for trial in added] == ["max_lr-0.001", "again", "other"]


def test_sample_of_optuna_has_a_trial_for_each_seed():
    words = [
        "sweep.sampler=optuna",
        "sweep.num_samples=3",
        "sweep.space.schedule.max_lr={low: 1e-4, high: 1e-2}",
        "sweep.seeds=2",
    ]
    sweep = load_sweep(None, [PEAKS.replace("max_lr", "min_lr_ratio"), *words])
    assert len(sweep.trials) == 4
    asked = sampled(sweep.settings, sweep.base.model_dump(), 12, {"schedule.max_lr": 0.00123456789})
    assert [t.name for t in asked] == [
        f"sample-12_max_lr-0.001235_seed-{seed}" for seed in (1337, 1338)
    ]
    assert all(t.experiment.schedule.max_lr == 0.00123456789 for t in asked)
    assert all(set(t.fields) == {"schedule.max_lr", "schedule.min_lr_ratio"} for t in asked)
    with pytest.raises(UserError, match=r"^schedule.max_lr: -1 is not a number above 0"):
        sampled(sweep.settings, sweep.base.model_dump(), 13, {"schedule.max_lr": -1})
    with pytest.raises(UserError, match=r"^schedule.warmup_steps: 9999 must be below"):
        sampled(sweep.settings, sweep.base.model_dump(), 13, {"schedule.warmup_steps": 9999})


def test_ten_thousand_trials_are_allowed():
    lengths = json.dumps([*range(1, 101)])
    found = names(f"sweep.grid.train.max_steps={lengths}", "sweep.seeds=100")
    assert len(set(found)) == 10_000


def test_experiment_file_of_a_trial_reads_back_equal():
    words = [PEAKS, "sweep.trials.mine.schedule.kind=inverse_sqrt", "sweep.seeds=2"]
    for trial in load_sweep(None, words).trials:
        stored = read_yaml(trial.experiment.to_yaml(), "again")
        assert parse_experiment(stored, "again") == trial.experiment


# ---- reading and writing ----
def test_overrides_apply_to_a_file_that_is_written_back_equal(tmp_path):
    path = tmp_path / "peaks.yaml"
    path.write_text(
        "train: {max_steps: 100}\nsweep:\n  grid:\n    schedule.max_lr: [6e-4, 1e-3]\n"
        "    schedule.decay_shape: [linear]\n  from: base@50\n"
        "  trials: {a.b: {schedule.kind: wsd}}\n"
    )
    sweep = load_sweep(
        path,
        [
            "sweep.grid.schedule.kind=[wsd, cosine]",
            "sweep.trials.a.b.schedule.max_lr=3e-3",
            "sweep.trials.c={train.max_steps: 70}",
            "sweep.diverged_above=20",
            "sweep.keep_branches=false",
        ],
    )
    assert sweep.base == load_experiment(None, ["name=peaks", "train.max_steps=100"])
    assert sweep.settings.grid["schedule.max_lr"] == [6e-4, 1e-3]
    assert sweep.settings.trials == {
        "a.b": {"schedule.kind": "wsd", "schedule.max_lr": 3e-3},
        "c": {"train.max_steps": 70},
    }
    assert (sweep.settings.from_, origin(sweep.settings.from_)) == ("base@50", ("base", 50))
    assert len(sweep.trials) == 6
    again = tmp_path / "again.yaml"
    again.write_text(sweep.to_yaml())
    assert load_sweep(again) == sweep
    assert load_sweep(again).to_yaml() == sweep.to_yaml()


@pytest.mark.parametrize(
    "words",
    [
        [PEAKS],
        [PEAKS, "sweep.seeds=2"],
        DRAWN,
        [*DRAWN, PEAKS.replace("max_lr", "min_lr_ratio")],
        [PEAKS, *PROBE],
        ["sweep.trials.1e5={}", "sweep.trials.no={schedule.kind: wsd}"],
    ],
)
def test_written_sweep_reads_back_equal(tmp_path, words):
    sweep = load_sweep(None, words)
    (tmp_path / "x.yaml").write_text(sweep.to_yaml())
    assert load_sweep(tmp_path / "x.yaml") == sweep


def test_train_command_refuses_a_sweep_in_one_line_and_writes_nothing(tmp_path):
    (tmp_path / "peaks.yaml").write_text("sweep: {grid: {schedule.max_lr: [1e-3]}}")
    done = subprocess.run(
        [sys.executable, str(REPO / "pipelines" / "train.py"), "peaks.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: peaks.yaml: describes a sweep (sweep: …), not one run; "
        "run pipelines/sweep.py with it"
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["peaks.yaml"]
    with pytest.raises(UserError, match="describes a sweep"):
        load_experiment(None, ["sweep.seeds=3"])


def test_help_lists_sweep_fields_only_for_the_sweep_command():
    assert list(sweep_docs())[: len(field_docs())] == list(field_docs())
    entries = re.findall(
        r"^  (sweep\.\S+)  \(.*\)\n      \S", help_text("Sweeps.", sweep_docs()), re.MULTILINE
    )
    assert entries == [
        f"sweep.{name}"
        for name in (
            "grid",
            "trials",
            "sampler",
            "num_samples",
            "space",
            "seeds",
            "skip_invalid",
            "stop",
            "probe_step",
            "probe_steps",
            "probe_margin",
            "diverged_above",
            "from",
            "keep_branches",
        )
    ]
    assert "sweep." not in help_text("Trains.", field_docs())


# ---- names ----
def test_name_has_fields_and_values_and_a_section_where_two_fields_have_one_name():
    fields = {"train.max_steps": 80, "schedule.max_lr": 1e-3, "schedule.kind": "wsd"}
    assert trial_name(fields) == "kind-wsd_max_lr-0.001_max_steps-80"
    fields = {"schedule.kind": "inverse_sqrt", "optim.kind": "adamw"}
    assert trial_name(fields) == "optim-kind-adamw_schedule-kind-inverse_sqrt"
    fields = {"schedule.decay_shape": "1-sqrt", "optim.max_grad_norm": None, "model.bias": True}
    assert trial_name(fields) == "bias-true_max_grad_norm-null_decay_shape-1-sqrt"
    fields = {"schedule.max_lr": 1e-5, "optim.weight_decay": 1.0}
    assert trial_name(fields) == "weight_decay-1_max_lr-1e-05"


@pytest.mark.parametrize(
    "value",
    ["a/b", "../../etc", "ä", "", "a b", ".", "x" * 200, "https://host/a?b#sha256=0f", ["a", "b"]],
)
def test_value_with_other_characters_gets_a_unique_folder_name(value):
    name = trial_name({"data.corpus": value})
    assert Experiment(name=name).name == name
    assert len(name) <= LONGEST_NAME
    assert name != trial_name({"data.corpus": value + value if value else "-"})


anything = st.text(st.sampled_from("ab_-./ é"), max_size=8) | st.sampled_from(
    ["x" * 150, "x" * 151]
)
COMBINATION = st.fixed_dictionaries(
    {
        "data.corpus": anything,
        "train.init_from": anything,
        "data.tokenizer": anything,
        "schedule.max_lr": st.floats(1e-9, 10),
        "train.max_steps": st.integers(1, 10**6),
    }
)


@given(st.lists(COMBINATION, min_size=2, max_size=5))
@example(
    [
        {"data.corpus": "a_tokenizer-b", "data.tokenizer": "c"},
        {"data.corpus": "a", "data.tokenizer": "b_tokenizer-c"},
    ]
)
def test_trials_have_different_names_that_do_not_depend_on_the_order_of_fields(combinations):
    by_name = {}
    for fields in combinations:
        name = trial_name(fields)
        assert re.fullmatch(rf"[A-Za-z0-9_-][A-Za-z0-9._-]{{0,{LONGEST_NAME - 1}}}", name)
        assert trial_name(dict(reversed(fields.items()))) == name
        assert by_name.setdefault(name, fields) == fields


@given(
    before=st.lists(st.floats(1e-6, 1), min_size=1, max_size=4, unique=True),
    after=st.lists(st.floats(1e-6, 1), min_size=1, max_size=4, unique=True),
    kinds=st.integers(1, 4),
)
def test_grown_grid_keeps_its_earlier_trials(before, after, kinds):
    base = Experiment().model_dump()
    shapes = ["wsd", "cosine", "linear", "constant"]
    grid = {"schedule.max_lr": before, "schedule.kind": shapes[:kinds]}
    more = {"schedule.kind": shapes, "schedule.max_lr": list(dict.fromkeys([*after, *before]))}
    small, large = (expand(base, SweepSection(grid=g)).trials for g in (grid, more))
    assert len(small) == kinds * len(before)
    assert {t.name: t.experiment for t in small}.items() <= {
        t.name: t.experiment for t in large
    }.items()


def test_more_seeds_keep_the_earlier_trials():
    assert set(names(PEAKS, "sweep.seeds=2")) < set(names(PEAKS, "sweep.seeds=4"))


def test_long_names_are_shortened_and_stay_different():
    words = [
        f"sweep.grid.{key}=[{values}]"
        for key, values in {
            "model.dropout": "0.1",
            "model.n_head": "12",
            "optim.beta1": "0.9",
            "optim.beta2": "0.95",
            "optim.weight_decay": "0.1",
            "schedule.min_lr_ratio": "0.1",
            "schedule.warmup_steps": "10",
            "train.max_steps": "100, 1000, 10000",
        }.items()
    ]
    found = names(*words, "sweep.seeds=2", f"train.seed={2**53 - 2}")
    assert len(set(found)) == 6
    assert {len(name.partition("_seed-")[0]) for name in found} == {LONGEST_NAME}


# ---- random samples ----
def test_random_samples_are_equal_in_every_process_and_kept_when_more_are_drawn():
    here = load_sweep(None, DRAWN)
    code = (
        "import sys; from orchestrator.sweep.space.expand import load_sweep; "
        "print(load_sweep(None, sys.argv[1:]).trials)"
    )
    there = [
        subprocess.run(
            [sys.executable, "-c", code, *DRAWN],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout.strip()
        for seed in ("1", "2")
    ]
    assert there == [str(here.trials)] * 2
    assert load_sweep(None, [*DRAWN, "sweep.num_samples=9"]).trials[:5] == here.trials
    assert len({t.experiment.schedule.max_lr for t in here.trials}) == 5
    other = load_sweep(None, [*DRAWN, "train.seed=1"])
    assert {t.name for t in other.trials}.isdisjoint(t.name for t in here.trials)


def test_random_samples_never_change():
    """Old sweeps that grow find their trials by these names."""
    assert names(*DRAWN, "sweep.num_samples=3") == [
        "sample-0_n_layer-10_decay_shape-linear_max_lr-0.00624",
        "sample-1_n_layer-2_decay_shape-1-sqrt_max_lr-0.0006901",
        "sample-2_n_layer-7_decay_shape-1-sqrt_max_lr-0.001694",
    ]
