"""A sweep that branches off an existing run: trials start with the steps and lines of the run."""

import json

import pytest

from orchestrator.checkpoint import store as checkpoint
from orchestrator.cluster import dtypes
from orchestrator.config.experiment import load_experiment
from orchestrator.errors import UserError
from orchestrator.runs.folder import RunFolder
from orchestrator.train.loop import train

# The run has a constant rate, so wsd trials of any length share its steps.
TRIALS = [
    "sweep.trials.a={schedule.kind: wsd, train.max_steps: 26, schedule.decay_fraction: 0.5}",
    "sweep.trials.b={schedule.kind: wsd, train.max_steps: 26, schedule.decay_fraction: 0.5, "
    "schedule.decay_shape: cosine}",
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
def test_trials_that_branch_off_a_run_equal_their_own_runs(sweeps, source, step, again):
    """Without a checkpoint at the step, they start from the nearest earlier one."""
    study = sweeps.open(*TRIALS, f"sweep.from=source@{step}")
    ran = sweeps.run(study)
    # The trunk to step 13 (a, b) and to 30 (longer), and three decays; a and b share a first step.
    alone = len(
        {
            tuple(map(c.steps, range(n)))
            for c in study.trials.values()
            for n in range(step + 1, c.branch.steps + 1)
        }
    )
    assert made(study, ran) == study.tree.steps_to_run == alone + again
    for name in study.trials:
        assert sweeps.outcome(study.folder.trial(name)) == sweeps.alone(study, name), name


def test_trials_have_the_type_of_the_run_that_they_branch_off(sweeps, source, monkeypatch):
    monkeypatch.setattr(dtypes, "suitable", lambda *_: "bfloat16")
    study = sweeps.open(*TRIALS, "sweep.from=source@8", "train.dtype=auto")
    assert {trial.experiment.train.dtype for trial in study.trials.values()} == {"float32"}


def test_run_with_another_value_of_a_later_field_is_refused(sweeps, source):
    """Also if the trials have the default, which keys of trials leave out."""
    stored = (source / "experiment.yaml").read_text()
    edited = stored.replace("ema: null", "ema: 0.9")
    assert edited != stored
    (source / "experiment.yaml").write_text(edited)
    with pytest.raises(UserError, match="train.ema: before 0.9, now None"):
        sweeps.open(*TRIALS, "sweep.from=source@8")


def test_trial_can_extend_a_finished_run(sweeps, source):
    """The run's last line has end-of-run metrics and a short log window; the trial's has not."""
    study = sweeps.open(TRIALS[2], "sweep.from=source@20")
    assert made(study, sweeps.run(study)) == 20
    assert sweeps.outcome(study.folder.path / "trials" / "longer") == sweeps.alone(study, "longer")


def test_batch_of_a_trial_may_change_after_the_branch(sweeps, source):
    study = sweeps.open(
        "sweep.trials.batch.train.batch_schedule={0: 8, 14: 16}", "sweep.from=source@12"
    )
    assert made(study, sweeps.run(study)) == 8
    assert sweeps.outcome(study.folder.trial("batch")) == sweeps.alone(study, "batch")
    with pytest.raises(UserError, match="train.global_batch_size: before 8, now 16"):
        sweeps.open("sweep.trials.other.train.batch_schedule={0: 16}", "sweep.from=source@12")


def test_rates_before_the_branch_are_those_of_the_run(sweeps, source):
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
        (["sweep.from=nowhere@8"], "'nowhere': there is no run"),
        (["sweep.from=source@21"], "has only 20 steps, not 21"),
        (["sweep.from=source@8", "model.dropout=0.2"], "model.dropout: before 0.1, now 0.2"),
        (["sweep.from=source@8", "train.log_interval=4"], "train.log_interval: before 3, now 4"),
        (["sweep.from=source@8", "train.seed=1"], "train.seed: before 1337, now 1"),
    ],
)
def test_trials_that_do_not_fit_the_run_are_refused(sweeps, source, words, said):
    with pytest.raises(ValueError, match=said):
        sweeps.open(*TRIALS, *words)


def test_trial_that_branched_off_another_run_is_refused_as_source(sweeps, source):
    lower = "sweep.trials.lower={schedule.kind: linear, schedule.max_lr: 5e-3, train.max_steps: 24}"
    sweeps.run(sweeps.open(lower, "sweep.from=source@12"))
    with pytest.raises(ValueError, match="branched off 12 steps of another run itself"):
        sweeps.open(
            "sweep.trials.more={train.max_steps: 40}",
            "sweep.from=sweep/trials/lower@20",
            name="other",
        )


def test_sweep_finds_its_run_at_another_path(sweeps, source):
    """As in another cache or on another machine. The records of the stages have the former path."""
    constant = "sweep.trials.c{0}={{schedule.kind: constant, train.max_steps: {0}}}"
    words = [TRIALS[0], constant.format(20), "sweep.keep_branches=true"]
    study = sweeps.open(*words, "sweep.from=source@12")
    assert made(study, sweeps.run(study)) == 2 + 6 + 12
    curves = [study.curve(trial) for trial in study.trials.values()]

    source.rename(sweeps.folder / "moved")
    again = sweeps.open(*words, "sweep.from=moved@12")
    assert again.is_over
    assert [again.curve(trial) for trial in again.trials.values()] == curves

    # A trial that ends at a checkpoint inside the second stage of another one.
    words += [constant.format(16), "sweep.from=moved@12"]
    study = sweeps.open(*words)
    assert made(study, sweeps.run(study)) == 0
    for name in study.trials:
        assert sweeps.outcome(study.folder.trial(name)) == sweeps.alone(study, name), name
    assert sweeps.open(*words).is_over
