"""Every trial of a sweep is what it is alone, to the last bit, and no step is run twice. Real training, no Ray."""

import json

import pytest

MIXED = ["sweep.trials.wsd-20.schedule.kind=wsd",
         "sweep.trials.wsd-14.train.max_steps=14",
         "sweep.trials.wsd-30-cosine={schedule.decay_shape: cosine, train.max_steps: 30}",
         "sweep.trials.wsd-20-sqrt.schedule.decay_shape=1-sqrt",
         "sweep.trials.constant-13={schedule.kind: constant, train.max_steps: 13}",
         "sweep.trials.constant-16={schedule.kind: constant, train.max_steps: 16}",
         "sweep.trials.linear.schedule.kind=linear",
         "sweep.trials.cosine.schedule.kind=cosine",
         "sweep.trials.inverse.schedule.kind=inverse_sqrt",
         "sweep.trials.peak.schedule.max_lr=5e-3",
         "sweep.trials.other={optim.weight_decay: 0.3, train.max_steps: 12}"]


def steps_of(study, ran) -> int:
    return sum(json.loads((study.folder / "stages" / i / "result.json").read_text())["steps_run"] for i in ran)


def assert_alone(sweeps, study, names=None):
    for name in names or study.candidates:
        assert sweeps.outcome(study.folder / "trials" / name) == sweeps.alone(study, name), name


@pytest.mark.parametrize("keep", ["true", "false"])
def test_a_mixed_sweep_is_its_trials(sweeps, keep):
    study = sweeps.open(*MIXED, f"sweep.keep_branches={keep}")
    ran = sweeps.run(study)
    assert_alone(sweeps, study)
    assert len(ran) == len(set(ran)) == len(study.plan.stages)
    assert steps_of(study, ran) == study.plan.steps_in_tree == study.plan.steps_to_run < study.plan.steps_asked
    assert {row["state"] for row in study.rows()} == {"done"}
