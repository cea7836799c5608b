"""A sweep that branches off an existing run: its states are states of the tree, its lines the first lines of the trials."""

import json

import pytest

from orchestrator.checkpoint import store as checkpoint
from orchestrator.config.experiment import load_experiment
from orchestrator.runs.folder import RunFolder
from orchestrator.train.loop import train

# The run is all trunk, so that a wsd schedule of any length branches off it as it would alone.
TRIALS = [
    "sweep.trials.a={schedule.kind: wsd, train.max_steps: 26, schedule.decay_fraction: 0.5}",
    "sweep.trials.b={schedule.kind: wsd, train.max_steps: 26, schedule.decay_fraction: 0.5, schedule.decay_shape: cosine}",
    "sweep.trials.longer={schedule.kind: wsd, train.max_steps: 40, schedule.decay_fraction: 0.25}",
]


@pytest.fixture
def source(sweeps, tiny_dataset):
    """A lone run of 20 steps at a constant rate, with checkpoints at 8, 12, 16 and 20."""
    run_dir = sweeps.folder / "source"
    run_dir.mkdir()
    experiment = load_experiment(
        None,
        [
            "name=source",
            f"data.dir={tiny_dataset}",
            *sweeps.small,
            "schedule.kind=constant",
            "train.keep=4",
        ],
    )
    (run_dir / "experiment.yaml").write_text(experiment.to_yaml())
    train(experiment, RunFolder(run_dir), tiny_dataset)
    assert checkpoint.steps(run_dir / "checkpoints") == [8, 12, 16, 20]
    return run_dir


def made(study, ran) -> int:
    return sum(
        json.loads((study.folder.stage(i).result_file).read_text())["steps_run"] for i in ran
    )


@pytest.mark.parametrize(("step", "again"), [(8, 0), (12, 0), (13, 1), (7, 7)])
def test_trials_branch_off_a_run_and_are_what_they_are_alone(sweeps, source, step, again):
    """Without a checkpoint at the step, the nearest earlier one is where it begins."""
    study = sweeps.open(*TRIALS, f"sweep.from=source@{step}")
    ran = sweeps.run(study)
    # From the branch on: the trunk to 13 (a, b), to 30 (longer), and the three decays, whose first step a and b share.
    alone = len(
        {
            (c.rates.first(n).tobytes())
            for c in study.trials.values()
            for n in range(step + 1, c.branch.steps + 1)
        }
    )
    assert made(study, ran) == study.tree.steps_to_run == alone + again
    for name in study.trials:
        assert sweeps.outcome(study.folder.trial(name)) == sweeps.alone(study, name), name


def test_the_end_of_a_finished_run_is_a_trunk_to_extend(sweeps, source):
    """Its last line and its open log window are those of a run that ended there; the trials' are not."""
    study = sweeps.open(TRIALS[2], "sweep.from=source@20")
    assert made(study, sweeps.run(study)) == 20
    assert sweeps.outcome(study.folder.path / "trials" / "longer") == sweeps.alone(study, "longer")


def test_a_schedule_that_is_not_the_runs_follows_the_runs_rates_up_to_the_branch(sweeps, source):
    study = sweeps.open(
        "sweep.trials.lower={schedule.kind: linear, schedule.max_lr: 5e-3, train.max_steps: 24}",
        "sweep.from=source@12",
    )
    sweeps.run(study)
    lines = sweeps.outcome(study.folder.path / "trials" / "lower")["curve"]
    rates = {line["step"]: line["optim/lr"] for line in lines if "optim/lr" in line}
    assert rates[12] == 1e-2  # the run's
    linear = study.trials["lower"].experiment.lr_schedule()
    assert rates[15] == pytest.approx(5e-4 + 4.5e-3 * (1 - (14 - 4) / (24 - 4)))
    assert linear.kind == "linear"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sweep.from=nowhere@8"], "no run 'nowhere'"),
        (["sweep.from=source@21"], "has 20 steps, and none 21"),
        (["sweep.from=source@8", "model.dropout=0.2"], "model.dropout: 0.1 there, 0.2 here"),
        (["sweep.from=source@8", "train.log_interval=4"], "train.log_interval: 3 there, 4 here"),
        (["sweep.from=source@8", "train.seed=1"], "train.seed: 1337 there, 1 here"),
    ],
)
def test_what_does_not_fit_is_refused(sweeps, source, words, said):
    with pytest.raises(ValueError, match=said):
        sweeps.open(*TRIALS, *words)


def test_a_trial_that_branched_off_itself_is_refused(sweeps, source):
    lower = "sweep.trials.lower={schedule.kind: linear, schedule.max_lr: 5e-3, train.max_steps: 24}"
    sweeps.run(sweeps.open(lower, "sweep.from=source@12"))
    with pytest.raises(ValueError, match="branched off 12 steps of another run itself"):
        sweeps.open(
            "sweep.trials.more={train.max_steps: 40}",
            "sweep.from=sweep/trials/lower@20",
            name="other",
        )
