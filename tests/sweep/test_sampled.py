"""Sampled trials with real optuna: samples are asked one by one and share stored steps."""

import json
import sys

import pytest

from orchestrator.jobs.sweep import SweepJob
from orchestrator.sweep.states import DONE

SPACE = [
    "sweep.sampler=optuna",
    "sweep.space.train.max_steps={low: 10, high: 30}",
    "sweep.space.schedule.decay_shape=[linear, cosine]",
]


def made(study) -> int:
    results = [json.loads(f.read_text()) for f in study.folder.path.glob("stages/*/result.json")]
    return sum(r["steps_run"] for r in results)


def test_samples_of_optuna_share_their_trunk(sweeps):
    study = sweeps.open(*SPACE, "sweep.num_samples=5")
    sweeps.run(study)
    assert [len(study.samples), len(study.trials)] == [5, 5]
    assert {row.state for row in study.results()} == {"done"}
    alone = sum(c.branch.steps for c in study.trials.values())
    assert made(study) < alone == study.progress.tree.steps_asked
    for name in study.trials:
        assert sweeps.outcome(study.folder.trial(name)) == sweeps.alone(study, name), name


def test_optuna_gets_every_loss(sweeps):
    study = sweeps.open(*SPACE, "sweep.num_samples=4")
    sweeps.run(study)
    assert study.next_sample() == []
    told = {t.number: t.value for t in study.sampler.study.trials}
    assert told == {
        n: study.final_loss(study.trials[names[0]]) for n, names in study.samples.items()
    }


def test_continued_sweep_keeps_its_samples(sweeps):
    first = sweeps.open(*SPACE, "sweep.num_samples=4")
    ran = sweeps.run(first, limit=3)
    study = sweeps.open(*SPACE, "sweep.num_samples=4")
    assert list(study.trials) == list(first.trials)
    ran += sweeps.run(study)
    assert len(ran) == len(set(ran)) and len(study.trials) == 4
    grown = sweeps.open(*SPACE, "sweep.num_samples=6")
    more = sweeps.run(grown)
    assert not set(more) & set(ran) and len(grown.trials) == 6
    values = [t.value for t in grown.sampler.study.trials if t.value is not None]
    assert len(values) >= 4, "optuna gets the earlier losses again"


def test_optuna_gets_the_mean_over_seeds(sweeps):
    study = sweeps.open(*SPACE, "sweep.num_samples=2", "sweep.seeds=2")
    sweeps.run(study)
    study.next_sample()
    means = [
        sum(study.final_loss(study.trials[n]) for n in names) / 2
        for names in study.samples.values()
    ]
    assert [t.value for t in study.sampler.study.trials] == means


def test_invalid_sample_is_left_out(sweeps, capsys):
    """Half of the space has a warmup as long as its run."""
    study = sweeps.open(
        "sweep.sampler=optuna",
        "sweep.num_samples=6",
        "sweep.space.schedule.warmup_steps=[2, 18]",
        "train.max_steps=18",
    )
    sweeps.run(study)
    assert (
        "sample-" in (out := capsys.readouterr().out) and "is left out: " in out and "warmup" in out
    )
    assert 0 < len(study.trials) < 6
    assert all(study.progress.states.of_trial(name) == DONE for name in study.trials)


def test_random_samples_share_steps(sweeps):
    study = sweeps.open(*SPACE[1:], "sweep.sampler=random", "sweep.num_samples=5")
    sweeps.run(study)
    assert made(study) == study.tree.steps_in_tree < study.tree.steps_asked
    for name in study.trials:
        assert sweeps.outcome(study.folder.trial(name)) == sweeps.alone(study, name), name


def test_missing_optuna_is_one_clear_line(sweeps, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(
        ValueError,
        match=r"sweep.sampler: optuna is not installed; pip install 'espalier\[optuna\]'",
    ):
        sweeps.open(*SPACE, "sweep.num_samples=2")


@pytest.mark.parametrize(
    "stop",
    [["sweep.stop=asha"], ["sweep.stop=anneal_probe", "sweep.probe_step=5", "sweep.probe_steps=2"]],
)
def test_stopping_rules_are_refused_with_optuna(sweeps, stop):
    with pytest.raises(ValueError, match="sweep.stop: .*optuna"):
        sweeps.open(*SPACE, "sweep.num_samples=2", *stop)


def test_next_sample_does_not_repeat_a_diverged_trunk(sweeps):
    study = sweeps.open(
        "sweep.sampler=optuna",
        "sweep.num_samples=4",
        "sweep.space.train.max_steps={low: 16, high: 30}",
        "schedule.max_lr=1e38",
        "optim.max_grad_norm=null",
    )
    sweeps.run(study)
    assert {row.state for row in study.results()} == {"diverged"}
    assert len(list(study.folder.path.glob("stages/*/result.json"))) == 1


def test_space_can_be_narrowed_and_an_incomplete_line_is_ignored(sweeps):
    study = sweeps.open(*SPACE, "sweep.num_samples=2")
    sweeps.run(study)
    with open(study.folder.path / "samples.jsonl", "a") as out:
        out.write('{"train.max')
    study = sweeps.open(
        *SPACE[:1],
        "sweep.space.train.max_steps={low: 29, high: 30}",
        SPACE[2],
        "sweep.num_samples=3",
    )
    sweeps.run(study)
    assert len(study.trials) == 3
    assert {row.state for row in study.results()} == {"done"}


def test_finished_sweep_continues_if_more_samples_are_wanted(sweeps, tiny_corpus, monkeypatch):
    monkeypatch.setenv("ESPALIER_STORAGE", str(sweeps.folder))
    words = [*SPACE, f"data.corpus={tiny_corpus}"]
    sweeps.run(sweeps.open(*words, "sweep.num_samples=2"))
    for number, finished in ((2, True), (3, False)):
        job = SweepJob(sweeps.load(*words, f"sweep.num_samples={number}"))
        job.check()
        assert job.is_finished() == finished
